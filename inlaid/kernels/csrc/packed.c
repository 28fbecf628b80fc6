// y = x @ W on a CPU, of weights in 4 or 8 bits that stay packed, and of weights in half precision.
//
// Columns lie in tiles of 16. Of a tile of packed weights, each 32-bit word holds 8 (or 4) consecutive inputs of one
// column, and the 16 words of the same inputs lie side by side: codes[tile][word][16], scales and zeros
// [tile][group][16], of codes divided by 2^bits and with 1 added. A group's zero point is subtracted from its sum:
// scale * (sum(x * code) - zero * sum(x)).
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

enum { TILE = 16, LANES = 8, MANTISSA = 23 };

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE words load_words(const uint32_t *from) {
    words value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, floats value) { memcpy(to, &value, sizeof value); }

// The codes at one place of their words, each as 1 + code / 2^bits: as the first bits of the mantissa of a number from 1
// to 2, which is quicker than a conversion.
INLINE floats codes_at(words packed, int place, int bits) {
    const uint32_t mask = ((1u << bits) - 1) << (MANTISSA - bits), one = 0x3f800000;
    const int up = MANTISSA - bits - place * bits;
    words wide = ((up >= 0 ? packed << (uint32_t)up : packed >> (uint32_t)-up) & mask) | one;
    floats value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

INLINE void add_input(int rows, floats sum[4][2], const float *x, long stride, floats low, floats high) {
    for (int row = 0; row < rows; row++) {
        float value = x[row * stride];
        sum[row][0] += value * low;
        sum[row][1] += value * high;
    }
}

// One tile for `rows` rows, which the compiler knows.
INLINE void tile_packed(int rows, int bits, const float *x, long stride, const float *sums, const uint32_t *codes,
                        const float *scales, const float *zeros, float *out, long out_stride, int groups, int length) {
    const int each = 32 / bits;
    floats total[4][2] = {0};
    const int chains = rows < 3 ? 2 : 1;  // sums of every other input: few rows would wait for their last addition
    for (int group = 0; group < groups; group++) {
        floats sum[2][4][2] = {0};
        for (int k = group * length; k < (group + 1) * length; k += each, codes += TILE) {
            words low = load_words(codes), high = load_words(codes + LANES);
            for (int place = 0; place < each; place += 2) {
                add_input(rows, sum[0], x + k + place, stride, codes_at(low, place, bits), codes_at(high, place, bits));
                add_input(rows, sum[chains - 1], x + k + place + 1, stride, codes_at(low, place + 1, bits),
                          codes_at(high, place + 1, bits));
            }
        }
        for (int row = 0; row < rows; row++) {
            float all = sums[row * groups + group];
            for (int half = 0; half < 2; half++) {
                floats scale = load(scales + group * TILE + half * LANES);
                floats of_codes = sum[0][row][half];
                if (chains == 2) of_codes += sum[1][row][half];
                total[row][half] += scale * (of_codes - load(zeros + group * TILE + half * LANES) * all);
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        store(out + row * out_stride, total[row][0]);
        store(out + row * out_stride + LANES, total[row][1]);
    }
}

INLINE void tile_rows(int bits, int rows, const float *x, const float *sums, const uint32_t *codes, const float *scales,
                      const float *zeros, float *out, long out_stride, int inputs, int groups) {
    const int length = inputs / groups;
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        tile_packed(4, bits, x + (long)row * inputs, inputs, sums + row * groups, codes, scales, zeros,
                    out + row * out_stride, out_stride, groups, length);
    const float *rest = x + (long)row * inputs;
    float *to = out + row * out_stride;
    sums += row * groups;
    if (rows - row == 3) tile_packed(3, bits, rest, inputs, sums, codes, scales, zeros, to, out_stride, groups, length);
    if (rows - row == 2) tile_packed(2, bits, rest, inputs, sums, codes, scales, zeros, to, out_stride, groups, length);
    if (rows - row == 1) tile_packed(1, bits, rest, inputs, sums, codes, scales, zeros, to, out_stride, groups, length);
}

// Write a tile's 16 columns: whole ones in place, the last of a width that 16 does not divide by way of `spare`.
INLINE void copy_columns(const float *spare, float *out, int rows, int columns, int columns_here) {
    for (int row = 0; row < rows; row++)
        memcpy(out + (long)row * columns, spare + row * TILE, columns_here * sizeof(float));
}

// Sums of each group's inputs, whose number is a multiple of 8.
INLINE void sum_groups(const float *x, float *sums, int rows, int inputs, int groups) {
    const int length = inputs / groups;
    for (long at = 0; at < (long)rows * groups; at++, x += length) {
        floats sum = {0};
        for (int k = 0; k < length; k += LANES) sum += load(x + k);
        sums[at] = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    }
}

struct weight {  // as packed.py has it
    const uint32_t *codes;
    const float *scales, *zeros;
    int bits, inputs, columns, groups;
};

// `spare` holds rows x (groups + 16): sums of the inputs, and the last tile of a width that 16 does not divide.
void inlaid_packed_gemm(const struct weight *weight, const float *x, float *out, float *spare, int rows, int threads) {
    const struct weight w = *weight;
    const int tiles = (w.columns + TILE - 1) / TILE;
    const long tile_words = (long)w.inputs * w.bits / 32 * TILE;
    float *sums = spare + (long)rows * TILE;
    sum_groups(x, sums, rows, w.inputs, w.groups);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int tile = 0; tile < tiles; tile++) {
        const int first = tile * TILE, here = w.columns - first < TILE ? w.columns - first : TILE;
        float *to = here == TILE ? out + first : spare;
        const long to_stride = here == TILE ? w.columns : TILE;
        const uint32_t *own = w.codes + tile * tile_words;
        const float *scale = w.scales + (long)tile * w.groups * TILE, *zero = w.zeros + (long)tile * w.groups * TILE;
        if (w.bits == 4)
            tile_rows(4, rows, x, sums, own, scale, zero, to, to_stride, w.inputs, w.groups);
        else
            tile_rows(8, rows, x, sums, own, scale, zero, to, to_stride, w.inputs, w.groups);
        if (here < TILE) copy_columns(spare, out + first, rows, w.columns, here);
    }
}

// Dequantize columns of tiles [from, to) into out[inputs][(to - from) * 16], for products of many rows.
void inlaid_packed_dequantize(const struct weight *weight, float *out, int from, int to, int threads) {
    const int bits = weight->bits, inputs = weight->inputs, groups = weight->groups;
    const int each = 32 / bits, length = inputs / groups, width = (to - from) * TILE;
    const uint32_t *codes = weight->codes;
    const float *scales = weight->scales, *zeros = weight->zeros;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int tile = from; tile < to; tile++) {
        const uint32_t *word = codes + (long)tile * inputs / each * TILE;
        float *column = out + (tile - from) * TILE;
        for (int k = 0; k < inputs; k += each, word += TILE) {
            const long group = ((long)tile * groups + k / length) * TILE;
            for (int half = 0; half < TILE; half += LANES) {
                words packed = load_words(word + half);
                floats scale = load(scales + group + half), zero = load(zeros + group + half);
                for (int place = 0; place < each; place++) {
                    floats code = bits == 4 ? codes_at(packed, place, 4) : codes_at(packed, place, 8);
                    store(column + (long)(k + place) * width + half, scale * (code - zero));
                }
            }
        }
    }
}

INLINE floats widen(halves value, int brain) {
    if (brain) {
        words bits = __builtin_convertvector(value, words) << 16;
        floats wide;
        memcpy(&wide, &bits, sizeof wide);
        return wide;
    }
#if defined(__F16C__)
    __m256 wide = _mm256_cvtph_ps((__m128i)value);
    return (floats)wide;
#else
    typedef _Float16 half_floats __attribute__((vector_size(16)));
    half_floats half;
    memcpy(&half, &value, sizeof half);
    return __builtin_convertvector(half, floats);
#endif
}

INLINE void tile_half(int rows, int brain, const float *x, const uint16_t *weights, float *out, long out_stride,
                      int inputs) {
    floats total[4][2] = {0};
    for (int k = 0; k < inputs; k++, weights += TILE) {
        halves low, high;
        memcpy(&low, weights, sizeof low);
        memcpy(&high, weights + LANES, sizeof high);
        floats w0 = widen(low, brain), w1 = widen(high, brain);
        for (int row = 0; row < rows; row++) {
            float value = x[(long)row * inputs + k];
            total[row][0] += value * w0;
            total[row][1] += value * w1;
        }
    }
    for (int row = 0; row < rows; row++) {
        store(out + row * out_stride, total[row][0]);
        store(out + row * out_stride + LANES, total[row][1]);
    }
}

INLINE void some_half(int rows, int brain, const float *x, const uint16_t *weights, float *out, long out_stride,
                      int inputs) {
    if (rows == 4) tile_half(4, brain, x, weights, out, out_stride, inputs);
    if (rows == 3) tile_half(3, brain, x, weights, out, out_stride, inputs);
    if (rows == 2) tile_half(2, brain, x, weights, out, out_stride, inputs);
    if (rows == 1) tile_half(1, brain, x, weights, out, out_stride, inputs);
}

// Weights in half precision (`brain`: bfloat16), [tile][input][16].
void inlaid_half_gemm(int brain, const float *x, const uint16_t *weights, float *out, float *spare, int rows, int inputs,
                      int columns, int threads) {
    const int tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int tile = 0; tile < tiles; tile++) {
        const int first = tile * TILE, here = columns - first < TILE ? columns - first : TILE;
        float *to = here == TILE ? out + first : spare;
        const long to_stride = here == TILE ? columns : TILE;
        const uint16_t *own = weights + (long)tile * inputs * TILE;
        for (int row = 0; row < rows; row += 4) {
            const float *from = x + (long)row * inputs;
            float *at = to + row * to_stride;
            const int some = rows - row < 4 ? rows - row : 4;
            if (brain)
                some_half(some, 1, from, own, at, to_stride, inputs);
            else
                some_half(some, 0, from, own, at, to_stride, inputs);
        }
        if (here < TILE) copy_columns(spare, out + first, rows, columns, here);
    }
}

