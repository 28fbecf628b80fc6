// out += scale * (x A^T) B^T on a CPU, each row with the adapter of its slot, from the pages of adapters as they lie.
//
// A is [rank][inputs] and B is [outputs][rank]. Rows come as runs of one slot. Of a run of few rows every product is a sum
// along what lies in one piece; for more rows 16 rows of A, or of B, are transposed once, and each of their numbers is
// multiplied with 16 columns at a time.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

typedef float floats __attribute__((vector_size(32)));

enum { LANES = 8, TILE = 16, FEW = 4 };  // FEW: rows of a run from which on it pays to transpose

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, floats value) { memcpy(to, &value, sizeof value); }

INLINE float total(floats sum) {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// The totals of eight sums.
INLINE floats totals(const floats *sum) {
#if defined(__AVX__)
    const __m256 *s = (const __m256 *)sum;
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
    return (floats)_mm256_permute2f128_ps(low, high, 0x20) + (floats)_mm256_permute2f128_ps(low, high, 0x31);
#else
    floats all;
    for (int lane = 0; lane < LANES; lane++) all[lane] = total(sum[lane]);
    return all;
#endif
}

struct adapters {  // as native_lora.py has it
    const float *pool;
    const int64_t *entries;  // [runs][siblings][3]: where A and B begin, and the rank
    const float *scales;     // [runs][siblings]
    const int32_t *rows;     // of all runs
    const int32_t *runs;     // [runs][3]: slot, first and last + 1 of its rows
    int num_runs, most;      // most: the largest rank among the entries, rounded up to 8
};

// Products of one row of x with all rows of A, eight at a time.
INLINE void shrink_row(const float *x, const float *a, int inputs, int rank, float scale, float *to) {
    int first = 0;
    for (; first + LANES <= rank; first += LANES) {
        floats sum[LANES] = {0};
        int k = 0;
        for (; k + LANES <= inputs; k += LANES) {
            floats here = load(x + k);
            for (int r = 0; r < LANES; r++) sum[r] += here * load(a + (long)(first + r) * inputs + k);
        }
        floats all = totals(sum);
        for (; k < inputs; k++)
            for (int r = 0; r < LANES; r++) all[r] += x[k] * a[(long)(first + r) * inputs + k];
        store(to + first, all * scale);
    }
    for (; first < rank; first++) {
        floats sum = {0};
        float rest = 0;
        int k = 0;
        for (; k + LANES <= inputs; k += LANES) sum += load(x + k) * load(a + (long)first * inputs + k);
        for (; k < inputs; k++) rest += x[k] * a[(long)first * inputs + k];
        to[first] = (total(sum) + rest) * scale;
    }
}

// [length][16] of rows `first` to `first` + 16 of a matrix of `count` rows; rows that are not there are zero.
INLINE void transpose(const float *from, int first, int count, int length, float *to) {
    const int here = count - first < TILE ? count - first : TILE;
    if (here < TILE) memset(to, 0, (long)length * TILE * sizeof(float));
    for (int row = 0; row < here; row++)
        for (int k = 0; k < length; k++) to[(long)k * TILE + row] = from[(long)(first + row) * length + k];
}

// Products of `rows` rows, which the compiler knows, with 16 columns that lie side by side.
INLINE void tile(int rows, const float *const *x, const float *columns, int length, floats sum[FEW][2]) {
    for (int k = 0; k < length; k++, columns += TILE) {
        floats low = load(columns), high = load(columns + LANES);
        for (int row = 0; row < rows; row++) {
            float value = x[row][k];
            sum[row][0] += value * low;
            sum[row][1] += value * high;
        }
    }
}

INLINE void some_rows(int rows, const float *const *x, const float *columns, int length, floats sum[FEW][2]) {
    if (rows == 4) tile(4, x, columns, length, sum);
    if (rows == 3) tile(3, x, columns, length, sum);
    if (rows == 2) tile(2, x, columns, length, sum);
    if (rows == 1) tile(1, x, columns, length, sum);
}

INLINE void shrink_run(const int32_t *rows, int count, const float *a, int inputs, int rank, float scale,
                       const float *x, float *to, long stride, float *spare) {
    if (count < FEW) {
        for (int i = 0; i < count; i++)
            shrink_row(x + (long)rows[i] * inputs, a, inputs, rank, scale, to + rows[i] * stride);
        return;
    }
    for (int first = 0; first < rank; first += TILE) {
        const int here = rank - first < TILE ? rank - first : TILE;
        transpose(a, first, rank, inputs, spare);
        for (int i = 0; i < count; i += FEW) {
            const int some = count - i < FEW ? count - i : FEW;
            const float *from[FEW];
            for (int row = 0; row < some; row++) from[row] = x + (long)rows[i + row] * inputs;
            floats sum[FEW][2] = {0};
            some_rows(some, from, spare, inputs, sum);
            for (int row = 0; row < some; row++) {
                float all[TILE];
                store(all, sum[row][0] * scale);
                store(all + LANES, sum[row][1] * scale);
                memcpy(to + rows[i + row] * stride + first, all, here * sizeof(float));
            }
        }
    }
}

// x A^T times the scale, of every sibling: shrunk[row][sibling][most].
void inlaid_lora_shrink(const struct adapters *adapters, const float *x, float *shrunk, float *spare, int inputs,
                        int siblings, int threads) {
    const struct adapters p = *adapters;
    const long stride = (long)siblings * p.most;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int run = 0; run < p.num_runs; run++) {
        const int begin = p.runs[3 * run + 1], count = p.runs[3 * run + 2] - begin;
        float *own = spare;
#if defined(_OPENMP)
        own += (long)omp_get_thread_num() * TILE * inputs;
#endif
        for (int sibling = 0; sibling < siblings; sibling++) {
            const long at = (long)run * siblings + sibling;
            const int64_t *entry = p.entries + 3 * at;
            if (entry[2])
                shrink_run(p.rows + begin, count, p.pool + entry[0], inputs, (int)entry[2], p.scales[at], x,
                           shrunk + (long)sibling * p.most, stride, own);
        }
    }
}

