// The state of a block of the persistent decode kernel, its producer warp, and the products that its consumers compute.
#pragma once
#include "decode_parts.cuh"

// What lies where in a block's shared memory.
extern __shared__ __align__(128) char block_memory[];
template <int R> struct Shared {
  using S = Rows<R>;
  static constexpr int REST = S::SLOTS * UNIT;
  static __device__ char* slot(int i) { return block_memory + i * UNIT; }
  static __device__ half* x(int warp) { return (half*)(block_memory + REST + S::X) + warp * R * S::XROW; }
  static __device__ float* sums(int j) { return (float*)(block_memory + REST + (j % 2 ? S::SUMS_B : S::SUMS_A)); }
  static __device__ float* attention(int warp) { return (float*)(block_memory + REST + S::ACCS) + warp * ACC; }
  // Of a linear: the next one's is collected while slow warps still read this one's, so neighbours lie apart.
  static __device__ float* shrunk(int j, int row, int module) {
    return (float*)(block_memory + REST + S::SHRUNKEN) + (row * 4 + (j % 2 ? 3 : module)) * MAX_RANK;
  }
  static __device__ float* job(int i) { return (float*)(block_memory + REST + S::JOBS) + i * WARPS; }
  static __device__ float* squares(int which) { return (float*)(block_memory + REST + S::SQUARES) + which * R * WARPS; }
  static __device__ Adapter& adapter(int layer, int module, int row) {
    return ((Adapter*)(block_memory + REST + S::ADAPTERS))[(layer * MODULES + module) * R + row];
  }
  static __device__ Totals& totals(int layer, int j) {
    return ((Totals*)(block_memory + REST + S::TOTALS))[layer * 4 + j];
  }
  static __device__ int& position(int row) { return ((int*)(block_memory + REST + S::POSITIONS))[row]; }
  static __device__ int& leader(int row) { return ((int*)(block_memory + REST + S::LEADERS))[row]; }
  static __device__ uint4* residual(int row) {
    return (uint4*)(block_memory + REST + S::RESIDUAL) + row * CONSUMERS;
  }
  static __device__ int* pages() { return (int*)(block_memory + REST + S::PAGES); }
  static __device__ Layer* layers() { return (Layer*)(block_memory + REST + S::LAYER); }
  static __device__ uint64_t* full() { return (uint64_t*)(block_memory + REST + S::FIXED); }
  static __device__ uint64_t* empty() { return full() + S::SLOTS; }
};

// A row of A that a multiprocessor multiplies with x. Rows are numbered by row of the batch, module, then rank, and
// dealt from the last multiprocessor down, as the first have more units of weights.
struct Job {
  int row, module, rank;
  Adapter at;
};
__device__ __forceinline__ int first_job(int block) { return SMS - 1 - block; }
__device__ __forceinline__ int count_jobs(int sum, int block) { return (sum - first_job(block) + SMS - 1) / SMS; }
template <int R, int J> __device__ __forceinline__ Job job_at(int layer, int number) {
#pragma unroll 1
  for (int row = 0; row < R; row++)
#pragma unroll 1
    for (int m = 0; m < modules(J); m++) {
      Adapter at = Shared<R>::adapter(layer, first_module(J) + m, row);
      if (number < at.rank) return {row, m, number, at};
      number -= at.rank;
    }
  return {};
}
__host__ __device__ constexpr int jobs_in_slot(int j) { return UNIT / (2 * inputs(j)); }

// Rows of B: of a unit and a row of the batch 16 rows of `most` elements each have room, gate in the first half of it
// and up in the second.
__device__ __forceinline__ int own_units(int j, int block) { return (units(j) - block + SMS - 1) / SMS; }
template <int R> __device__ __forceinline__ int units_in_slot(int most) { return UNIT / (R * 32 * most); }
// Module of the unit's outputs; `output` becomes the first of them within the module.
template <int J> __device__ __forceinline__ int module_of(int unit, int& output) {
  output = J == 2 ? unit * 8 : unit * 16;
  if (J != 0 || output < Q) return 0;
  output -= Q;
  if (output < KV) return 1;
  output -= KV;
  return 2;
}

// The share of attention of this multiprocessor: of one key head of one row, tokens [begin, end) of those that were in
// the cache before this step.
template <int R> struct Task {
  int row, head, split, newest, begin, end;
  __device__ explicit Task(int block) {  // of a block below TASKS
    constexpr int SPLITS = Rows<R>::SPLITS;
    row = block / (KV_HEADS * SPLITS);
    head = block / SPLITS % KV_HEADS;
    split = block % SPLITS;
    newest = Shared<R>::position(row);
    const int cached = Shared<R>::position(Shared<R>::leader(row));
    begin = split * cached / SPLITS;
    end = (split + 1) * cached / SPLITS;
  }
};