// residual += product; out = rms_norm(residual) * weight. `keep` 0: the residual stays as it is.
void inlaid_add_norm(float *residual, const float *product, const float *weight, float *out, int rows, int width,
                     float eps, int keep) {
    for (int row = 0; row < rows; row++, residual += width, product += width, out += width) {
        floats squares[2] = {0};
        float rest = 0;
        int at = 0;
        for (; at + 2 * LANES <= width; at += 2 * LANES)
            for (int half = 0; half < 2; half++) {
                const int here = at + half * LANES;
                floats sum = load(residual + here) + load(product + here);
                store(out + here, sum);
                squares[half] += sum * sum;
            }
        for (; at < width; at++) {
            out[at] = residual[at] + product[at];
            rest += out[at] * out[at];
        }
        if (keep) memcpy(residual, out, width * sizeof(float));
        floats all = squares[0] + squares[1];
        const float total = ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7])) + rest;
        const float scale = 1.0f / sqrtf(total / width + eps);
        for (at = 0; at < width; at++) out[at] *= scale * weight[at];
    }
}

// Rotate the queries and keys of [rows][heads + 2 * groups][width] in place; write keys and values to their slots, if
// `keys` is there.
void inlaid_rope_store(float *qkv, const float *cos, const float *sin, float *keys, float *values, const int64_t *slots,
                       int rows, int heads, int groups, int width) {
    const int half = width / 2;
    for (int row = 0; row < rows; row++, cos += width, sin += width) {
        for (int head = 0; head < heads + groups; head++, qkv += width)
            for (int at = 0; at < half; at++) {
                const float low = qkv[at], high = qkv[at + half];
                qkv[at] = low * cos[at] - high * sin[at];
                qkv[at + half] = high * cos[at + half] + low * sin[at + half];
            }
        const long all = (long)groups * width;
        if (keys) {
            memcpy(keys + slots[row] * all, qkv - all, all * sizeof(float));
            memcpy(values + slots[row] * all, qkv, all * sizeof(float));
        }
        qkv += all;
    }
}

