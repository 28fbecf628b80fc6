// The decode step of up to four tokens as one persistent kernel, for the model whose shape was given to the compiler.
//
// Semantics, for each row r: x = embedding[token]; for each layer
//   x += o(attention(rope(qkv(norm(x))))), keys and values of the token being stored; x += down(silu(gate) * up)(norm(x))
// where each linear is x W, W in 4 bits in groups of 128 inputs, plus scale * B (A x) of the row's adapter at its rank.
// Rows of one sequence (a token and guesses that follow it) see the cache and those before them in the step.
// What is left is `residual` and `product`, the two sides of the last sum. Rounding to half precision is where the
// kernels of single operations have it.
//
// One block a multiprocessor, all resident (a cooperative launch). A producer warp streams the block's weights and
// adapters through a ring of slots in shared memory and never waits for activations. 16 consumer warps split
// the inputs and multiply with tensor cores. Vectors travel between multiprocessors through boxes in global memory, as
// words that are their own flag: there is no barrier across the device. Boxes have two parities, by layer; whoever
// writes a word empties the same word of the other parity, which was read a layer ago. Between that and the word's next
// use lies a vector that every multiprocessor has written a part of (the products of `o` and `down`): a fence before its
// words are published and one after they have been read order the two.
#include "decode_block.cuh"

// x A of this layer's adapters: this multiprocessor's rows of A, summed over warps and published.
template <int R, int J> __device__ __forceinline__ void shrink(Consumer<R>& w) {
  w.refresh();
  const int layer = w.layer;
  constexpr int PER = jobs_in_slot(J);
  const int sum = Shared<R>::totals(layer, J).sum, count = sum ? count_jobs(sum, w.block) : 0;
  if (count <= 0) return;
  for (int i = 0; i < count; i++) {
    const char* at = w.full() + i % PER * 2 * inputs(J);
    const Job job = job_at<R, J>(layer, first_job(w.block) + i * SMS);
    float part = 0;
    for (int k = w.warp * SPAN + 8 * w.lane; k < inputs(J); k += CHUNK) {
      uint4 x;
      if (J == 3) x = poll4(w.box + Rows<R>::ACT_AT + (job.row * F + k) / 2);
      else x = *reinterpret_cast<const uint4*>(Shared<R>::x(w.warp) + job.row * Rows<R>::XROW + 8 * w.lane);
      part += dot(x, *reinterpret_cast<const uint4*>(at + 2 * k));
    }
    part = warp_sum(part);
    if (w.lane == 0) Shared<R>::job(i)[w.warp] = part;
    if (i % PER == PER - 1 || i == count - 1) w.release();
  }
  sync_consumers();
  const int i = w.thread();
  if (i < count) {
    const Job job = job_at<R, J>(layer, first_job(w.block) + i * SMS);
    float total = 0;
#pragma unroll
    for (int v = 0; v < WARPS; v++) total += Shared<R>::job(i)[v];
    publish(w.box + Rows<R>::SHRUNK_AT + ((J * R + job.row) * 3 + job.module) * MAX_RANK + job.rank,
           __float_as_uint(total));
  }
}

// Bring x A of all rows into shared memory, times the scale.
template <int R, int J> __device__ __forceinline__ void collect(Consumer<R>& w) {
  w.refresh();
  const int layer = w.layer;
  const Totals totals = Shared<R>::totals(layer, J);
  if (!totals.sum) return;
  for (int i = w.thread(); i < R * modules(J) * totals.most; i += CONSUMERS) {
    const int rank = i % totals.most, m = i / totals.most % modules(J), row = i / (totals.most * modules(J));
    const Adapter at = Shared<R>::adapter(layer, first_module(J) + m, row);
    if (rank < at.rank)
      Shared<R>::shrunk(J, row, m)[rank] =
          at.scale * __uint_as_float(poll1(w.box + Rows<R>::SHRUNK_AT + ((J * R + row) * 3 + m) * MAX_RANK + rank));
  }
}

// A row of B times x A. Lanes begin in different places of their rows, which lie in the same banks.
__device__ __forceinline__ float expanded(const half* b, const float* shrunk, int rank, int start) {
  float part = 0;
  if (rank % 8) {
    for (int k = 0; k < rank; k++) part += __half2float(b[k]) * shrunk[k];
    return part;
  }
  const int pieces = rank / 8;
  int at = start % pieces;
  for (int i = 0; i < pieces; i++) {
    float f[8];
    unpack(reinterpret_cast<const uint4*>(b)[at], f);
    const float4 lo = reinterpret_cast<const float4*>(shrunk)[2 * at],
                 hi = reinterpret_cast<const float4*>(shrunk)[2 * at + 1];
    part += f[0] * lo.x + f[1] * lo.y + f[2] * lo.z + f[3] * lo.w + f[4] * hi.x + f[5] * hi.y + f[6] * hi.z + f[7] * hi.w;
    if (++at == pieces) at = 0;
  }
  return part;
}