// One warp that brings weights and adapters into the ring, in the order in which consumers need it, and waits for room only.
template <int R> struct Producer {
  using M = Shared<R>;
  const Args& a;
  int lane, slot = 0, phase = 0;
  uint64_t policy;

  __device__ Producer(const Args& a, int lane) : a(a), lane(lane) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
  }
  __device__ void next() {
    if (++slot == Rows<R>::SLOTS) {
      slot = 0;
      phase ^= 1;
    }
  }
  __device__ char* claim(int bytes) {  // by all lanes, which bring this many bytes between them
    wait(M::empty() + slot, phase ^ 1);
    if (lane == 0) expect(M::full() + slot, bytes);
    __syncwarp();
    return M::slot(slot);
  }
  __device__ void bring(char* to, const void* from, int bytes) { copy(to, from, bytes, M::full() + slot, policy); }

  template <int J> __device__ void weights(const char* from) {
    if (lane == 0)
      for (int c = 0; 32 * c < groups(J); c++) {
        const int bytes = min(32, groups(J) - 32 * c) * GROUP_BYTES;
        for (int u = blockIdx.x; u < units(J); u += SMS) {
          wait(M::empty() + slot, phase ^ 1);
          expect(M::full() + slot, bytes);
          bring(M::slot(slot), from + ((size_t)u * groups(J) + 32 * c) * GROUP_BYTES, bytes);
          next();
        }
      }
    slot = __shfl_sync(~0u, slot, 0);
    phase = __shfl_sync(~0u, phase, 0);
  }

  template <int J> __device__ void shrinks(int layer) {
    constexpr int PER = jobs_in_slot(J), BYTES = 2 * inputs(J);
    const int sum = M::totals(layer, J).sum, count = sum ? count_jobs(sum, blockIdx.x) : 0;
    for (int i = 0; i < count; i += PER) {
      const int here = min(PER, count - i);
      char* to = claim(here * BYTES);
      if (lane < here) {
        Job job = job_at<R, J>(layer, first_job(blockIdx.x) + (i + lane) * SMS);
        bring(to + lane * BYTES, a.pool + (size_t)job.at.a * 8 + (size_t)job.rank * inputs(J), BYTES);
      }
      next();
    }
  }

  template <int J> __device__ void expansions(int layer) {
    constexpr int HALVES = J == 2 ? 2 : 1;
    const Totals totals = M::totals(layer, J);
    if (!totals.sum) return;
    const int per = units_in_slot<R>(totals.most), count = own_units(J, blockIdx.x), room = 32 * totals.most;
    for (int u = 0; u < count; u += per) {
      const int pieces = min(per, count - u) * R * HALVES;
      int bytes = 0;
      auto piece = [&](int i, bool go, char* to) {
        const int side = i % HALVES, row = i / HALVES % R, at = i / (HALVES * R);
        int output, module = module_of<J>(blockIdx.x + (u + at) * SMS, output) + side;
        Adapter e = M::adapter(layer, first_module(J) + module, row);
        const int size = e.rank * 32 / HALVES;
        if (go && size)
          bring(to + (at * R + row) * room + side * room / 2, a.pool + (size_t)e.b * 8 + (size_t)output * e.rank, size);
        return size;
      };
      for (int i = lane; i < pieces; i += 32) bytes += piece(i, false, nullptr);
      bytes = __reduce_add_sync(~0u, bytes);
      char* to = claim(bytes);
      for (int i = lane; i < pieces; i += 32) piece(i, true, to);
      next();
    }
  }

  __device__ void run() {
#pragma unroll 1
    for (int l = 0; l < LAYERS; l++) {
      const Layer& layer = M::layers()[l];
      shrinks<0>(l);
      weights<0>(layer.weight[0]);
      expansions<0>(l);
      shrinks<1>(l);
      weights<1>(layer.weight[1]);
      expansions<1>(l);
      shrinks<2>(l);
      weights<2>(layer.weight[2]);
      expansions<2>(l);
      shrinks<3>(l);
      weights<3>(layer.weight[3]);
      expansions<3>(l);
    }
  }
};

