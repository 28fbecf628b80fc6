// Decode step of one token as one persistent kernel, second design. Llama-2-7B shape, int4 g128 symmetric.
// Producer thread streams weight units (16 rows x up to 32 groups) through a ring; 16 consumer warps split K (2 groups
// each), tensor cores (m16n8k16), partial sums meet in shared memory; vectors travel between multiprocessors as data
// that is its own flag (sentinel words).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <vector>
#define CK(x)                                                                                                          \
  do {                                                                                                                 \
    cudaError_t e = (x);                                                                                               \
    if (e != cudaSuccess) {                                                                                            \
      printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e));                                                 \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)
constexpr int WARPS = 16, THREADS = WARPS * 32, ALL = THREADS + 128, H = 4096, I = 11008, HEADS = 32, SPLIT = 4,
              MAXU = 12;
#ifndef HINT
#define HINT "evict_first"
#endif
#ifndef INFLIGHT
#define INFLIGHT 2
#endif
#ifndef SLOTS
#define SLOTS 5
#endif
constexpr int TILE = 64; // tokens of keys and values in a slot
__host__ __device__ constexpr int NU(int j) { return j == 0 ? 3 * H / 16 : j == 2 ? 2 * I / 16 : H / 16; } // units
__host__ __device__ constexpr int NG(int j) { return j == 3 ? I / 128 : H / 128; }                         // groups
constexpr int GB = 1056, UNIT = 32 * GB; // bytes of a group of 16 rows: 1024 of codes, 32 of scales
struct Layer {
  const char *w[4];
  const half *g1, *g2;
  half *k, *v;
};
constexpr int QKV = 0, ATT = QKV + 3 * H / 2, LSE = ATT + HEADS * SPLIT * 64, OB = LSE + HEADS * SPLIT,
              ACT = OB + H / 2, DB = ACT + I / 2, BOXES = DB + H / 2; // words of one parity
