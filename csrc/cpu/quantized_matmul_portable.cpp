#include "quantized_matmul_kernels.h"

namespace vitrail {
namespace {

template <int kBits, int kRows>
void multiply(const MatmulBlock& block) {
  constexpr int kQuads = kBits == 8 ? 1 : 2;  // of inputs in a step
  const uint8_t* packed = block.packed;
  const int8_t* x = block.x;
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kPanel; ++n) block.y[r][n] = 0.0f;
  }
  for (int g = 0; g < block.num_groups; ++g) {
    int32_t sums[kRows][kPanel] = {};
    for (int step = 0; step < block.steps_per_group; ++step, packed += kPanel * 4) {
      for (int quad = 0; quad < kQuads; ++quad, x += kRows * 4) {
        for (int n = 0; n < kPanel; ++n) {
          for (int i = 0; i < 4; ++i) {
            const int byte = packed[4 * n + i];
            const int32_t weight = kBits == 8 ? byte : quad == 0 ? byte & 15 : byte >> 4;
            for (int r = 0; r < kRows; ++r) sums[r][n] += weight * x[4 * r + i];
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const float x_scale = block.x_scales[r * block.num_groups + g];
      const int32_t x_sum = block.x_sums[r * block.num_groups + g];
      for (int n = 0; n < kPanel; ++n) {
        const int32_t zero =
            block.zeros != nullptr ? block.zeros[g * kPanel + n] : 1 << (kBits - 1);
        const float scale = block.scales[g * kPanel + n] * x_scale;
        block.y[r][n] += static_cast<float>(sums[r][n] - zero * x_sum) * scale;
      }
    }
  }
}

}  // namespace

const MatmulKernels kMatmulPortable{
    4,
    round_row<float>,
    round_row<uint16_t>,
    {nullptr, multiply<8, 1>, multiply<8, 2>, multiply<8, 3>, multiply<8, 4>},
    {nullptr, multiply<4, 1>, multiply<4, 2>, multiply<4, 3>, multiply<4, 4>}};

}  // namespace vitrail