// Sum a product over the warps, add the adapters, activate (J = 2), and publish. Call between two uses of the sums.
template <int R, int J> __device__ __forceinline__ void finish(Consumer<R>& w) {
  w.refresh();
  const int layer = w.layer;
  using S = Rows<R>;
  constexpr int TIMES = above(most_units(J) * R * 16, CONSUMERS), ACTIVE = groups(J) < 32 ? groups(J) / 2 : WARPS;
  const int count = own_units(J, w.block), t = w.thread(), n = t % 16;
  float v[TIMES];
#pragma unroll
  for (int i = 0; i < TIMES; i++) {
    const int at = (t + i * CONSUMERS) / 16, row = at % R, u = at / R;
    const float* p = Shared<R>::sums(J) + (u * WARPS * R + row) * 16 + n;
    v[i] = 0;
    if (u < count)
#pragma unroll
      for (int k = 0; k < ACTIVE; k++) v[i] += p[k * R * 16];
    v[i] = rounded(v[i]);
  }
  const Totals totals = Shared<R>::totals(layer, J);
  if (totals.sum) {
    const int per = units_in_slot<R>(totals.most), room = 32 * totals.most;
    for (int first = 0; first < count; first += per) {
      const char* slot = w.full();
#pragma unroll
      for (int i = 0; i < TIMES; i++) {
        const int at = (t + i * CONSUMERS) / 16, row = at % R, u = at / R;
        if (u >= first && u < min(first + per, count)) {
          const int side = J == 2 ? n / 8 : 0;
          int output, module = module_of<J>(w.block + u * SMS, output) + side;
          const int rank = Shared<R>::adapter(layer, first_module(J) + module, row).rank;
          const half* b = reinterpret_cast<const half*>(slot + ((u - first) * R + row) * room + side * room / 2) +
                          (J == 2 ? n % 8 : n) * rank;
          if (rank) v[i] = rounded(v[i] + expanded(b, Shared<R>::shrunk(J, row, module), rank, n));
        }
      }
      w.release();
    }
  }
  if (J % 2) order();
#pragma unroll
  for (int i = 0; i < TIMES; i++) {
    const int at = (t + i * CONSUMERS) / 16, row = at % R, u = at / R, unit = w.block + u * SMS;
    bool on = u < count;
    int word;
    if (J == 2) {
      const float up = __shfl_down_sync(~0u, v[i], 8);
      v[i] = rounded(__fdividef(v[i], 1 + __expf(-v[i]))) * up;
      on &= n < 8;
      word = S::ACT_AT + (row * F + unit * 8 + n) / 2;
    } else {
      word = (J == 0 ? S::QKV_AT : J == 1 ? S::O_AT : S::DOWN_AT) + (row * outputs(J) + unit * 16 + n) / 2;
    }
    const float neighbour = __shfl_down_sync(~0u, v[i], 1);
    if (on && !(t & 1)) {
      publish(w.box + word, to_word(v[i], neighbour));
      store1(w.other + word, EMPTY);
    }
  }
}

// A thread's eight columns of each row's residual: in shared memory where it has room, as registers are short.
template <int R> struct Residual {
  uint4 kept[Rows<R>::RESIDUAL_SHARED ? 1 : R];
  __device__ __forceinline__ uint4& at(int row, int thread) {
    if constexpr (Rows<R>::RESIDUAL_SHARED) return Shared<R>::residual(row)[thread];
    else return kept[row];
  }
};