// Keys and values as numbers, or as codes of 8 bits that are multiplied by a scale.
enum { NUMBERS, INTEGERS, FLOATS };

struct pages {  // as packed.py has it
    const void *keys, *values;
    const uint16_t *scales;       // of codes: [blocks][groups][block_size][key, value]
    const int32_t *table, *lens;  // [sequences][blocks], [sequences]
    long scale_block;             // from block to block
    int kind, blocks, block_size, groups, width;
};

typedef uint8_t bytes __attribute__((vector_size(8)));
typedef int8_t signed_bytes __attribute__((vector_size(8)));
typedef int32_t ints __attribute__((vector_size(32)));

// Eight keys or values from place `at` on; codes of FLOATS (e4m3) over 256, as a float16 of the same bits is.
INLINE floats load_code(int kind, const void *from, long at) {
    if (kind == NUMBERS) return load((const float *)from + at);
    if (kind == INTEGERS) {
        signed_bytes codes;
        memcpy(&codes, (const int8_t *)from + at, sizeof codes);
        return __builtin_convertvector(__builtin_convertvector(codes, ints), floats);
    }
    bytes codes;
    memcpy(&codes, (const uint8_t *)from + at, sizeof codes);
    halves wide = __builtin_convertvector(codes, halves);
    return widen((wide & 0x7f) << 7 | (wide & 0x80) << 8, 0);
}

