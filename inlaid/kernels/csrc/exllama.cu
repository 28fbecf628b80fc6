// The GPTQ kernel of the installed exllamav2 package behind a C interface of two functions.
// inlaid/kernels/exllama.py compiles this file with the package's headers and loads it by ctypes; neither torch nor
// Python is used here. Shapes: x [m, k], out [m, n], codes [k / 8, n] (eight 4-bit codes in a word along k, shuffled),
// zeros [groups, n / 8] (zero points less one, eight in a word along n), scales [groups, n] in half precision.
#include <cstdint>
#include <cuda_fp16.h>
#include "cuda/q_gemm_kernel_gptq.cuh"

namespace {

constexpr int kCodesInWord = 8;

// out[permutation[k], n] = (code[k, n] - zero[g, n]) * scale[g, n] with g = k / group_size; without a permutation row k
// stays row k. The weight lies in the order of its groups; the permutation leads back to the order of x.
// Grid: (n / blockDim.x, k / 8); a thread writes the eight values of one word.
__global__ void dequantize_kernel(const uint32_t* codes, const uint32_t* zeros, const half* scales, half* out, int n_size,
                                  int group_size, const uint16_t* permutation) {
  int n = blockIdx.x * blockDim.x + threadIdx.x;
  int word = blockIdx.y;
  if (n >= n_size) return;
  int k = word * kCodesInWord;
  int group = k / group_size;
  uint32_t zero = (zeros[group * (n_size / 8) + n / 8] >> ((n & 7) * 4)) & 0xf;
  half2 scale = __half2half2(scales[group * n_size + n]);
  half2 z1z16[2], y1y16[2], values[4];
  dequant_4bit_8_prep_zero(zero + 1, z1z16, y1y16);
  dequant_4bit_8_gptq(codes[word * n_size + n], values, z1z16, y1y16, n_size, false);
  for (int j = 0; j < 4; j++) {
    half2 value = __hmul2(values[j], scale);
    int first = permutation ? permutation[k + 2 * j] : k + 2 * j;
    int second = permutation ? permutation[k + 2 * j + 1] : k + 2 * j + 1;
    out[(int64_t)first * n_size + n] = __low2half(value);
    out[(int64_t)second * n_size + n] = __high2half(value);
  }
}

// out[m, n] += x @ W for kRows rows of x in each block; the kernel reads x through the permutation.
template <int kRows>
void launch(const half* x, const uint32_t* codes, const uint32_t* zeros, const half* scales, half* out, int m, int n,
            int k, int groups, int group_size, const uint16_t* permutation, cudaStream_t stream) {
  dim3 grid((n + 4 * GPTQ_BLOCK_KN_SIZE - 1) / (4 * GPTQ_BLOCK_KN_SIZE), (m + kRows - 1) / kRows,
            (k + GPTQ_BLOCK_KN_SIZE - 1) / GPTQ_BLOCK_KN_SIZE);
  gemm_half_q_half_gptq_kernel<kRows, false, false><<<grid, GPTQ_BLOCK_KN_SIZE, 0, stream>>>(
      x, codes, zeros, scales, out, m, n, k, groups, group_size, permutation, k, false, nullptr, 0);
}

}  // namespace

// out = x @ W. Many blocks add into `out` with half-precision atomics: the order of the sums, and so their last bit, may
// differ from run to run. The kernel can clear `out` itself, but that races with blocks that already add: it is cleared
// before the launch instead. Returns a CUDA error code, 0 for none.
extern "C" int inlaid_exllama_gemm(const void* x, const void* codes, const void* zeros, const void* scales, void* out,
                                   int m, int n, int k, int groups, int group_size, const void* permutation,
                                   void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemsetAsync(out, 0, sizeof(half) * (size_t)m * n, s);
  if (error != cudaSuccess) return error;
  auto run = m == 1 ? launch<1> : m == 2 ? launch<2> : m == 3 ? launch<3> : launch<4>;
  run((const half*)x, (const uint32_t*)codes, (const uint32_t*)zeros, (const half*)scales, (half*)out, m, n, k, groups,
      group_size, (const uint16_t*)permutation, s);
  return cudaGetLastError();
}

// out [k, n] = the dequantized weight in half precision, its rows in the order of x. Returns a CUDA error code.
extern "C" int inlaid_exllama_dequantize(const void* codes, const void* zeros, const void* scales, void* out, int n,
                                         int k, int group_size, const void* permutation, void* stream) {
  dim3 grid((n + 127) / 128, k / kCodesInWord);
  dequantize_kernel<<<grid, 128, 0, static_cast<cudaStream_t>(stream)>>>(
      (const uint32_t*)codes, (const uint32_t*)zeros, (const half*)scales, (half*)out, n, group_size,
      (const uint16_t*)permutation);
  return cudaGetLastError();
}
