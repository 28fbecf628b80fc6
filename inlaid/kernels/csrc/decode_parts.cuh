// Device helpers of the persistent decode kernel: barriers, words that are their own flag, packing, tensor cores.
#pragma once
#include "decode_shape.cuh"

__device__ __forceinline__ half2 to_half2(unsigned u) { return *reinterpret_cast<half2*>(&u); }
__device__ __forceinline__ unsigned to_word(half2 h) { return *reinterpret_cast<unsigned*>(&h); }
__device__ __forceinline__ unsigned to_word(float a, float b) { return to_word(__floats2half2_rn(a, b)); }
__device__ __forceinline__ float rounded(float v) { return __half2float(__float2half_rn(v)); }
__device__ __forceinline__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void unpack(uint4 t, float* f) {
  const unsigned w[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 v = __half22float2(to_half2(w[i]));
    f[2 * i] = v.x;
    f[2 * i + 1] = v.y;
  }
}
__device__ __forceinline__ uint4 packed(const float* f) {
  return {to_word(f[0], f[1]), to_word(f[2], f[3]), to_word(f[4], f[5]), to_word(f[6], f[7])};
}
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  float x[8], y[8], s = 0;
  unpack(a, x);
  unpack(b, y);
#pragma unroll
  for (int i = 0; i < 8; i++) s += x[i] * y[i];
  return s;
}
__device__ __forceinline__ float warp_sum(float s) {
#pragma unroll
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  return s;
}

// Barriers in shared memory.
__device__ __forceinline__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(address(barrier)), "r"(count));
}
__device__ __forceinline__ void wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @p bra D; bra W; D:}" ::"r"(
          address(barrier)),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(address(barrier)) : "memory");
}
__device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::
                   "r"(address(to)), "l"(from), "r"(bytes), "r"(address(barrier)), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1,512;" ::: "memory"); }

// Words in boxes: a word that is not EMPTY has been written. EMPTY is a NaN that no instruction makes; should it come all
// the same, another NaN is published in its place.
constexpr unsigned EMPTY = 0xffffffffu;
constexpr int PATIENCE = 1 << 24;  // polls before the kernel gives up, some ten seconds

__device__ __forceinline__ uint4 load4(const unsigned* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ uint4 load4_once(const half* p) {  // what no launch writes and reads
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ unsigned load1(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store1(unsigned* p, unsigned v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void publish(unsigned* p, unsigned v) { store1(p, min(v, EMPTY - 1)); }
__device__ __forceinline__ bool missing(uint4 v) {
  return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY;
}
__device__ __forceinline__ void give_up_after(int polls) {
  if (polls > PATIENCE) __trap();
}
// One lane polls one word first: polls of all lanes would take the bandwidth of L2 from the stream of weights.
__device__ __forceinline__ void await(const unsigned* p) {
  if ((threadIdx.x & 31) == 0)
    for (int n = 0; load1(p) == EMPTY;) give_up_after(++n);
  __syncwarp();
}
__device__ __forceinline__ uint4 complete4(uint4 v, const unsigned* p) {
  for (int n = 0; missing(v);) {
    v = load4(p);
    give_up_after(++n);
  }
  return v;
}
__device__ __forceinline__ uint4 poll4(const unsigned* p) { return complete4(load4(p), p); }
__device__ __forceinline__ unsigned poll1(const unsigned* p) {
  unsigned v = load1(p);
  for (int n = 0; v == EMPTY;) {
    v = load1(p);
    give_up_after(++n);
  }
  return v;
}

// Orders what this block has written before what it writes next, and what it has read before what it reads next, for
// the whole device.
__device__ __forceinline__ void order() {
  if (FENCES) asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// Tensor cores: c[16 outputs, 8 rows] += a[16, 16] b[16, 8].
__device__ __forceinline__ void mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Eight codes of a word, less 8, as the operand a.
__device__ __forceinline__ void dequantize(unsigned q, unsigned* a) {
  const half2 low = __float2half2_rn(1032.f), sixteenth = __float2half2_rn(1.f / 16), high = __float2half2_rn(-72.f);
  unsigned q8 = q >> 8, t;
  asm("lop3.b32 %0,%1,0x000f000f,0x64006400,0xea;" : "=r"(t) : "r"(q));
  a[0] = to_word(__hsub2(to_half2(t), low));
  asm("lop3.b32 %0,%1,0x00f000f0,0x64006400,0xea;" : "=r"(t) : "r"(q));
  a[1] = to_word(__hfma2(to_half2(t), sixteenth, high));
  asm("lop3.b32 %0,%1,0x000f000f,0x64006400,0xea;" : "=r"(t) : "r"(q8));
  a[2] = to_word(__hsub2(to_half2(t), low));
  asm("lop3.b32 %0,%1,0x00f000f0,0x64006400,0xea;" : "=r"(t) : "r"(q8));
  a[3] = to_word(__hfma2(to_half2(t), sixteenth, high));
}