INLINE void add(float *to, const float *from, int count) {
    for (int n = 0; n < count; n++) to[n] += from[n];
}

// Add one row's products with all rows of B, eight at a time.
INLINE void expand_row(const float *shrunk, const float *b, int rank, int outputs, float *out) {
    const int whole = rank / LANES * LANES;
    int n = 0;
    for (; n + LANES <= outputs; n += LANES, b += (long)LANES * rank) {
        floats sum[LANES] = {0};
        for (int k = 0; k < whole; k += LANES) {
            floats here = load(shrunk + k);
            for (int i = 0; i < LANES; i++) sum[i] += here * load(b + (long)i * rank + k);
        }
        floats all = whole ? totals(sum) : (floats){0};
        for (int k = whole; k < rank; k++)
            for (int i = 0; i < LANES; i++) all[i] += shrunk[k] * b[(long)i * rank + k];
        store(out + n, load(out + n) + all);
    }
    for (; n < outputs; n++, b += rank) {
        float sum = 0;
        for (int k = 0; k < rank; k++) sum += shrunk[k] * b[k];
        out[n] += sum;
    }
}

INLINE void expand_run(const int32_t *rows, int count, const float *b, int outputs, int rank, const float *shrunk,
                       long stride, float *out, long out_stride, float *spare) {
    if (count < FEW) {
        for (int i = 0; i < count; i++)
            expand_row(shrunk + rows[i] * stride, b, rank, outputs, out + rows[i] * out_stride);
        return;
    }
    for (int first = 0; first < outputs; first += TILE) {
        const int here = outputs - first < TILE ? outputs - first : TILE;
        transpose(b, first, outputs, rank, spare);
        for (int i = 0; i < count; i += FEW) {
            const int some = count - i < FEW ? count - i : FEW;
            const float *from[FEW];
            for (int row = 0; row < some; row++) from[row] = shrunk + rows[i + row] * stride;
            floats sum[FEW][2] = {0};
            some_rows(some, from, spare, rank, sum);
            for (int row = 0; row < some; row++) {
                float *to = out + rows[i + row] * out_stride + first;
                if (here == TILE) {
                    store(to, load(to) + sum[row][0]);
                    store(to + LANES, load(to + LANES) + sum[row][1]);
                } else {
                    float all[TILE];
                    store(all, sum[row][0]);
                    store(all + LANES, sum[row][1]);
                    add(to, all, here);
                }
            }
        }
    }
}

// out[row][siblings side by side] += shrunk B^T.
void inlaid_lora_expand(const struct adapters *adapters, const float *shrunk, float *out, float *spare, long out_stride,
                        const int32_t *widths, int siblings, int threads) {
    const struct adapters p = *adapters;
    const long stride = (long)siblings * p.most;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int run = 0; run < p.num_runs; run++) {
        const int begin = p.runs[3 * run + 1], count = p.runs[3 * run + 2] - begin;
        float *own = spare, *to = out;
#if defined(_OPENMP)
        own += (long)omp_get_thread_num() * TILE * p.most;
#endif
        for (int sibling = 0; sibling < siblings; to += widths[sibling], sibling++) {
            const int64_t *entry = p.entries + 3 * ((long)run * siblings + sibling);
            if (entry[2])
                expand_run(p.rows + begin, count, p.pool + entry[1], widths[sibling], (int)entry[2],
                           shrunk + (long)sibling * p.most, stride, to, out_stride, own);
        }
    }
}
