// Attention of the persistent decode kernel: a multiprocessor computes the tokens of its task for the query heads that
// share a key head; every multiprocessor then joins the splits of the heads that its warps' inputs of `o` are.
#pragma once
#include "decode_block.cuh"

// A lane holds columns 8p .. 8p + 7 of a head and as many from C/2 on, p = lane % 8, so that a rotation stays within a
// lane; four tokens are side by side in a warp.
__device__ __forceinline__ void rotate(const uint4& low, const uint4& high, const uint4& cosines, const uint4& sines,
                                       float (&f)[16]) {
  float l[8], h[8], c[8], s[8];
  unpack(low, l);
  unpack(high, h);
  unpack(cosines, c);
  unpack(sines, s);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    f[i] = rounded(rounded(l[i] * c[i]) - h[i] * s[i]);
    f[8 + i] = rounded(rounded(h[i] * c[i]) + l[i] * s[i]);
  }
}

// The running softmax of one query head over the tokens that a lane has seen.
struct Running {
  float most = -1e30f, sum = 0, out[16] = {};
  __device__ __forceinline__ void add(float score, bool on, const float (&v)[16]) {
    const float then = fmaxf(most, on ? score : -1e30f), before = __expf(most - then);
    const float weight = on ? __expf(score - then) : 0.f;
    most = then;
    sum = sum * before + weight;
#pragma unroll
    for (int i = 0; i < 16; i++) out[i] = out[i] * before + weight * v[i];
  }
};

__device__ __forceinline__ float score(const float (&q)[16], const float (&k)[16]) {
  float d = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) d += q[i] * k[i];
#pragma unroll
  for (int o = 4; o; o >>= 1) d += __shfl_xor_sync(~0u, d, o);
  return d;
}

// A lane's share of the keys and values of one token.
struct Token {
  uint4 k[2], v[2];
};

template <int R> __device__ __forceinline__ void attend(Consumer<R>& w) {
  w.refresh();
  if (w.block >= Rows<R>::TASKS) return;
  const Task<R> task(w.block);
  const Layer& layer = Shared<R>::layers()[w.layer];
  using S = Rows<R>;
  const Args& a = w.a;
  const int p = w.lane % 8, sub = w.lane / 8, team = w.warp / TEAM, member = w.warp % TEAM;
  const int head = task.head * SHARING + team;
  constexpr int STEP = 4 * TEAM;  // tokens of a team at a time
  auto bring = [&](int first, Token& to) {
    const int token = first + 4 * member + sub, page = token / BLOCK - task.begin / BLOCK;
    to.k[0] = to.k[1] = to.v[0] = to.v[1] = make_uint4(0, 0, 0, 0);
    if (token >= task.end) return;
    const int block = page < KEPT_PAGES ? Shared<R>::pages()[page]
                                        : a.tables[a.table_rows[task.row] * a.table_width + token / BLOCK];
    const size_t from = (((size_t)block * BLOCK + token % BLOCK) * KV_HEADS + task.head) * C + 8 * p;
    to.k[0] = load4_once(layer.keys + from);
    to.k[1] = load4_once(layer.keys + from + C / 2);
    to.v[0] = load4_once(layer.values + from);
    to.v[1] = load4_once(layer.values + from + C / 2);
  };
  Token now;  // on its way while the query is waited for
  bring(task.begin, now);
  const uint4 cosines = *reinterpret_cast<const uint4*>(a.cos + (size_t)task.newest * C + 8 * p),
              sines = *reinterpret_cast<const uint4*>(a.sin + (size_t)task.newest * C + 8 * p);
  const unsigned* qkv = w.box + S::QKV_AT + task.row * QKV / 2;
  const unsigned* at = qkv + (head * C + 8 * p) / 2;
  float q[16];
  await(qkv + (head * C + C - 2) / 2);
  const uint4 low = load4(at), high = load4(at + C / 4);
  rotate(complete4(low, at), complete4(high, at + C / 4), cosines, sines, q);
#pragma unroll
  for (int i = 0; i < 16; i++) q[i] *= 0.08838834764831845f;
  Running running;
#pragma unroll 1
  for (int j = task.begin; j < task.end; j += STEP) {
    Token then;
    bring(j + STEP, then);
    float k[16], v[16];
    unpack(now.k[0], k);
    unpack(now.k[1], k + 8);
    const float scored = score(q, k);
    unpack(now.v[0], v);
    unpack(now.v[1], v + 8);
    running.add(scored, j + 4 * member + sub < task.end, v);
    now = then;
  }
  if (task.split == S::SPLITS - 1 && member == TEAM - 1) {  // the newest token, after those of its sequence in this step
    constexpr int WORDS = QKV / 2;  // of a row
    const int leader = R == 1 ? task.row : Shared<R>::leader(task.row);
    const unsigned *key = qkv - (task.row - leader) * WORDS + (Q + task.head * C + 8 * p) / 2, *value = key + KV / 2;
    float k[16], v[16];
#pragma unroll 1
    for (int row = leader; row < task.row; row++, key += WORDS, value += WORDS) {
      const size_t at = (size_t)Shared<R>::position(row) * C + 8 * p;
      rotate(poll4(key), poll4(key + C / 4), *reinterpret_cast<const uint4*>(a.cos + at),
             *reinterpret_cast<const uint4*>(a.sin + at), k);
      unpack(poll4(value), v);
      unpack(poll4(value + C / 4), v + 8);
      running.add(score(q, k), sub == 0, v);
    }
    rotate(poll4(key), poll4(key + C / 4), cosines, sines, k);
    const uint4 v0 = poll4(value), v1 = poll4(value + C / 4);
    unpack(v0, v);
    unpack(v1, v + 8);
    if (team == 0 && sub == 0) {
      const size_t at = ((size_t)a.slots[task.row] * KV_HEADS + task.head) * C + 8 * p;
      *reinterpret_cast<uint4*>(layer.keys + at) = packed(k);
      *reinterpret_cast<uint4*>(layer.keys + at + C / 2) = packed(k + 8);
      *reinterpret_cast<uint4*>(layer.values + at) = v0;
      *reinterpret_cast<uint4*>(layer.values + at + C / 2) = v1;
    }
    running.add(score(q, k), sub == 0, v);
  }
  // Join the four tokens of the warp.
  float most = fmaxf(running.most, __shfl_xor_sync(~0u, running.most, 8));
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
  const float part = __expf(running.most - most);
  float sum = running.sum * part;
  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 16);
  float* to = Shared<R>::attention(w.warp);
