// out = epilogue(a b^T): a (rows, inner) and b (columns, inner) int8, for Ampere's tensor cores.
//
// A CTA computes 128 rows by 128 or 256 columns, a warp 64 by 64 of them. Tiles of 64 bytes along `inner` come by
// cp.async into a ring of four stages, of which three are under way while one is multiplied. A row of a tile is four
// chunks of 16 bytes; chunk c of row r stands at c ^ (r / 2 % 4), so that the eight rows that an ldmatrix matrix reads,
// and the two rows that eight lanes write, lie in different banks.
//
// The sums, exact in int32, become value = sum * row_scale * column_scale + bias in float32, then perhaps GELU, then a
// 16-bit float to which a residual may be added, or int8 on the scale of its column. They go through shared memory once
// more to leave in chunks of 16 bytes.
#include "intrinsics.h"

namespace vitrail {
namespace {

constexpr int kRows = 128, kInner = 64, kStages = 4;
constexpr int kWarpRows = 64, kWarpColumns = 64;
constexpr int kChunk = 16;                // bytes
constexpr int kChunks = kInner / kChunk;  // of a row of a tile
constexpr int kGroup = 8;                 // row tiles whose CTAs run together, to share columns in the L2 cache
constexpr int kPairs = kWarpColumns / 8;  // 16 x 8 products beside each other in a warp
constexpr int kBands = kWarpRows / 16;    // and below each other

struct Gemm {
  const int8_t* a;             // [rows][inner], a row every `a_stride` bytes
  const int8_t* b;             // [columns][inner]
  const float* row_scales;     // [rows], or null: all are 1
  const float* column_scales;  // [columns]
  const uint16_t* bias;        // [columns] or null
  const uint16_t* residual;    // [rows][columns] or null
  const float* next_scales;    // [columns], where the output is int8
  void* out;                   // [rows][columns]
  int rows, columns, inner;    // inner is a multiple of 16
  int64_t a_stride;            // so is this
};

// The exact (erf) GELU, to 4e-6: the formula and its coefficients are those of kernels/activation.py.
VITRAIL_INLINE float gelu(float x) {
  const float a = x < 0.0f ? -x : x;
  float log2_phi = -1.8348113e-06f * a + 6.1598294e-05f;
  log2_phi = log2_phi * a - 9.3052484e-04f;
  log2_phi = log2_phi * a + 8.5078906e-03f;
  log2_phi = log2_phi * a - 5.3960070e-02f;
  log2_phi = log2_phi * a - 4.5846438e-01f;
  log2_phi = log2_phi * a - 1.1512511e+00f;
  log2_phi = log2_phi * a - 9.9999529e-01f;
  return (x > 0.0f ? x : 0.0f) - a * exp2_approximately(log2_phi);
}

VITRAIL_INLINE uint32_t chunk_offset(int row, int chunk) { return row * kInner + (chunk ^ (row >> 1 & 3)) * kChunk; }

// Asks for `kCount` rows of a tile, those beyond `rows` and what lies beyond `inner` as zeros.
template <int kCount, int kThreads>
VITRAIL_INLINE void fetch_rows(uint32_t to, const int8_t* from, int64_t stride, int first_row, int rows,
                               int first_inner, int inner) {
  constexpr int kAtOnce = kThreads / kChunks;
  const int chunk = thread_index() % kChunks;
  const int at = first_inner + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kCount / kAtOnce; ++i) {
    const int row = thread_index() / kChunks + i * kAtOnce;
    copy_async<16>(to + chunk_offset(row, chunk), from + (first_row + row) * stride + at,
                   first_row + row < rows && at < inner);
  }
}

template <typename Float, int kColumns, bool kGelu, bool kInt8>
VITRAIL_INLINE void int8_gemm(const Gemm& gemm) {
  constexpr int kWarps = (kRows / kWarpRows) * (kColumns / kWarpColumns);
  constexpr int kThreads = 32 * kWarps;
  constexpr uint32_t kStage = (kRows + kColumns) * kInner;

  // Which tile: down a group of row tiles first, then along the columns.
  const int row_tiles = (gemm.rows + kRows - 1) / kRows, column_tiles = (gemm.columns + kColumns - 1) / kColumns;
  const int first_of_group = block_index() / (kGroup * column_tiles) * kGroup;
  const int in_group = row_tiles - first_of_group < kGroup ? row_tiles - first_of_group : kGroup;
  const int place = block_index() % (kGroup * column_tiles);
  const int first_row = (first_of_group + place % in_group) * kRows, first_column = place / in_group * kColumns;

  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int warp_row = warp % (kRows / kWarpRows) * kWarpRows, warp_column = warp / (kRows / kWarpRows) * kWarpColumns;

  const int steps = (gemm.inner + kInner - 1) / kInner;
  const auto fetch = [&](int step) {
    if (step < steps) {
      const uint32_t stage = step % kStages * kStage;
      fetch_rows<kRows, kThreads>(stage, gemm.a, gemm.a_stride, first_row, gemm.rows, step * kInner, gemm.inner);
      fetch_rows<kColumns, kThreads>(stage + kRows * kInner, gemm.b, gemm.inner, first_column, gemm.columns,
                                     step * kInner, gemm.inner);
    }
    commit_copies();
  };

  int sums[kBands][kPairs][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    block_barrier();  // this stage is there for all, and all have left the one that is fetched next
    fetch(step + kStages - 1);
    const uint32_t a_tile = step % kStages * kStage, b_tile = a_tile + kRows * kInner;
#pragma unroll
    for (int half = 0; half < kInner / 32; ++half) {
      Word4 a[kBands], b[kPairs / 2];
#pragma unroll
      for (int i = 0; i < kBands; ++i) {
        a[i] = load_matrices(a_tile + chunk_offset(warp_row + 16 * i + lane % 16, 2 * half + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kPairs / 2; ++j) {
        const int row = warp_column + 16 * j + lane / 16 * 8 + lane % 8;
        b[j] = load_matrices(b_tile + chunk_offset(row, 2 * half + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kBands; ++i) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          multiply_int8(sums[i][j], a[i].word, b[j / 2].word[j % 2 * 2], b[j / 2].word[j % 2 * 2 + 1]);
        }
      }
    }
  }
  wait_for_copies<0>();
  block_barrier();  // shared memory is free for the outputs

  // Outputs of a warp: 64 rows, with 16 bytes between them that keep the rows of a store in different banks.
  constexpr int kBytes = kInt8 ? 1 : 2;
  constexpr uint32_t kOutRow = kWarpColumns * kBytes + kChunk;
  static_assert(kWarps * kWarpRows * kOutRow <= kStages * kStage);
  const uint32_t staged = warp * kWarpRows * kOutRow;
  float row_scales[kBands][2];
#pragma unroll
  for (int i = 0; i < 2 * kBands; ++i) {
    const int row = first_row + warp_row + 8 * i + lane / 4;
    row_scales[i / 2][i % 2] =
        gemm.row_scales != nullptr && row < gemm.rows ? load_global(gemm.row_scales + row) : 1.0f;
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    float column_scale[2], bias[2], inverse[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = first_column + warp_column + 8 * j + 2 * (lane % 4) + c;
      const bool inside = column < gemm.columns;
      column_scale[c] = inside ? load_global(gemm.column_scales + column) : 0.0f;
      bias[c] = inside && gemm.bias != nullptr ? to_float<Float>(load_global(gemm.bias + column)) : 0.0f;
      if (kInt8) inverse[c] = inside ? 1.0f / load_global(gemm.next_scales + column) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2 * kBands; ++i) {
      float value[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float sum = static_cast<float>(sums[i / 2][j][i % 2 * 2 + c]);
        value[c] = sum * row_scales[i / 2][i % 2] * column_scale[c] + bias[c];
        if (kGelu) value[c] = gelu(value[c]);
      }
      const uint32_t at = staged + (8 * i + lane / 4) * kOutRow + (8 * j + 2 * (lane % 4)) * kBytes;
      if constexpr (kInt8) {
        const int low = round_to_int8(value[0] * inverse[0]), high = round_to_int8(value[1] * inverse[1]);
        store_shared(at, static_cast<uint16_t>((low & 0xff) | high << 8));
      } else {
        store_shared(at, pack_floats<Float>(value[0], value[1]));
      }
    }
  }
  warp_barrier();

  constexpr int kPerChunk = kChunk / kBytes, kRowChunks = kWarpColumns / kPerChunk;
  const bool whole_chunks = gemm.columns % kPerChunk == 0;  // inside or outside, and aligned
  for (int i = lane; i < kWarpRows * kRowChunks; i += 32) {
    const int row = first_row + warp_row + i / kRowChunks;
    const int column = first_column + warp_column + i % kRowChunks * kPerChunk;
    if (row >= gemm.rows || column >= gemm.columns) continue;
    Word4 chunk = load_shared<Word4>(staged + i / kRowChunks * kOutRow + i % kRowChunks * kChunk);
    const int64_t at = static_cast<int64_t>(row) * gemm.columns + column;
    if constexpr (!kInt8) {
      if (gemm.residual != nullptr) {
        Word4 residual = {};
        if (whole_chunks) {
          residual = load_global(reinterpret_cast<const Word4*>(gemm.residual + at));
        } else {
#pragma unroll
          for (int e = 0; e < kPerChunk; ++e) {
            if (column + e >= gemm.columns) break;
            residual.word[e / 2] |= static_cast<uint32_t>(load_global(gemm.residual + at + e)) << e % 2 * 16;
          }
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t own = chunk.word[w], other = residual.word[w];
          chunk.word[w] = pack_floats<Float>(to_float<Float>(own) + to_float<Float>(other),
                                             to_float<Float>(own >> 16) + to_float<Float>(other >> 16));
        }
      }
    }
    if (whole_chunks) {
      store_global(reinterpret_cast<Word4*>(static_cast<char*>(gemm.out) + at * kBytes), chunk);
    } else {
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) {
        if (column + e >= gemm.columns) break;
        const uint32_t bits = chunk.word[e * kBytes / 4] >> (e * kBytes % 4 * 8);
        if constexpr (kInt8) {
          store_global(static_cast<uint8_t*>(gemm.out) + at + e, static_cast<uint8_t>(bits));
        } else {
          store_global(static_cast<uint16_t*>(gemm.out) + at + e, static_cast<uint16_t>(bits));
        }
      }
    }
  }
}

}  // namespace
}  // namespace vitrail

