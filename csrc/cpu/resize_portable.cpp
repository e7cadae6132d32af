#include <algorithm>

#include "resize_kernels.h"

namespace vitrail {
namespace {

void weigh(uint8_t* out, const uint8_t* const* quads, int num_quads, const uint32_t* words,
           int lanes) {
  constexpr int kChunk = 48;  // sums that stay in the first-level cache
  for (int begin = 0; begin < lanes; begin += kChunk) {
    const int count = std::min(kChunk, lanes - begin);
    int32_t sums[kChunk];
    std::fill(sums, sums + kChunk, 1 << (kWeightBits - 1));
    for (int q = 0; q < num_quads; ++q) {
      const uint8_t* in = quads[q] + 4 * begin;
      int32_t weight[4];
      for (int i = 0; i < 4; ++i) weight[i] = static_cast<int32_t>(words[q * kQuadWords + i]);
      for (int lane = 0; lane < count; ++lane) {
        for (int i = 0; i < 4; ++i) sums[lane] += weight[i] * in[4 * lane + i];
      }
    }
    for (int lane = 0; lane < count; ++lane) {
      out[begin + lane] = static_cast<uint8_t>(std::clamp(sums[lane] >> kWeightBits, 0, 255));
    }
  }
}

}  // namespace

void pack_plain(const int32_t weights[4], uint32_t words[kQuadWords]) {
  for (int i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(weights[i]);
}

void interleave_plain(uint8_t* out, ptrdiff_t out_step, const uint8_t* in, ptrdiff_t in_step,
                      int count, ptrdiff_t row_step, int rows, int pixel_bytes) {
  for (; count > 0; --count, out += out_step, in += in_step) {
    for (int row = 0; row < rows; ++row) {
      for (int channel = 0; channel < 3; ++channel) {
        for (int pixel = 0; pixel < 4; ++pixel) {
          out[12 * row + 4 * channel + pixel] = in[row * row_step + pixel_bytes * pixel + channel];
        }
      }
    }
  }
}

void interleave_rows_plain(uint8_t* out, const uint8_t* const rows[4], int count, int pixel_bytes) {
  for (int pixel = 0; pixel < count; ++pixel, out += 12) {
    for (int channel = 0; channel < 3; ++channel) {
      for (int row = 0; row < 4; ++row) {
        out[4 * channel + row] = rows[row][pixel * pixel_bytes + channel];
      }
    }
  }
}

const ResizeKernels kResizePortable{pack_plain, weigh, interleave_plain, interleave_rows_plain};

}  // namespace vitrail