// Add the last product, `down` of the layer before (WHICH = 0) or `o` (WHICH = 1), to the residual; the norm of the sum,
// times the gain, becomes this warp's x in shared memory.
template <int R, int WHICH> __device__ __forceinline__ void norm(Consumer<R>& w, Residual<R>& residual) {
  w.refresh();
  const int k = w.warp * SPAN + 8 * w.lane;
  const bool mine = w.warp * SPAN < D, add = WHICH || w.layer;
  const Layer& layer = Shared<R>::layers()[w.layer];
  const half* gain = WHICH ? layer.mlp_gain : layer.attention_gain;
  const unsigned* y = WHICH ? w.box + Rows<R>::O_AT : w.other + Rows<R>::DOWN_AT;
  float x[8];
  uint4* gains = reinterpret_cast<uint4*>(Shared<R>::x(w.warp) + 8 * w.lane);  // the place of x in the meantime
  if (mine) *gains = *reinterpret_cast<const uint4*>(gain + k);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float s = 0;
    if (mine) {
      unpack(residual.at(r, w.thread()), x);
      if (add) {
        float f[8];
        if (r == 0) await(y + ((R - 1) * D + w.warp * SPAN + SPAN - 2) / 2);
        unpack(poll4(y + (r * D + k) / 2), f);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = rounded(x[i] + f[i]);
        residual.at(r, w.thread()) = packed(x);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) s += x[i] * x[i];
    }
    s = warp_sum(s);
    if (w.lane == 0) Shared<R>::squares(WHICH)[r * WARPS + w.warp] = s;
  }
  order();
  sync_consumers();
  if (!mine) return;
  float g[8];
  unpack(*gains, g);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float s = Shared<R>::squares(WHICH)[r * WARPS + w.lane % WARPS];
#pragma unroll
    for (int o = 8; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    const float factor = rsqrtf(s / D + w.a.eps);
    unpack(residual.at(r, w.thread()), x);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = rounded(x[i] * factor) * g[i];
    *reinterpret_cast<uint4*>(Shared<R>::x(w.warp) + r * Rows<R>::XROW + 8 * w.lane) = packed(x);
  }
  __syncwarp();
}

#include "decode_attention.cuh"

// The down projection: inputs come chunk by chunk, the next while this one is multiplied.
template <int R, int CH> __device__ __forceinline__ void down(Consumer<R>& w, uint4 (&x)[R]) {
  if constexpr (CH < CHUNKS) {
    w.refresh();
    const unsigned* box = w.box + Rows<R>::ACT_AT;
    const int k = CH * CHUNK + w.warp * SPAN + 8 * w.lane, then = k + CHUNK;
    if (k < F)
#pragma unroll
      for (int r = 0; r < R; r++) {
        x[r] = complete4(x[r], box + (r * F + k) / 2);
        *reinterpret_cast<uint4*>(Shared<R>::x(w.warp) + r * Rows<R>::XROW + 8 * w.lane) = x[r];
      }
    if (then < F)
#pragma unroll
      for (int r = 0; r < R; r++) x[r] = load4(box + (r * F + then) / 2);
    __syncwarp();
    w.template product<3, CH>();
    __syncwarp();
    down<R, CH + 1>(w, x);
  }
}

template <int R> __device__ __forceinline__ void consume(Consumer<R>& w) {
  using S = Rows<R>;
  const Args& a = w.a;
  int k = w.warp * SPAN + 8 * w.lane;
  Residual<R> residual;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int source = a.sources[r];
    const size_t token = source >= 0 ? a.newest[source] : a.ids[r];
    residual.at(r, w.thread()) =
        k < D ? *reinterpret_cast<const uint4*>(a.embedding + token * D + k) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll 1
  for (int l = 0; l < LAYERS; l++) {
    w.layer = l;
    norm<R, 0>(w, residual);
    if (a.adapters != nullptr)  // all have read the other parity's, or their down projection would not be here
      for (int i = w.block * CONSUMERS + w.thread(); i < S::SHRUNK; i += SMS * CONSUMERS)
        store1(w.other + S::SHRUNK_AT + i, EMPTY);
    shrink<R, 0>(w);
    w.template product<0, 0>();
    collect<R, 0>(w);
    sync_consumers();
    finish<R, 0>(w);

    attend<R>(w);
    merge<R>(w);
    shrink<R, 1>(w);
    w.template product<1, 0>();
    collect<R, 1>(w);
    sync_consumers();
    finish<R, 1>(w);

    norm<R, 1>(w, residual);
    shrink<R, 2>(w);
    w.template product<2, 0>();
    collect<R, 2>(w);
    sync_consumers();
    finish<R, 2>(w);

    shrink<R, 3>(w);
    uint4 x[R];
    w.refresh();
    k = w.warp * SPAN + 8 * w.lane;
    if (k < F)
#pragma unroll
      for (int r = 0; r < R; r++) {
        if (r == 0) await(w.box + S::ACT_AT + ((R - 1) * F + w.warp * SPAN + SPAN - 2) / 2);
        x[r] = load4(w.box + S::ACT_AT + (r * F + k) / 2);
      }
    down<R, 0>(w, x);
    collect<R, 3>(w);
    sync_consumers();
    finish<R, 3>(w);
  }
  if (w.block == 0 && k < D)
#pragma unroll
    for (int r = 0; r < R; r++) {
      *reinterpret_cast<uint4*>(a.product + r * D + k) = poll4(w.box + S::DOWN_AT + (r * D + k) / 2);
      *reinterpret_cast<uint4*>(a.residual + r * D + k) = residual.at(r, w.thread());
    }
}