#define INT8_GEMM(name, threads, ctas, Float, columns_of_tile, gelu, to_int8)                                          \
  KERNEL(name, threads, ctas,                                                                                          \
         (const int8_t* a, const int8_t* b, const float* row_scales, const float* column_scales, const uint16_t* bias, \
          const uint16_t* residual, const float* next_scales, void* out, int rows, int columns, int inner,             \
          int64_t a_stride)) {                                                                                         \
    vitrail::int8_gemm<vitrail::Float, columns_of_tile, gelu, to_int8>(                                                \
        {a, b, row_scales, column_scales, bias, residual, next_scales, out, rows, columns, inner, a_stride});          \
  }

// name: what comes in of 16 bits, the epilogue, the tile.
INT8_GEMM(int8_gemm_bf16_128x128, 128, 2, BFloat16, 128, false, false)
INT8_GEMM(int8_gemm_bf16_128x256, 256, 1, BFloat16, 256, false, false)
INT8_GEMM(int8_gemm_bf16_gelu_128x128, 128, 2, BFloat16, 128, true, false)
INT8_GEMM(int8_gemm_bf16_gelu_128x256, 256, 1, BFloat16, 256, true, false)
INT8_GEMM(int8_gemm_bf16_gelu_int8_128x128, 128, 2, BFloat16, 128, true, true)
INT8_GEMM(int8_gemm_bf16_gelu_int8_128x256, 256, 1, BFloat16, 256, true, true)
INT8_GEMM(int8_gemm_fp16_128x128, 128, 2, Half, 128, false, false)
INT8_GEMM(int8_gemm_fp16_128x256, 256, 1, Half, 256, false, false)
INT8_GEMM(int8_gemm_fp16_gelu_128x128, 128, 2, Half, 128, true, false)
INT8_GEMM(int8_gemm_fp16_gelu_128x256, 256, 1, Half, 256, true, false)
INT8_GEMM(int8_gemm_fp16_gelu_int8_128x128, 128, 2, Half, 128, true, true)
INT8_GEMM(int8_gemm_fp16_gelu_int8_128x256, 256, 1, Half, 256, true, true)
