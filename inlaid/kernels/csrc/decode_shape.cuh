// Sizes of the persistent decode kernel: the model's shape, fixed when the library is compiled, the units in which
// weights are streamed, what lies where in shared memory, and the boxes through which multiprocessors pass vectors.
#pragma once
#include <cstdint>
#include <cuda_fp16.h>

#ifndef INLAID_D  // Llama-2-7B on an H200
#define INLAID_D 4096
#define INLAID_F 11008
#define INLAID_HEADS 32
#define INLAID_KV_HEADS 32
#define INLAID_LAYERS 32
#define INLAID_MAX_RANK 16
#define INLAID_ZEROS 0
#define INLAID_SMS 132
#define INLAID_BLOCK 16
#endif
#ifndef INLAID_FENCES  // 0 only to measure what they cost
#define INLAID_FENCES 1
#endif

constexpr int D = INLAID_D, F = INLAID_F, HEADS = INLAID_HEADS, KV_HEADS = INLAID_KV_HEADS, LAYERS = INLAID_LAYERS,
              MAX_RANK = INLAID_MAX_RANK, SMS = INLAID_SMS, BLOCK = INLAID_BLOCK;  // tokens of a KV block
constexpr bool ZEROS = INLAID_ZEROS;  // zero points differ from 8
constexpr bool FENCES = INLAID_FENCES;
constexpr int C = 128, Q = HEADS * C, KV = KV_HEADS * C, QKV = Q + 2 * KV;

constexpr int WARPS = 16, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 128;
constexpr int SPAN = 256, CHUNK = WARPS * SPAN;  // inputs of a warp, and of all warps, at a time
constexpr int GROUP_BYTES = 1056 + (ZEROS ? 32 : 0);  // 16 outputs x 128 inputs: codes, scales, zero points
constexpr int UNIT = 32 * GROUP_BYTES;                // bytes of a slot of the ring
constexpr int SHARED_LIMIT = 232448;

// Linears by number: 0 qkv, 1 o, 2 gate and up, 3 down.
constexpr int MODULES = 7;
__host__ __device__ constexpr int inputs(int j) { return j == 1 ? Q : j == 3 ? F : D; }
__host__ __device__ constexpr int outputs(int j) { return j == 0 ? QKV : j == 2 ? 2 * F : D; }
__host__ __device__ constexpr int units(int j) { return outputs(j) / 16; }
__host__ __device__ constexpr int groups(int j) { return inputs(j) / 128; }
__host__ __device__ constexpr int modules(int j) { return j == 0 ? 3 : j == 2 ? 2 : 1; }
__host__ __device__ constexpr int first_module(int j) { return j == 0 ? 0 : j == 1 ? 3 : j == 2 ? 4 : 6; }
__host__ __device__ constexpr int above(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int most_units(int j) { return above(units(j), SMS); }  // of a multiprocessor
constexpr int CHUNKS = above(F, CHUNK);

constexpr int KEPT_PAGES = 128;  // KV blocks of a multiprocessor's tokens that shared memory lists
constexpr int SHARING = HEADS / KV_HEADS;  // query heads of a key head
constexpr int TEAM = WARPS / SHARING;      // warps that compute one query head
constexpr int ACC = C + 4;                          // a warp's attention: sums, maximum, normalizer

static_assert(D <= CHUNK && Q <= CHUNK && D % SPAN == 0 && Q % SPAN == 0 && F % SPAN == 0, "inputs");
static_assert(units(1) >= SMS, "every multiprocessor writes a part of the last product");
static_assert(SHARING == 1 || SHARING == 2 || SHARING == 4 || SHARING == 8, "query heads of a key head");
static_assert(2 * F <= UNIT && MAX_RANK % 8 == 0 && MAX_RANK <= 256, "an adapter's row fits into a slot");

struct Layer {
  const char* weight[4];
  const half *attention_gain, *mlp_gain;
  half *keys, *values;
};

struct Adapter {  // an adapter's matrices at one linear: offsets in the pool in units of 8 elements
  unsigned a, b;
  int rank;
  float scale;
};

struct Totals {  // adapters of all rows at one linear
  int sum, most;
};

struct Args {
  const Layer* layers;
  unsigned* boxes;
  const half* embedding;
  const int *ids, *sources, *newest, *positions, *slots, *table_rows, *tables;
  const int* leaders;  // first row of each row's sequence, whose rows follow each other; null: each row is a sequence
  const half *cos, *sin;
  const int* adapters;  // slot of each row; null: no row has an adapter
  const long long* table;
  const float* scale;
  const half* pool;
  half *product, *residual;
  long long table_width;
  float eps;
};

// Sizes that depend on the number of rows.
template <int R> struct Rows {
  static constexpr int SPLITS = SMS / (R * KV_HEADS) < 1 ? 1 : SMS / (R * KV_HEADS) > 8 ? 8 : SMS / (R * KV_HEADS);
  static constexpr int TASKS = R * KV_HEADS * SPLITS;  // of attention, one for a multiprocessor
  static_assert(TASKS <= SMS, "attention has more parts than there are multiprocessors");
  static_assert(R * 16 * MAX_RANK * 2 <= UNIT, "the rows of B for a unit fit into a slot");

  // Boxes of one parity, in words of two halves (sums of adapters: one float).
  static constexpr int QKV_AT = 0, ATT_AT = QKV_AT + R * QKV / 2, LSE_AT = ATT_AT + R * HEADS * SPLITS * C / 2,
                       O_AT = LSE_AT + above(R * HEADS * SPLITS, 32) * 32, ACT_AT = O_AT + R * D / 2,
                       DOWN_AT = ACT_AT + R * F / 2, SHRUNK_AT = DOWN_AT + R * D / 2, SHRUNK = 4 * R * 3 * MAX_RANK,
                       BOXES = SHRUNK_AT + SHRUNK;

  // Shared memory, in bytes.
  static constexpr int XROW = SPAN + 8;  // halves; rows begin in different banks
  static constexpr bool RESIDUAL_SHARED = R <= 2;
  static constexpr int X = 0, SUMS_A = X + WARPS * R * XROW * 2,
                       SUMS_B = SUMS_A + larger(most_units(0), most_units(2)) * WARPS * R * 64,
                       ACCS = SUMS_B + larger(most_units(1), most_units(3)) * WARPS * R * 64,
                       SHRUNKEN = ACCS + WARPS * ACC * 4, JOBS = SHRUNKEN + R * 4 * MAX_RANK * 4,
                       SQUARES = JOBS + 32 * WARPS * 4, ADAPTERS = SQUARES + 2 * R * WARPS * 4,
                       TOTALS = ADAPTERS + LAYERS * MODULES * R * 16, LAYER = TOTALS + LAYERS * 4 * 8,
                       POSITIONS = LAYER + LAYERS * 64, LEADERS = POSITIONS + 16, PAGES = LEADERS + 16, RESIDUAL = PAGES + 4 * KEPT_PAGES,
                       FIXED = RESIDUAL + (RESIDUAL_SHARED ? R * CONSUMERS * 16 : 0);
  static constexpr int SLOTS = (SHARED_LIMIT - FIXED) / (UNIT + 16) > 5 ? 5 : (SHARED_LIMIT - FIXED) / (UNIT + 16);
  static_assert(SLOTS >= 2, "the ring needs two slots");
  static_assert(R * 3 * MAX_RANK <= 32 * SMS, "a multiprocessor shrinks at most 32 rows of A");
  static constexpr int BYTES = SLOTS * (UNIT + 16) + FIXED;
};