struct Args {
  const Layer *layers;
  int n, ctx, mode;
  unsigned *boxes;
  const half *x0, *cs, *sn;
  half *out;
  long long *st;
};
enum { NOWAIT = 1, NOATT = 2, STREAM = 4, NOSTAGE = 8, NOSTREAM = 16 };
constexpr int NS = 14;
__device__ __forceinline__ half2 u2h(unsigned u) { return *reinterpret_cast<half2 *>(&u); }
__device__ __forceinline__ unsigned h2u(half2 h) { return *reinterpret_cast<unsigned *>(&h); }
__device__ __forceinline__ unsigned smem(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void wait(uint64_t *m, int ph) {
  asm volatile(
      "{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @p bra D; bra W; D:}" ::"r"(smem(m)),
      "r"(ph)
      : "memory");
}
__device__ __forceinline__ void arrive(uint64_t *m) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(smem(m)) : "memory");
}
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1,512;" ::: "memory"); }
constexpr unsigned EMPTY = 0xffffffffu;
__device__ __forceinline__ uint4 load4(const unsigned *p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load2(const unsigned *p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ unsigned load1(const unsigned *p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store1(unsigned *p, unsigned v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ bool missing(uint4 v) {
  return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY;
}
// One lane looks at one word until it is there: what all lanes ask for meanwhile would take the stream's place in L2.
__device__ __forceinline__ void hint(const unsigned *p, int mode) {
  if (!(mode & NOWAIT)) {
    if ((threadIdx.x & 31) == 0) {
      int n = 0;
      while (load1(p) == EMPTY)
        if (++n > 1 << 20) __trap();
    }
    __syncwarp();
  }
}
__device__ __forceinline__ uint4 poll4(const unsigned *p, int mode) {
  uint4 v = load4(p);
  if (!(mode & NOWAIT)) {
    int n = 0;
    while (missing(v)) {
      v = load4(p);
      if (++n > 1 << 20) __trap();
    }
  }
  return v;
}
__device__ __forceinline__ uint2 poll2(const unsigned *p, int mode) {
  uint2 v = load2(p);
  if (!(mode & NOWAIT)) {
    int n = 0;
    while (v.x == EMPTY || v.y == EMPTY) {
      v = load2(p);
      if (++n > 1 << 20) __trap();
    }
  }
  return v;
}
__device__ __forceinline__ unsigned poll1(const unsigned *p, int mode) {
  unsigned v = load1(p);
  if (!(mode & NOWAIT)) {
    int n = 0;
    while (v == EMPTY) {
      v = load1(p);
      if (++n > 1 << 20) __trap();
    }
  }
  return v;
}
__device__ __forceinline__ void mma(float *c, const unsigned *a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void dequant(unsigned q, unsigned *a) {
  const half2 c1 = __float2half2_rn(1032.f), c16 = __float2half2_rn(1.f / 16), cb = __float2half2_rn(-72.f);
  unsigned q8 = q >> 8, t;
  asm("lop3.b32 %0,%1,0x000f000f,0x64006400,0xea;" : "=r"(t) : "r"(q));
  a[0] = h2u(__hsub2(u2h(t), c1));
  asm("lop3.b32 %0,%1,0x00f000f0,0x64006400,0xea;" : "=r"(t) : "r"(q));
  a[1] = h2u(__hfma2(u2h(t), c16, cb));
  asm("lop3.b32 %0,%1,0x000f000f,0x64006400,0xea;" : "=r"(t) : "r"(q8));
  a[2] = h2u(__hsub2(u2h(t), c1));
  asm("lop3.b32 %0,%1,0x00f000f0,0x64006400,0xea;" : "=r"(t) : "r"(q8));
  a[3] = h2u(__hfma2(u2h(t), c16, cb));
}
struct Ring {
  char *base;
  uint64_t *full, *empty;
  int slot, ph;
  __device__ void next() {
    if (++slot == SLOTS) {
      slot = 0;
      ph ^= 1;
    }
  }
};
// One chunk of a linear: this warp's two groups of every unit of this multiprocessor; sums go (or are added) to
// red[unit][warp][16].
__device__ __forceinline__ void fetch(const Ring &r, int warp, int lane, uint4 *q, unsigned *sc) {
  const char *at = r.base + (size_t)r.slot * UNIT + 2 * warp * GB;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint4 *w = reinterpret_cast<const uint4 *>(at + i * GB);
    q[2 * i] = w[lane];
    q[2 * i + 1] = w[32 + lane];
    sc[i] = *reinterpret_cast<const unsigned *>(at + i * GB + 1024 + (lane / 4) * 4);
  }
}
template <int J, int C>
__device__ __forceinline__ void chunk(const half *xs, float *red, Ring &r, int warp, int lane, int mode) {
  constexpr int here = NG(J) - 32 * C < 32 ? NG(J) - 32 * C : 32;
  bool have = 2 * warp < here;
  static_assert(here % 2 == 0, "");
  if (mode & NOSTREAM) return;
  if (!have || (mode & STREAM)) {
    for (int g = blockIdx.x; g < NU(J); g += gridDim.x) {
      wait(r.full + r.slot, r.ph);
      __syncwarp();
      if (lane == 0) arrive(r.empty + r.slot);
      r.next();
    }
    if (!C && !have) {}
    return;
  }
  const uint4 *xb = reinterpret_cast<const uint4 *>(xs) + 4 * (lane % 4); // all eight columns hold the same x
  float *t = red + warp * 16 + lane / 4;
  uint4 q[4];
  unsigned sc[2];
  int g = blockIdx.x;
  wait(r.full + r.slot, r.ph);
  fetch(r, warp, lane, q, sc);
  __syncwarp();
  if (lane == 0) arrive(r.empty + r.slot);
  r.next();
  while (true) {
    bool more = g + gridDim.x < NU(J);
    float p[4] = {0, 0, 0, 0}, z[4] = {0, 0, 0, 0};
    unsigned a[4];
    float2 f0 = __half22float2(u2h(sc[0])), f1 = __half22float2(u2h(sc[1]));
    uint4 n[4];
    if (more) wait(r.full + r.slot, r.ph);
    if (more) fetch(r, warp, lane, n, sc);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      uint4 x0 = xb[2 * j], x1 = xb[2 * j + 1], y0 = xb[16 + 2 * j], y1 = xb[16 + 2 * j + 1];
      uint4 w = q[j], v = q[2 + j];
      dequant(w.x, a);
      mma(p, a, x0.x, x0.y);
      dequant(v.x, a);
      mma(z, a, y0.x, y0.y);
      dequant(w.y, a);
      mma(p, a, x0.z, x0.w);
      dequant(v.y, a);
      mma(z, a, y0.z, y0.w);
      dequant(w.z, a);
      mma(p, a, x1.x, x1.y);
      dequant(v.z, a);
      mma(z, a, y1.x, y1.y);
      dequant(w.w, a);
      mma(p, a, x1.z, x1.w);
      dequant(v.w, a);
      mma(z, a, y1.z, y1.w);
    }
    if (more) {
      __syncwarp();
      if (lane == 0) arrive(r.empty + r.slot);
      r.next();
    }
    float s0 = f0.x * p[0] + f1.x * z[0], s2 = f0.y * p[2] + f1.y * z[2];
    if (lane % 4 == 0) {
      if (C) {
        t[0] += s0;
        t[8] += s2;
      } else {
        t[0] = s0;
        t[8] = s2;
      }
    }
    if (!more) break;
    t += WARPS * 16;
    g += gridDim.x;
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] = n[i];
  }
}
// Sum over warps; thread t holds row t%16 of unit t/16 of this multiprocessor.
__device__ __forceinline__ float gather(const float *red, int t) {
  float s = 0;
  const float *p = red + (t / 16) * WARPS * 16 + t % 16;
#pragma unroll
  for (int w = 0; w < WARPS; w++) s += p[w * 16];
  return s;
}
__device__ __forceinline__ void publish(unsigned *box, unsigned *other, int word, float v,
                                        bool act) { // pairs of neighbours make a word
  float w = __shfl_down_sync(~0u, v, 1);
  if (act && !(threadIdx.x & 1)) {
    store1(box + word, h2u(__floats2half2_rn(v, w)));
    store1(other + word, EMPTY);
  }
}
__device__ __forceinline__ void store_x(half *xs, int lane, const float *x) {
  uint4 t = {h2u(__floats2half2_rn(x[0], x[1])), h2u(__floats2half2_rn(x[2], x[3])), h2u(__floats2half2_rn(x[4], x[5])),
             h2u(__floats2half2_rn(x[6], x[7]))};
  *reinterpret_cast<uint4 *>(xs + 8 * lane) = t;
  __syncwarp();
}
__device__ __forceinline__ void unpack(uint4 t, float *f) {
  float2 a = __half22float2(u2h(t.x)), b = __half22float2(u2h(t.y)), c = __half22float2(u2h(t.z)),
         d = __half22float2(u2h(t.w));
  f[0] = a.x;
  f[1] = a.y;
  f[2] = b.x;
  f[3] = b.y;
  f[4] = c.x;
  f[5] = c.y;
  f[6] = d.x;
  f[7] = d.y;
}
__device__ __forceinline__ void norm(float *res, const unsigned *box, bool add, const half *g, uint64_t *gfull,
                                     uint64_t *gempty, int gph, half *xs, float *ssq, int warp, int lane, int mode) {
  wait(gfull, gph);
  uint4 gw = *reinterpret_cast<const uint4 *>(g + warp * 256 + 8 * lane);
  __syncwarp();
  if (lane == 0) arrive(gempty);
  float y[8], gf[8];
  unpack(gw, gf);
  if (add) {
    hint(box + (warp * 256 + 254) / 2, mode);
    unpack(poll4(box + (warp * 256 + 8 * lane) / 2, mode), y);
#pragma unroll
    for (int i = 0; i < 8; i++) res[i] = __half2float(__float2half_rn(res[i] + y[i]));
  }
  float s = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) s += res[i] * res[i];
#pragma unroll
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (lane == 0) ssq[warp] = s;
  sync_consumers();
  s = ssq[lane & 15];
#pragma unroll
  for (int o = 8; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  float q = rsqrtf(s / H + 1e-5f);
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = __half2float(__float2half_rn(res[i] * q)) * gf[i];
  store_x(xs, lane, y);
}
template <bool STAMP> __global__ void __launch_bounds__(ALL, 1) step(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) char sm[];
  char *ring = sm;
  half *gs = (half *)(sm + SLOTS * UNIT);
  half *xsa = gs + 2 * H;
  float *red0 = (float *)(xsa + WARPS * 256);
  float *acc = red0 + 2 * MAXU * WARPS * 16;
  float *ssq = acc + WARPS * 132;
  Layer *Ls = (Layer *)(ssq + 64);
  uint64_t *full = (uint64_t *)(Ls + 32);
  uint64_t *empty = full + SLOTS;
  uint64_t *gfull = empty + SLOTS;
  uint64_t *gempty = gfull + 2;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, G = gridDim.x, mode = a.mode;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(smem(full + i)));
      asm volatile("mbarrier.init.shared::cta.b64 [%0],16;" ::"r"(smem(empty + i)));
    }
    for (int i = 0; i < 2; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(smem(gfull + i)));
      asm volatile("mbarrier.init.shared::cta.b64 [%0],16;" ::"r"(smem(gempty + i)));
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  for (int i = threadIdx.x; i < a.n * (int)(sizeof(Layer) / 8); i += ALL)
    ((uint64_t *)Ls)[i] = ((const uint64_t *)a.layers)[i];
  __syncthreads();
  const bool att = !(mode & NOATT) && blockIdx.x < HEADS * SPLIT;
  const int h = blockIdx.x / SPLIT, sp = blockIdx.x % SPLIT, old = a.ctx - 1, lo = sp * old / SPLIT,
            hi = (sp + 1) * old / SPLIT; // tokens before the newest
  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == WARPS) {
      int slot = 0, ph = 0, gph = 1;
      uint64_t pol;
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(pol));
      auto bulk = [&](void *to, const void *from, int bytes, uint64_t *bar) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::
                "r"(smem(to)),
            "l"(from), "r"(bytes), "r"(smem(bar)), "l"(pol)
            : "memory");
      };
      auto expect = [&](uint64_t *bar, int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(smem(bar)), "r"(bytes) : "memory");
      };
      auto gain = [&](int i, const half *g) {
        if (lane == 0) {
          wait(gempty + i, gph);
          expect(gfull + i, 2 * H);
          bulk(gs + i * H, g, 2 * H, gfull + i);
        }
      };
      auto weights = [&](int j, const char *w) {
        if (lane == 0 && !(mode & NOSTREAM))
          for (int c = 0; 32 * c < NG(j); c++) {
            int bytes = min(32, NG(j) - 32 * c) * GB;
            for (int g = blockIdx.x; g < NU(j); g += G) {
              wait(empty + slot, ph ^ 1);
              expect(full + slot, bytes);
              bulk(ring + (size_t)slot * UNIT, w + ((size_t)g * NG(j) + 32 * c) * GB, bytes, full + slot);
              if (++slot == SLOTS) {
                slot = 0;
                ph ^= 1;
              }
            }
          }
        slot = __shfl_sync(~0u, slot, 0);
        ph = __shfl_sync(~0u, ph, 0);
      };
      for (int l = 0; l < a.n; l++) {
        const Layer &L = Ls[l];
        gain(0, L.g1);
        weights(0, L.w[0]);
        if (att)
          for (int j = lo; j < hi; j += TILE) {
            int n = min(TILE, hi - j);
            wait(empty + slot, ph ^ 1);
            if (lane == 0) expect(full + slot, n * 512);
            __syncwarp();
            for (int i = lane; i < n; i += 32) {
              bulk(ring + (size_t)slot * UNIT + i * 256, L.k + ((size_t)(j + i) * HEADS + h) * 128, 256, full + slot);
              bulk(ring + (size_t)slot * UNIT + TILE * 256 + i * 256, L.v + ((size_t)(j + i) * HEADS + h) * 128, 256,
                   full + slot);
            }
            if (++slot == SLOTS) {
              slot = 0;
              ph ^= 1;
            }
          }
        weights(1, L.w[1]);
        gain(1, L.g2);
        weights(2, L.w[2]);
        weights(3, L.w[3]);
        gph ^= 1;
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
  Ring r{ring, full, empty, 0, 0};
  half *xs = xsa + warp * 256;
  uint2 cw = *(const uint2 *)(a.cs + (size_t)old * 128 + lane * 4),
        sw = *(const uint2 *)(a.sn + (size_t)old * 128 + lane * 4);
  float res[8];
  unpack(*reinterpret_cast<const uint4 *>(a.x0 + warp * 256 + 8 * lane), res);
  const int t = threadIdx.x;
  float *rA = red0;
  float *rB = red0 + MAXU * WARPS * 16;
#define MARK(i)                                                                                                        \
  if (STAMP && threadIdx.x == 0) a.st[((size_t)l * NS + i) * gridDim.x + blockIdx.x] = clock64();
  for (int l = 0; l < a.n; l++) {
    const Layer &L = Ls[l];
    unsigned *B = a.boxes + (l & 1) * BOXES, *O = a.boxes + ((l & 1) ^ 1) * BOXES;
    const int gph = l & 1;
    MARK(0) norm(res, O + DB, l > 0, gs, gfull, gempty, gph, xs, ssq, warp, lane, mode);
    MARK(1) chunk<0, 0>(xs, rA, r, warp, lane, mode);
    MARK(2) sync_consumers();
    {
      int u = t / 16, g = blockIdx.x + u * G;
      bool on = u < MAXU && g < NU(0);
      float v = on ? gather(rA, t) : 0;
      publish(B + QKV, O + QKV, (g * 16 + t % 16) / 2, v, on);
    }
    MARK(3)
    if (att) {
      auto rope = [&](uint2 w, float *f) {
        float2 c0 = __half22float2(u2h(cw.x)), c1 = __half22float2(u2h(cw.y)), s0 = __half22float2(u2h(sw.x)),
               s1 = __half22float2(u2h(sw.y));
        float2 x0 = __half22float2(u2h(w.x)), x1 = __half22float2(u2h(w.y));
        float v[4] = {x0.x, x0.y, x1.x, x1.y}, cc[4] = {c0.x, c0.y, c1.x, c1.y}, ss[4] = {s0.x, s0.y, s1.x, s1.y};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float p = __shfl_xor_sync(~0u, v[e], 16);
          f[e] = v[e] * cc[e] + (lane < 16 ? -p : p) * ss[e];
        }
      };
      hint(B + QKV + (h * 128 + 126) / 2, mode);
      bool mine = sp == SPLIT - 1 && warp == WARPS - 1;
      uint2 kn, vn;
      if (mine) {
        kn = load2(B + QKV + (H + h * 128 + lane * 4) / 2);
        vn = load2(B + QKV + (2 * H + h * 128 + lane * 4) / 2);
      }
      float q[4], o[4] = {0, 0, 0, 0}, mx = -1e30f, sum = 0;
      rope(poll2(B + QKV + (h * 128 + lane * 4) / 2, mode), q);
#pragma unroll
      for (int e = 0; e < 4; e++) q[e] = __half2float(__float2half_rn(q[e])) * 0.088388348f;
      MARK(4)
      for (int j = lo; j < hi; j += TILE) {
        int n = min(TILE, hi - j);
        wait(r.full + r.slot, r.ph);
        const char *at = r.base + (size_t)r.slot * UNIT + warp * 256 + lane * 8;
        float d[4];
        uint2 vv[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          uint2 kk = make_uint2(0, 0);
          vv[i] = kk;
          if (warp + i * WARPS < n) {
            kk = *(const uint2 *)(at + i * WARPS * 256);
            vv[i] = *(const uint2 *)(at + TILE * 256 + i * WARPS * 256);
          }
          float2 k0 = __half22float2(u2h(kk.x)), k1 = __half22float2(u2h(kk.y));
          d[i] = q[0] * k0.x + q[1] * k0.y + q[2] * k1.x + q[3] * k1.y;
        }
        __syncwarp();
        if (lane == 0) arrive(r.empty + r.slot);
        r.next();
#pragma unroll
        for (int s = 16; s; s >>= 1)
#pragma unroll
          for (int i = 0; i < 4; i++) d[i] += __shfl_xor_sync(~0u, d[i], s);
        float nm = mx;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (warp + i * WARPS >= n) d[i] = -1e30f;
          nm = fmaxf(nm, d[i]);
        }
        float c = __expf(mx - nm);
        mx = nm;
        sum *= c;
#pragma unroll
        for (int e = 0; e < 4; e++) o[e] *= c;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float p = warp + i * WARPS < n ? __expf(d[i] - mx) : 0.f;
          float2 v0 = __half22float2(u2h(vv[i].x)), v1 = __half22float2(u2h(vv[i].y));
          sum += p;
          o[0] += p * v0.x;
          o[1] += p * v0.y;
          o[2] += p * v1.x;
          o[3] += p * v1.y;
        }
      }
      if (mine) {
        float kf[4];
        if (kn.x == EMPTY || kn.y == EMPTY) kn = poll2(B + QKV + (H + h * 128 + lane * 4) / 2, mode);
        rope(kn, kf);
        uint2 kw = {h2u(__floats2half2_rn(kf[0], kf[1])), h2u(__floats2half2_rn(kf[2], kf[3]))};
        if (vn.x == EMPTY || vn.y == EMPTY) vn = poll2(B + QKV + (2 * H + h * 128 + lane * 4) / 2, mode);
        *(uint2 *)(L.k + ((size_t)old * HEADS + h) * 128 + lane * 4) = kw;
        *(uint2 *)(L.v + ((size_t)old * HEADS + h) * 128 + lane * 4) = vn;
        float2 k0 = __half22float2(u2h(kw.x)), k1 = __half22float2(u2h(kw.y)), v0 = __half22float2(u2h(vn.x)),
               v1 = __half22float2(u2h(vn.y));
        float d = q[0] * k0.x + q[1] * k0.y + q[2] * k1.x + q[3] * k1.y;
#pragma unroll
        for (int s = 16; s; s >>= 1) d += __shfl_xor_sync(~0u, d, s);
        float nm = fmaxf(mx, d), c = __expf(mx - nm), p = __expf(d - nm);
        sum = sum * c + p;
        mx = nm;
        o[0] = o[0] * c + p * v0.x;
        o[1] = o[1] * c + p * v0.y;
        o[2] = o[2] * c + p * v1.x;
        o[3] = o[3] * c + p * v1.y;
      }
      *reinterpret_cast<float4 *>(acc + warp * 132 + lane * 4) = make_float4(o[0], o[1], o[2], o[3]);
      if (lane == 0) {
        acc[warp * 132 + 128] = mx;
        acc[warp * 132 + 129] = sum;
      }
      sync_consumers();
      if (t < 128) {
        float m = acc[(lane & 15) * 132 + 128], z = acc[(lane & 15) * 132 + 129], mm = m, v = 0;
#pragma unroll
        for (int s = 8; s; s >>= 1) mm = fmaxf(mm, __shfl_xor_sync(~0u, mm, s));
        float c = __expf(m - mm);
        z *= c;
#pragma unroll
        for (int s = 8; s; s >>= 1) z += __shfl_xor_sync(~0u, z, s);
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += __shfl_sync(~0u, c, w) * acc[w * 132 + t];
        publish(B + ATT, O + ATT, (blockIdx.x * 128 + t) / 2, v / z, true);
        if (t == 0) {
          store1(B + LSE + blockIdx.x, __float_as_uint(mm + __logf(z)));
          store1(O + LSE + blockIdx.x, EMPTY);
        }
      }
    }
    MARK(5)
    if (!(mode & (NOATT | NOSTAGE))) {
      int hh = 2 * warp + lane / 16, e = (lane % 16) * 8;
      if (!(mode & NOWAIT))
        for (int n = 0;;) {
          unsigned f = lane < 8 ? load1(B + LSE + 2 * warp * SPLIT + lane) : 0u;
          if (!__any_sync(~0u, f == EMPTY)) break;
          if (++n > 1 << 20) __trap();
        }
      float w[SPLIT], m = -1e30f, z = 0, x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      uint4 p[SPLIT], ls = load4(B + LSE + hh * SPLIT);
      static_assert(SPLIT == 4, "");
#pragma unroll
      for (int s = 0; s < SPLIT; s++) p[s] = load4(B + ATT + ((hh * SPLIT + s) * 128 + e) / 2);
      if (!(mode & NOWAIT))
        for (int n = 0;;) {
          bool again = missing(ls);
          if (again) ls = load4(B + LSE + hh * SPLIT);
#pragma unroll
          for (int s = 0; s < SPLIT; s++)
            if (missing(p[s])) {
              p[s] = load4(B + ATT + ((hh * SPLIT + s) * 128 + e) / 2);
              again = true;
            }
          if (!again) break;
          if (++n > 1 << 20) __trap();
        }
      w[0] = __uint_as_float(ls.x);
      w[1] = __uint_as_float(ls.y);
      w[2] = __uint_as_float(ls.z);
      w[3] = __uint_as_float(ls.w);
#pragma unroll
      for (int s = 0; s < SPLIT; s++) m = fmaxf(m, w[s]);
#pragma unroll
      for (int s = 0; s < SPLIT; s++) {
        w[s] = __expf(w[s] - m);
        z += w[s];
      }
#pragma unroll
      for (int s = 0; s < SPLIT; s++) {
        float f[8];
        unpack(p[s], f);
        float c = w[s] / z;
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += c * f[i];
      }
      store_x(xs, lane, x);
    }
    MARK(6) chunk<1, 0>(xs, rB, r, warp, lane, mode);
    MARK(7) sync_consumers();
    {
      int u = t / 16, g = blockIdx.x + u * G;
      bool on = u < MAXU && g < NU(1);
      float v = on ? gather(rB, t) : 0;
      publish(B + OB, O + OB, (g * 16 + t % 16) / 2, v, on);
    }
    MARK(8)
    norm(res, B + OB, true, gs + H, gfull + 1, gempty + 1, gph, xs, ssq + 32, warp, lane, mode);
    MARK(9) chunk<2, 0>(xs, rA, r, warp, lane, mode);
    MARK(10) sync_consumers();
    {
      int u = t / 16, g = blockIdx.x + u * G;
      bool on = u < MAXU && g < NU(2);
      float v = on ? __half2float(__float2half_rn(gather(rA, t))) : 0;
      float up = __shfl_down_sync(~0u, v, 8);
      v = __half2float(__float2half_rn(v / (1 + __expf(-v)))) * up;
      publish(B + ACT, O + ACT, (g * 8 + t % 16) / 2, v, on && t % 16 < 8);
    }
    MARK(11) {
      uint4 p[3];
      hint(B + ACT + (warp * 256 + 254) / 2, mode);
      hint(B + ACT + (4096 + warp * 256 + 254) / 2, mode);
#pragma unroll
      for (int c = 0; c < 3; c++) {
        int k = c * 4096 + warp * 256 + 8 * lane;
        p[c] = k < I ? load4(B + ACT + k / 2) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int c = 0; c < 3; c++) {
        int k = c * 4096 + warp * 256 + 8 * lane;
        if (!(mode & (NOWAIT)))
          for (int n = 0; missing(p[c]);) {
            if (++n > 1 << 20) __trap();
            p[c] = load4(B + ACT + k / 2);
          }
        __syncwarp();
        *reinterpret_cast<uint4 *>(xs + 8 * lane) = p[c];
        __syncwarp();
        if (c == 0) chunk<3, 0>(xs, rB, r, warp, lane, mode);
        else if (c == 1) chunk<3, 1>(xs, rB, r, warp, lane, mode);
        else chunk<3, 2>(xs, rB, r, warp, lane, mode);
      }
    }
    MARK(12) sync_consumers();
    {
      int u = t / 16, g = blockIdx.x + u * G;
      bool on = u < MAXU && g < NU(3);
      float v = on ? gather(rB, t) : 0;
      publish(B + DB, O + DB, (g * 16 + t % 16) / 2, v, on);
    }
  }
  if (blockIdx.x == 0) {
    float y[8];
    unpack(poll4(a.boxes + ((a.n - 1) & 1) * BOXES + DB + (warp * 256 + 8 * lane) / 2, mode), y);
    for (int i = 0; i < 8; i++) a.out[warp * 256 + 8 * lane + i] = __float2half_rn(res[i] + y[i]);
  }
}
static float rnd() { return rand() / (float)RAND_MAX * 2 - 1; }
int main(int argc, char **argv) {
  setvbuf(stdout, 0, _IOLBF, 0);
  cudaDeviceProp p;
  CK(cudaGetDeviceProperties(&p, 0));
  int G = p.multiProcessorCount;
  printf("%s %d SMs, %d slots\n", p.name, G, SLOTS);
  const int LAYERS = 32, CTX = 300;
  int K[4] = {H, H, H, I}, N[4] = {3 * H, H, 2 * I, H};
  std::vector<Layer> L(LAYERS);
  size_t useful = 0;
  srand(1);
  // codes and scales of layers 0 and 1 by [row][k]; the others repeat them
  std::vector<std::vector<uint8_t>> code(8);
  std::vector<std::vector<half>> scale(8);
  std::vector<std::vector<char>> packed(8);
  for (int x = 0; x < 8; x++) {
    int j = x % 4;
    code[x].resize((size_t)N[j] * K[j]);
    for (auto &v : code[x]) v = (rand() >> 8) & 15;
    scale[x].resize((size_t)N[j] * K[j] / 128);
    for (auto &s : scale[x]) s = __float2half(0.004f + 0.002f * rnd());
    int units = N[j] / 16, groups = K[j] / 128;
    packed[x].assign((size_t)units * groups * GB, 0);
    for (int u = 0; u < units; u++)
      for (int g = 0; g < groups; g++) {
        char *b = packed[x].data() + ((size_t)u * groups + g) * GB;
        auto row = [&](int r) { return j == 2 ? (r < 8 ? u * 8 + r : I + u * 8 + r - 8) : u * 16 + r; };
        for (int tile = 0; tile < 8; tile++)
          for (int l = 0; l < 32; l++) {
            int r = l / 4, q = l % 4;
            unsigned w = 0;
            for (int f = 0; f < 4; f++)
              for (int e = 0; e < 2; e++) {
                int rr = r + (f & 1) * 8, k = g * 128 + 32 * q + 4 * tile + (f >> 1) * 2 + e;
                unsigned v = code[x][(size_t)row(rr) * K[j] + k];
                int nib = f + 4 * e;
                w |= v << (4 * nib);
              }
            ((unsigned *)b)[((tile / 4) * 32 + l) * 4 + tile % 4] = w;
          }
        half *s = (half *)(b + 1024);
        for (int r = 0; r < 8; r++) {
          s[2 * r] = scale[x][(size_t)row(r) * groups + g];
          s[2 * r + 1] = scale[x][(size_t)row(r + 8) * groups + g];
        }
      }
  }
  std::vector<half> hk((size_t)CTX * H), hv((size_t)CTX * H), g1(H), g2(H);
  for (auto &v : hk) v = __float2half(rnd());
  for (auto &v : hv) v = __float2half(rnd());
  for (auto &v : g1) v = __float2half(1 + 0.3f * rnd());
  for (auto &v : g2) v = __float2half(1 + 0.3f * rnd());
  auto up = [&](const void *src, size_t n) {
    char *d;
    CK(cudaMalloc(&d, n));
    CK(cudaMemcpy(d, src, n, cudaMemcpyHostToDevice));
    return d;
  };
  for (int l = 0; l < LAYERS; l++) {
    for (int j = 0; j < 4; j++) {
      auto &pk = packed[(l & 1) * 4 + j];
      L[l].w[j] = up(pk.data(), pk.size());
      useful += (size_t)K[j] * N[j] / 2 + (size_t)K[j] / 128 * N[j] * 2;
    }
    L[l].g1 = (half *)up(g1.data(), H * 2);
    L[l].g2 = (half *)up(g2.data(), H * 2);
    L[l].k = (half *)up(hk.data(), hk.size() * 2);
    L[l].v = (half *)up(hv.data(), hv.size() * 2);
    useful += (size_t)CTX * H * 4;
  }
  Args a;
  a.layers = (Layer *)up(L.data(), sizeof(Layer) * LAYERS);
  a.ctx = CTX;
  size_t total = BOXES;
  unsigned *boxes;
  CK(cudaMalloc(&boxes, 2 * total * 4));
  a.boxes = boxes;
  std::vector<half> x0(H), cs((size_t)CTX * 128), sn((size_t)CTX * 128);
  for (auto &v : x0) v = __float2half(rnd());
  for (int i = 0; i < CTX; i++)
    for (int e = 0; e < 128; e++) {
      double an = i * pow(10000., -2. * (e % 64) / 128);
      cs[i * 128 + e] = __float2half(cos(an));
      sn[i * 128 + e] = __float2half(sin(an));
    }
  a.x0 = (half *)up(x0.data(), H * 2);
  a.cs = (half *)up(cs.data(), cs.size() * 2);
  a.sn = (half *)up(sn.data(), sn.size() * 2);
  CK(cudaMalloc(&a.out, H * 2));
  CK(cudaMalloc(&a.st, (size_t)LAYERS * 14 * G * 8));
  int sb = SLOTS * UNIT + 2 * H * 2 + WARPS * 512 + 2 * MAXU * WARPS * 16 * 4 + WARPS * 132 * 4 + 64 * 4 +
           32 * sizeof(Layer) + (2 * SLOTS + 4) * 8;
  printf("shared memory %d\n", sb);
  CK(cudaFuncSetAttribute(step<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, sb));
  CK(cudaFuncSetAttribute(step<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, sb));
  auto launch = [&](bool stamp = false) {
    void *args[] = {&a};
    CK(cudaLaunchCooperativeKernel(stamp ? (void *)step<true> : (void *)step<false>, G, ALL, args, sb, 0));
  };
  auto clear = [&]() { CK(cudaMemset(boxes, 0xff, 2 * total * 4)); };
  { // two layers against float64, twice, to see that boxes are empty again
    auto lin = [&](int x, const std::vector<float> &v) {
      int j = x % 4;
      std::vector<float> y(N[j]);
      for (int n = 0; n < N[j]; n++) {
        double s = 0;
        for (int g = 0; g < K[j] / 128; g++) {
          double q = 0;
          for (int k = 0; k < 128; k++) q += (code[x][(size_t)n * K[j] + g * 128 + k] - 8) * (double)v[g * 128 + k];
          s += q * (double)__half2float(scale[x][(size_t)n * (K[j] / 128) + g]);
        }
        y[n] = s;
      }
      return y;
    };
    auto norm = [&](const std::vector<float> &x, const std::vector<half> &g) {
      double s = 0;
      for (float v : x) s += (double)v * v;
      float r = 1 / sqrt(s / H + 1e-5);
      std::vector<float> y(H);
      for (int i = 0; i < H; i++) y[i] = x[i] * r * __half2float(g[i]);
      return y;
    };
    std::vector<float> x(H);
    for (int i = 0; i < H; i++) x[i] = __half2float(x0[i]);
    for (int l = 0; l < 2; l++) {
      auto qkv = lin(4 * l, norm(x, g1));
      std::vector<float> o(H);
      auto rope = [&](float *q) {
        float t[128];
        for (int e = 0; e < 128; e++)
          t[e] = q[e] * __half2float(cs[(CTX - 1) * 128 + e]) +
                 (e < 64 ? -q[e + 64] : q[e - 64]) * __half2float(sn[(CTX - 1) * 128 + e]);
        for (int e = 0; e < 128; e++) q[e] = t[e];
      };
      for (int h = 0; h < HEADS; h++) {
        rope(&qkv[h * 128]);
        rope(&qkv[H + h * 128]);
        std::vector<double> s(CTX);
        double m = -1e30;
        for (int j = 0; j < CTX; j++) {
          double d = 0;
          for (int e = 0; e < 128; e++)
            d += qkv[h * 128 + e] * 0.088388348 *
                 (j == CTX - 1 ? qkv[H + h * 128 + e] : __half2float(hk[((size_t)j * HEADS + h) * 128 + e]));
          s[j] = d;
          m = std::max(m, d);
        }
        double z = 0;
        for (auto &v : s) {
          v = exp(v - m);
          z += v;
        }
        for (int e = 0; e < 128; e++) {
          double t = 0;
          for (int j = 0; j < CTX; j++)
            t += s[j] * (j == CTX - 1 ? qkv[2 * H + h * 128 + e] : __half2float(hv[((size_t)j * HEADS + h) * 128 + e]));
          o[h * 128 + e] = t / z;
        }
      }
      auto y = lin(4 * l + 1, o);
      for (int i = 0; i < H; i++) x[i] += y[i];
      auto gu = lin(4 * l + 2, norm(x, g2));
      std::vector<float> m(I);
      for (int i = 0; i < I; i++) m[i] = gu[i] / (1 + exp(-gu[i])) * gu[I + i];
      auto d = lin(4 * l + 3, m);
      for (int i = 0; i < H; i++) x[i] += d[i];
    }
    clear();
    a.n = 2;
    a.mode = 0;
    std::vector<half> got(H), again(H);
    for (int rep = 0; rep < 3; rep++) {
      launch();
      CK(cudaDeviceSynchronize());
      CK(cudaMemcpy((rep ? again : got).data(), a.out, H * 2, cudaMemcpyDeviceToHost));
      if (rep) {
        bool same = !memcmp(got.data(), again.data(), H * 2);
        printf("repeat %d: %s\n", rep, same ? "same bits" : "DIFFERS");
      }
    }
    double e = 0, t = 0;
    for (int i = 0; i < H; i++) {
      e += pow(x[i] - __half2float(got[i]), 2);
      t += (double)x[i] * x[i];
    }
    printf("two layers: relative error %.2e (rms %.3g)\n", sqrt(e / t), sqrt(t / H));
  }
  a.n = LAYERS;
  cudaEvent_t e0, e1;
  cudaEventCreate(&e0);
  cudaEventCreate(&e1);
  {
    const char *names[] = {
        "norm 1 (poll d)",    "qkv chunk",       "sync",         "publish+prefetch", "poll q",
        "attention",          "poll att (o in)", "o chunk+sync", "publish o",        "norm 2 (poll o)",
        "gate,up chunk+sync", "publish act",     "down",         "sync, publish d"};
    (void)names;
    for (int mode : {0, (int)NOSTREAM}) {
      clear();
      a.mode = mode;
      for (int r = 0; r < 10; r++) {
        if (mode) clear();
        launch(true);
      }
      CK(cudaDeviceSynchronize());
      std::vector<long long> st((size_t)LAYERS * NS * G);
      CK(cudaMemcpy(st.data(), a.st, st.size() * 8, cudaMemcpyDeviceToHost));
      const char *from[] = {"norm 1",    "qkv",    "sync+publish", "wait q",      "attention", "wait att", "o",
                            "publish o", "norm 2", "gate,up",      "publish act", "down",      "publish d"};
      int cut[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
      printf("-- mode %d: cycles a part, mean over blocks and layers 4..27 (min, max of blocks' means)\n", mode);
      double all = 0;
      for (int i = 0; i < 13; i++) {
        double s = 0, lo = 1e18, hi = 0;
        for (int b = 0; b < G; b++) {
          double q = 0;
          int n = 0;
          for (int l = 4; l < 28; l++) {
            long long e = i < 12 ? st[((size_t)l * NS + cut[i] + 1) * G + b] : st[((size_t)(l + 1) * NS) * G + b],
                      f = st[((size_t)l * NS + cut[i]) * G + b];
            if (i == 3 && b >= 128) { e = st[((size_t)l * NS + 5) * G + b]; }
            if (i == 4 && b >= 128) continue;
            q += e - f;
            n++;
          }
          if (n) {
            q /= n;
            s += q;
            lo = std::min(lo, q);
            hi = std::max(hi, q);
          }
        }
        s /= (i == 4 ? 128 : G);
        all += s;
        printf("%-24s %8.0f (%6.0f to %6.0f)\n", from[i], s, lo, hi);
      }
      printf("sum %.0f cycles a layer\n", all);
    }
  }
  struct {
    const char *name;
    int mode;
  } v[] = {{"whole step", 0},
           {"chain without stream", NOSTREAM},
           {"chain without stream, attention", NOSTREAM | NOATT},
           {"no waiting (not valid)", NOWAIT},
           {"no attention", NOATT},
           {"no staging of norms", NOSTAGE},
           {"no waiting, attention, staging", NOWAIT | NOATT | NOSTAGE},
           {"stream alone", STREAM | NOWAIT | NOATT | NOSTAGE},
           {"stream, waiting and attention kept", STREAM},
           {"whole step again", 0}};
  for (auto &q : v) {
    clear();
    a.mode = q.mode;
    std::vector<float> ts;
    for (int r = 0; r < 40; r++) {
      if (q.mode) clear();
      cudaEventRecord(e0);
      launch();
      cudaEventRecord(e1);
      CK(cudaEventSynchronize(e1));
      float ms;
      cudaEventElapsedTime(&ms, e0, e1);
      if (r >= 15) ts.push_back(ms);
    }
    std::sort(ts.begin(), ts.end());
    float t = ts[ts.size() / 2];
    printf("%-36s median %.3f ms (%.3f to %.3f); %.2f TB/s\n", q.name, t, ts[0], ts.back(), useful / t / 1e9);
    fflush(stdout);
  }
  return 0;
}
