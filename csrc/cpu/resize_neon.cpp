#include <arm_neon.h>

#include "resize_kernels.h"

namespace vitrail {
namespace {

// Eight lanes; `in` holds their 32 bytes of one quad.
void add_quad(int32x4_t sums[2], const uint8_t* in, const uint32_t* words) {
  const uint8x8x4_t pixels = vld4_u8(in);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int16x8_t wide = vreinterpretq_s16_u16(vmovl_u8(pixels.val[i]));
    const int32_t weight = static_cast<int32_t>(words[i]);
    sums[0] = vmlaq_n_s32(sums[0], vmovl_s16(vget_low_s16(wide)), weight);
    sums[1] = vmlaq_n_s32(sums[1], vmovl_high_s16(wide), weight);
  }
}

void weigh(uint8_t* out, const uint8_t* const* quads, int num_quads, const uint32_t* words,
           int lanes) {
  int begin = 0;
  for (; begin + 8 <= lanes; begin += 8) {
    int32x4_t sums[2];
    sums[0] = sums[1] = vdupq_n_s32(1 << (kWeightBits - 1));
    for (int q = 0; q < num_quads; ++q) {
      add_quad(sums, quads[q] + 4 * begin, words + q * kQuadWords);
    }
    const int16x8_t shorts = vcombine_s16(vqmovn_s32(vshrq_n_s32(sums[0], kWeightBits)),
                                          vqmovn_s32(vshrq_n_s32(sums[1], kWeightBits)));
    vst1_u8(out + begin, vqmovun_s16(shorts));
  }
  for (; begin < lanes; ++begin) {
    int32_t sum = 1 << (kWeightBits - 1);
    for (int q = 0; q < num_quads; ++q) {
      for (int i = 0; i < 4; ++i) {
        sum += static_cast<int32_t>(words[q * kQuadWords + i]) * quads[q][4 * begin + i];
      }
    }
    sum >>= kWeightBits;
    out[begin] = static_cast<uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
  }
}

}  // namespace

const ResizeKernels kResizeNeon{pack_plain, weigh, interleave_plain, interleave_rows_plain};

}  // namespace vitrail