// The scale of a token's keys (`which` 0) or values (1), by which what load_code returns is multiplied.
INLINE float scale_of(int kind, const struct pages *p, const int32_t *table, int group, int at, int which) {
    const int block = at / p->block_size, place = at % p->block_size;
    halves one = {p->scales[table[block] * p->scale_block + ((long)group * p->block_size + place) * 2 + which]};
    return widen(one, 0)[0] * (kind == FLOATS ? 256 : 1);
}

INLINE float dot(int kind, const float *a, const void *b, long from, int width) {
    floats sum = {0}, other = {0};
    int at = 0;
    for (; at + 2 * LANES <= width; at += 2 * LANES) {
        sum += load(a + at) * load_code(kind, b, from + at);
        other += load(a + at + LANES) * load_code(kind, b, from + at + LANES);
    }
    if (at < width) sum += load(a + at) * load_code(kind, b, from + at);
    sum += other;
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// Sum values by their weights, some lanes of one head at a time.
INLINE void mix(int kind, int vectors, const struct pages *p, const int32_t *table, const float *weights, int first,
                int len, long start, float total, float *to) {
    const long token = (long)p->groups * p->width;
    floats sum[4] = {0};
    for (int at = first; at < len;) {
        const int block = at / p->block_size, end = (block + 1) * p->block_size < len ? (block + 1) * p->block_size : len;
        long value = ((long)table[block] * p->block_size + at % p->block_size) * token + start;
        for (; at < end; at++, value += token)
            for (int vector = 0; vector < vectors; vector++)
                sum[vector] += weights[at] * load_code(kind, p->values, value + vector * LANES);
    }
    for (int vector = 0; vector < vectors; vector++) store(to + vector * LANES, sum[vector] / total);
}

// One query head of one sequence.
INLINE void attend(int kind, const struct pages *p, const int32_t *table, const float *query, float *score, float *to,
                   int group, int first, int len, float scale) {
    const long token = (long)p->groups * p->width, start = (long)group * p->width;
    float most = -INFINITY, total = 0;
    for (int at = first; at < len;) {
        const int block = at / p->block_size, end = (block + 1) * p->block_size < len ? (block + 1) * p->block_size : len;
        long key = ((long)table[block] * p->block_size + at % p->block_size) * token + start;
        for (; at < end; at++, key += token) {
            score[at] = scale * dot(kind, query, p->keys, key, p->width);
            if (kind != NUMBERS) score[at] *= scale_of(kind, p, table, group, at, 0);
            most = score[at] > most ? score[at] : most;
        }
    }
    for (int at = first; at < len; at++) {
        score[at] = expf(score[at] - most);
        total += score[at];
        if (kind != NUMBERS) score[at] *= scale_of(kind, p, table, group, at, 1);
    }
    int lane = 0;
    for (; lane + 4 * LANES <= p->width; lane += 4 * LANES)
        mix(kind, 4, p, table, score, first, len, start + lane, total, to + lane);
    for (; lane < p->width; lane += LANES) mix(kind, 1, p, table, score, first, len, start + lane, total, to + lane);
}

// Softmax(q k^T * scale) v of one newest token each; q is [sequences][stride], out [sequences][heads][width], `scores`
// [sequences][heads][longest]. Only what the context holds is read.
void inlaid_decode_attention(const struct pages *given, const float *q, long stride, float *out, float *scores,
                             int sequences, int heads, int longest, int window, float scale, int threads) {
    const struct pages p = *given;
    const int each = heads / p.groups;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int task = 0; task < sequences * heads; task++) {
        const int row = task / heads, head = task % heads, group = head / each;
        const int len = p.lens[row], first = window > 0 && len > window ? len - window : 0;
        const int32_t *table = p.table + (long)row * p.blocks;
        const float *query = q + row * stride + (long)head * p.width;
        float *score = scores + (long)task * longest, *to = out + (long)task * p.width;
        if (p.kind == NUMBERS) attend(NUMBERS, &p, table, query, score, to, group, first, len, scale);
        if (p.kind == INTEGERS) attend(INTEGERS, &p, table, query, score, to, group, first, len, scale);
        if (p.kind == FLOATS) attend(FLOATS, &p, table, query, score, to, group, first, len, scale);
    }
}
