// The inner loops of the tile resizer, one set for each instruction set.
//
// All pixels on their way stand in quads: the bytes of four neighbouring columns (or rows) of one
// channel side by side, so that the four taps of a filter that meet them are multiplied and added
// in one step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_features.h"

namespace vitrail {

constexpr int kWeightBits = 22;  // Pillow's fixed point for 8-bit pixels
constexpr int kQuadWords = 4;

struct ResizeKernels {
  // Packs the weights of four taps into the words that `weigh` reads.
  void (*pack)(const int32_t weights[4], uint32_t words[kQuadWords]);

  // out[lane] = clip((half + sum over q, i of quads[q][4 * lane + i] * weight[q][i]) >>
  // kWeightBits) for `lanes` lanes; nothing behind the last is written. words:
  // [num_quads][kQuadWords].
  void (*weigh)(uint8_t* out, const uint8_t* const* quads, int num_quads, const uint32_t* words,
                int lanes);

  // Makes quads, 12 bytes [channel][4], of each four pixels in a line, 3 or 4 bytes each. `count`
  // times: from `rows` places, row_step apart, to as many quads one behind the other. Reads 16
  // bytes at every place, and may write 4 bytes behind the last quad.
  void (*interleave)(uint8_t* out, ptrdiff_t out_step, const uint8_t* in, ptrdiff_t in_step,
                     int count, ptrdiff_t row_step, int rows, int pixel_bytes);

  // Makes quads of the pixels that stand under each other in four rows, `count` of them one behind
  // the other. Reads 4 bytes of every pixel, and may write 4 bytes behind the last quad.
  void (*interleave_rows)(uint8_t* out, const uint8_t* const rows[4], int count, int pixel_bytes);
};

// Forms that do for more than one instruction set.
void pack_plain(const int32_t weights[4], uint32_t words[kQuadWords]);
void interleave_plain(uint8_t* out, ptrdiff_t out_step, const uint8_t* in, ptrdiff_t in_step,
                      int count, ptrdiff_t row_step, int rows, int pixel_bytes);
void interleave_rows_plain(uint8_t* out, const uint8_t* const rows[4], int count, int pixel_bytes);
void interleave_avx2(uint8_t* out, ptrdiff_t out_step, const uint8_t* in, ptrdiff_t in_step,
                     int count, ptrdiff_t row_step, int rows, int pixel_bytes);
void interleave_rows_avx2(uint8_t* out, const uint8_t* const rows[4], int count, int pixel_bytes);

extern const ResizeKernels kResizePortable, kResizeNeon, kResizeAvx2, kResizeAvx512;

}  // namespace vitrail