#pragma unroll
  for (int i = 0; i < 16; i++) {
    running.out[i] *= part;
    running.out[i] += __shfl_xor_sync(~0u, running.out[i], 8);
    running.out[i] += __shfl_xor_sync(~0u, running.out[i], 16);
  }
  if (sub == 0)
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      *reinterpret_cast<float4*>(to + (i < 8 ? 0 : C / 2) + 8 * p + i % 8) =
          make_float4(running.out[i], running.out[i + 1], running.out[i + 2], running.out[i + 3]);
  if (w.lane == 0) {
    to[C] = most;
    to[C + 1] = sum;
  }
  sync_consumers();
  for (int t = w.thread(); t < SHARING * C; t += CONSUMERS) {  // join the warps of a team
    const int h = t / C, c = t % C, first = h * TEAM;
    const float* mine = Shared<R>::attention(first + w.lane % TEAM);
    float most = mine[C], sum = mine[C + 1], best = most;
#pragma unroll
    for (int o = TEAM / 2; o; o >>= 1) best = fmaxf(best, __shfl_xor_sync(~0u, best, o));
    const float part = __expf(most - best);
    sum *= part;
#pragma unroll
    for (int o = TEAM / 2; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    float v = 0;
#pragma unroll
    for (int i = 0; i < TEAM; i++)
      v += __shfl_sync(~0u, part, i) * Shared<R>::attention(first + i)[c];
    v = sum > 0 ? __fdividef(v, sum) : 0;
    const float neighbour = __shfl_down_sync(~0u, v, 1);
    const int place = (task.row * HEADS + task.head * SHARING + h) * S::SPLITS + task.split;
    if (!(t & 1)) {
      publish(w.box + S::ATT_AT + (place * C + c) / 2, to_word(v, neighbour));
      store1(w.other + S::ATT_AT + (place * C + c) / 2, EMPTY);
    }
    if (c == 0) {
      publish(w.box + S::LSE_AT + place, __float_as_uint(best + __logf(sum)));
      store1(w.other + S::LSE_AT + place, EMPTY);
    }
  }
}

// Join the splits of this warp's two heads, which are its inputs of `o`.
template <int R> __device__ __forceinline__ void merge(Consumer<R>& w) {
  w.refresh();
  using S = Rows<R>;
  constexpr int SPLITS = S::SPLITS;
  if (w.warp * SPAN >= Q) return;
  const int head = 2 * w.warp + w.lane / 16, e = w.lane % 16 * 8;
  constexpr bool AT_ONCE = R * SPLITS <= 8;  // as many words as registers hold
  unsigned found[R];  // the splits' logarithms, by lane
  uint4 part[AT_ONCE ? R : 1][SPLITS];
  auto bring = [&](int r) {
    const unsigned* at = w.box + S::ATT_AT + ((r * HEADS + head) * SPLITS * C + e) / 2;
#pragma unroll
    for (int i = 0; i < SPLITS; i++) part[AT_ONCE ? r : 0][i] = load4(at + i * C / 2);
  };
#pragma unroll
  for (int r = 0; r < R; r++) found[r] = EMPTY;
  for (int n = 0;;) {
    bool all = true;
#pragma unroll
    for (int r = 0; r < R; r++)
      if (w.lane < 2 * SPLITS && found[r] == EMPTY) {
        found[r] = load1(w.box + S::LSE_AT + (r * HEADS + 2 * w.warp) * SPLITS + w.lane);
        all &= found[r] != EMPTY;
      }
    if (__all_sync(~0u, all)) break;
    give_up_after(++n);
  }
  if (AT_ONCE)
#pragma unroll
    for (int r = 0; r < R; r++) bring(r);
#pragma unroll
  for (int r = 0; r < R; r++) {
    const unsigned* at = w.box + S::ATT_AT + ((r * HEADS + head) * SPLITS * C + e) / 2;
    if (!AT_ONCE) bring(r);
    float weight[SPLITS], most = -1e30f, total = 0, x[8] = {};
#pragma unroll
    for (int i = 0; i < SPLITS; i++) {
      weight[i] = __uint_as_float(__shfl_sync(~0u, found[r], w.lane / 16 * SPLITS + i));
      most = fmaxf(most, weight[i]);
    }
#pragma unroll
    for (int i = 0; i < SPLITS; i++) {
      weight[i] = __expf(weight[i] - most);
      total += weight[i];
    }
    const float factor = __fdividef(1.f, total);
#pragma unroll
    for (int i = 0; i < SPLITS; i++) {
      float f[8];
      unpack(complete4(part[AT_ONCE ? r : 0][i], at + i * C / 2), f);
#pragma unroll
      for (int k = 0; k < 8; k++) x[k] += weight[i] * factor * f[k];
    }
    *reinterpret_cast<uint4*>(Shared<R>::x(w.warp) + r * S::XROW + 8 * w.lane) = packed(x);
  }
  __syncwarp();
}
