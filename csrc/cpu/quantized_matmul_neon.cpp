#include <arm_neon.h>

#include "quantized_matmul_kernels.h"

namespace vitrail {
namespace {

template <int kBits, int kRows>
void multiply(const MatmulBlock& block) {
  constexpr int kQuarters = 4;  // vectors in a panel
  const uint8_t* packed = block.packed;
  const int8_t* x = block.x;
  for (int r = 0; r < kRows; ++r) std::memset(block.y[r], 0, sizeof(block.y[r]));
  for (int g = 0; g < block.num_groups; ++g) {
    int32x4_t sums[kRows][kQuarters];
    for (int r = 0; r < kRows; ++r) {
      for (int part = 0; part < kQuarters; ++part) sums[r][part] = vdupq_n_s32(0);
    }
    for (int step = 0; step < block.steps_per_group; ++step) {
      const auto quad = [&](int index, int row) {
        int32_t four;
        std::memcpy(&four, x + (index * kRows + row) * 4, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(four));
      };
#pragma GCC unroll 4
      for (int part = 0; part < kQuarters; ++part, packed += 16) {
        const uint8x16_t bytes = vld1q_u8(packed);
        if constexpr (kBits == 8) {
          // Minus 128: the dot product takes signed bytes.
          const int8x16_t weights = vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            sums[r][part] = vdotq_s32(sums[r][part], weights, quad(0, r));
          }
        } else {
          const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
          const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            sums[r][part] = vdotq_s32(sums[r][part], low, quad(0, r));
            sums[r][part] = vdotq_s32(sums[r][part], high, quad(1, r));
          }
        }
      }
      x += (kBits == 8 ? 4 : 8) * kRows;
    }
    for (int part = 0; part < kQuarters; ++part) {
      int32_t zeros[4];
      for (int i = 0; i < 4; ++i) {
        zeros[i] =
            block.zeros != nullptr ? block.zeros[g * kPanel + part * 4 + i] : 1 << (kBits - 1);
        if (kBits == 8) zeros[i] -= 128;  // taken out above
      }
      const float32x4_t scales = vld1q_f32(block.scales + g * kPanel + part * 4);
      for (int r = 0; r < kRows; ++r) {
        const int at = r * block.num_groups + g;
        const int32x4_t sum = vmlsq_n_s32(sums[r][part], vld1q_s32(zeros), block.x_sums[at]);
        const float32x4_t scale = vmulq_n_f32(scales, block.x_scales[at]);
        float* y = block.y[r] + part * 4;
        vst1q_f32(y, vaddq_f32(vld1q_f32(y), vmulq_f32(vcvtq_f32_s32(sum), scale)));
      }
    }
  }
}

}  // namespace

const MatmulKernels kMatmulNeon{
    4,
    round_row<float>,
    round_row<uint16_t>,
    {nullptr, multiply<8, 1>, multiply<8, 2>, multiply<8, 3>, multiply<8, 4>},
    {nullptr, multiply<4, 1>, multiply<4, 2>, multiply<4, 3>, multiply<4, 4>}};

}  // namespace vitrail