template <int R> __device__ __forceinline__ void prepare(const Args& a) {
  using M = Shared<R>;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Rows<R>::SLOTS; i++) {
      init(M::full() + i, 1);
      init(M::empty() + i, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  for (int i = threadIdx.x; i < LAYERS * (int)(sizeof(Layer) / 8); i += THREADS)
    ((uint64_t*)M::layers())[i] = ((const uint64_t*)a.layers)[i];
  if (threadIdx.x < R) {
    M::position(threadIdx.x) = a.positions[threadIdx.x];
    M::leader(threadIdx.x) = a.leaders == nullptr ? threadIdx.x : a.leaders[threadIdx.x];
  }
  for (int i = threadIdx.x; i < LAYERS * MODULES * R; i += THREADS) {
    const int row = i % R, site = i / R;
    Adapter found = {0, 0, 0, 0.f};
    const int slot = a.adapters == nullptr ? 0 : a.adapters[row];
    if (slot) {
      const long long* entry = a.table + ((size_t)slot * LAYERS * MODULES + site) * 3;
      found = {(unsigned)(entry[0] / 8), (unsigned)(entry[1] / 8), (int)entry[2],
               a.scale[(size_t)slot * LAYERS * MODULES + site]};
    }
    M::adapter(site / MODULES, site % MODULES, row) = found;
  }
  __syncthreads();
  if (blockIdx.x < Rows<R>::TASKS) {
    const Task<R> task(blockIdx.x);
    const int first = task.begin / BLOCK;
    for (int i = threadIdx.x; i < KEPT_PAGES && (first + i) * BLOCK < task.end; i += THREADS)
      M::pages()[i] = a.tables[a.table_rows[task.row] * a.table_width + first + i];
  }
  for (int i = threadIdx.x; i < LAYERS * 4; i += THREADS) {
    const int layer = i / 4, j = i % 4;
    Totals totals = {0, 0};
    for (int m = 0; m < modules(j); m++)
      for (int row = 0; row < R; row++) {
        const int rank = M::adapter(layer, first_module(j) + m, row).rank;
        totals.sum += rank;
        totals.most = max(totals.most, rank);
      }
    M::totals(layer, j) = totals;
  }
  __syncthreads();
}

template <int R> __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Args a) {
  prepare<R>(a);
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x < CONSUMERS + 32) Producer<R>(a, threadIdx.x & 31).run();
  } else {
    Consumer<R> w(a);
    consume<R>(w);
  }
}

namespace {
template <int R> cudaError_t launch(const Args& a, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(a.boxes, 0xff, 2 * Rows<R>::BOXES * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<Args*>(&a)};
  return cudaLaunchCooperativeKernel((const void*)decode<R>, SMS, THREADS, arguments, Rows<R>::BYTES, stream);
}
template <int R> int ready() {
  int blocks = 0;
  cudaError_t error = cudaFuncSetAttribute(decode<R>, cudaFuncAttributeMaxDynamicSharedMemorySize, Rows<R>::BYTES);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, decode<R>, THREADS, Rows<R>::BYTES);
  return error == cudaSuccess ? blocks : -(int)error;
}
}  // namespace

extern "C" {
// Blocks of the kernel for `rows` rows that a multiprocessor holds at once, or less than 0: an error's number. It must
// be called once for each number of rows before launches are captured.
int inlaid_decode_ready(int rows) { return rows == 1 ? ready<1>() : rows == 2 ? ready<2>() : ready<4>(); }

// Bytes of the boxes for `rows` rows.
long long inlaid_decode_boxes(int rows) {
  return 8ll * (rows == 1 ? Rows<1>::BOXES : rows == 2 ? Rows<2>::BOXES : Rows<4>::BOXES);
}

// Run the step of 1, 2 or 4 rows; return CUDA's error number, or 0.
int inlaid_decode_launch(const Args* a, int rows, cudaStream_t stream) {
  return rows == 1 ? launch<1>(*a, stream) : rows == 2 ? launch<2>(*a, stream) : launch<4>(*a, stream);
}
}