// What a consumer warp knows: its place in the ring, its numbers, and the boxes of this layer and of the other parity.
template <int R> struct Consumer {
  using M = Shared<R>;
  const Args& a;
  int layer, block, warp, lane, slot = 0, phase = 0;
  unsigned *box, *other;

  __device__ explicit Consumer(const Args& a) : a(a), layer(0) { refresh(); }
  // Read these again at each stage: kept, they and the addresses that the compiler would compute from them once for all
  // layers fill the registers, and shared memory leaves no cache for what is spilled.
  __device__ __forceinline__ void refresh() {
    int thread;
    asm volatile("mov.u32 %0,%%tid.x;" : "=r"(thread));
    asm volatile("mov.u32 %0,%%ctaid.x;" : "=r"(block));
    warp = thread >> 5;
    lane = thread & 31;
    box = a.boxes + (layer & 1) * Rows<R>::BOXES;
    other = a.boxes + (~layer & 1) * Rows<R>::BOXES;
  }
  __device__ __forceinline__ int thread() const { return warp * 32 + lane; }
  __device__ char* full() const {
    wait(M::full() + slot, phase);
    return M::slot(slot);
  }
  __device__ void release() {
    __syncwarp();
    if (lane == 0) arrive(M::empty() + slot);
    if (++slot == Rows<R>::SLOTS) {
      slot = 0;
      phase ^= 1;
    }
  }

  struct Codes {  // this warp's two groups of a unit
    uint4 q[4];
    unsigned scale[2], zero[2];
  };
  __device__ __forceinline__ void fetch(const char* unit, Codes& c) const {
    const char* at = unit + 2 * warp * GROUP_BYTES;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const char* group = at + i * GROUP_BYTES;
      c.q[2 * i] = reinterpret_cast<const uint4*>(group)[lane];
      c.q[2 * i + 1] = reinterpret_cast<const uint4*>(group)[32 + lane];
      c.scale[i] = *reinterpret_cast<const unsigned*>(group + 1024 + (lane / 4) * 4);
      if (ZEROS) c.zero[i] = *reinterpret_cast<const unsigned*>(group + 1056 + (lane / 4) * 4);
    }
  }

  // Multiply a chunk of the inputs, of which this warp has SPAN, with every unit of this multiprocessor; the sums go, or
  // are added, to sums[unit][warp][row][16]. Column n of the tensor cores' b is row n; columns beyond R repeat the last.
  template <int J, int CH> __device__ __forceinline__ void product() {
    refresh();
    constexpr int HERE = groups(J) - 32 * CH < 32 ? groups(J) - 32 * CH : 32;
    const int count = own_units(J, block);
    if (2 * warp >= HERE) {
      for (int u = 0; u < count; u++) {
        full();
        release();
      }
      return;
    }
    const half* row = M::x(warp) + min(lane / 4, R - 1) * Rows<R>::XROW;
    const uint4* x = reinterpret_cast<const uint4*>(row) + 4 * (lane % 4);
    const int column = R == 1 ? 0 : 2 * (lane % 4);
    float* to = M::sums(J) + warp * R * 16 + column * 16 + lane / 4;
    float total[2][2];  // of x, by group and column
    if (ZEROS) totals_of_x(total);
#pragma unroll 1
    for (int u = 0; u < count; u++) {
      float p[4] = {0, 0, 0, 0}, z[4] = {0, 0, 0, 0};
      unsigned w[4];
      Codes now;
      fetch(full(), now);
      release();
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint4 x0 = x[2 * j], x1 = x[2 * j + 1], y0 = x[16 + 2 * j], y1 = x[17 + 2 * j];
        const uint4 q = now.q[j], v = now.q[2 + j];
        dequantize(q.x, w);
        mma(p, w, x0.x, x0.y);
        dequantize(v.x, w);
        mma(z, w, y0.x, y0.y);
        dequantize(q.y, w);
        mma(p, w, x0.z, x0.w);
        dequantize(v.y, w);
        mma(z, w, y0.z, y0.w);
        dequantize(q.z, w);
        mma(p, w, x1.x, x1.y);
        dequantize(v.z, w);
        mma(z, w, y1.x, y1.y);
        dequantize(q.w, w);
        mma(p, w, x1.z, x1.w);
        dequantize(v.w, w);
        mma(z, w, y1.z, y1.w);
      }
      const float2 f0 = __half22float2(to_half2(now.scale[0])), f1 = __half22float2(to_half2(now.scale[1]));
      if (ZEROS) {
        const float2 z0 = __half22float2(to_half2(now.zero[0])), z1 = __half22float2(to_half2(now.zero[1]));
#pragma unroll
        for (int c = 0; c < 2; c++) {
          p[c] += z0.x * total[0][c];
          p[2 + c] += z0.y * total[0][c];
          z[c] += z1.x * total[1][c];
          z[2 + c] += z1.y * total[1][c];
        }
      }
#pragma unroll
      for (int c = 0; c < (R == 1 ? 1 : 2); c++) {
        const float low = f0.x * p[c] + f1.x * z[c], high = f0.y * p[2 + c] + f1.y * z[2 + c];
        if (R == 1 ? lane % 4 == 0 : column + c < R) {
          to[c * 16] = CH ? to[c * 16] + low : low;
          to[c * 16 + 8] = CH ? to[c * 16 + 8] + high : high;
        }
      }
      to += WARPS * R * 16;
    }
  }

  __device__ __forceinline__ void totals_of_x(float (&total)[2][2]) const {
    float sums[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      float f[8];
      unpack(*reinterpret_cast<const uint4*>(M::x(warp) + r * Rows<R>::XROW + 8 * lane), f);
      sums[r] = ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
#pragma unroll
      for (int o = 8; o; o >>= 1) sums[r] += __shfl_xor_sync(~0u, sums[r], o);
    }
    // Lanes 0-15 hold the sum of each row's first group, lanes 16-31 that of its second.
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float first = __shfl_sync(~0u, sums[r], 0), second = __shfl_sync(~0u, sums[r], 16);
#pragma unroll
      for (int c = 0; c < 2; c++)
        if (r == 0 || (R == 1 ? 0 : min(2 * (lane % 4) + c, R - 1)) == r) {
          total[0][c] = first;
          total[1][c] = second;
        }
    }
  }
};
