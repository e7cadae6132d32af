// AVX2 multiplies unsigned by signed bytes, in pairs that must fit 16 bits. Weights of 4 bits
// always do; weights of 8 bits do as magnitudes against activations that take over their sign.
#include <immintrin.h>

#include "quantized_matmul_kernels.h"

namespace vitrail {
namespace {

template <int kBits, int kRows>
void multiply(const MatmulBlock& block) {
  constexpr int kHalves = 2;  // vectors in a panel
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t* packed = block.packed;
  const int8_t* x = block.x;
  for (int r = 0; r < kRows; ++r) std::memset(block.y[r], 0, sizeof(block.y[r]));
  for (int g = 0; g < block.num_groups; ++g) {
    __m256i sums[kRows][kHalves];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int step = 0; step < block.steps_per_group; ++step) {
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half, packed += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
        const auto quad = [&](int index, int row) {
          int32_t four;
          std::memcpy(&four, x + (index * kRows + row) * 4, 4);
          return _mm256_set1_epi32(four);
        };
        if constexpr (kBits == 8) {
          const __m256i weights = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));  // minus 128
          const __m256i magnitudes = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const __m256i pairs =
                _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(quad(0, r), weights));
            sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs, ones));
          }
        } else {
          const __m256i mask = _mm256_set1_epi8(15);
          const __m256i low = _mm256_and_si256(bytes, mask);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, quad(0, r)),
                                                   _mm256_maddubs_epi16(high, quad(1, r)));
            sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
      x += (kBits == 8 ? 4 : 8) * kRows;
    }
    for (int half = 0; half < kHalves; ++half) {
      __m256i zeros = _mm256_set1_epi32(1 << (kBits - 1));
      if (block.zeros != nullptr) {
        zeros = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(block.zeros + g * kPanel + half * 8)));
      }
      if (kBits == 8) zeros = _mm256_sub_epi32(zeros, _mm256_set1_epi32(128));  // taken out above
      const __m256 scales = _mm256_loadu_ps(block.scales + g * kPanel + half * 8);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const int at = r * block.num_groups + g;
        const __m256i sum = _mm256_sub_epi32(
            sums[r][half], _mm256_mullo_epi32(zeros, _mm256_set1_epi32(block.x_sums[at])));
        const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(block.x_scales[at]));
        float* y = block.y[r] + half * 8;
        _mm256_storeu_ps(
            y, _mm256_add_ps(_mm256_loadu_ps(y), _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale)));
      }
    }
  }
}

}  // namespace

const MatmulKernels kMatmulAvx2{
    4,
    round_row<float>,
    round_row<uint16_t>,
    {nullptr, multiply<8, 1>, multiply<8, 2>, multiply<8, 3>, multiply<8, 4>},
    {nullptr, multiply<4, 1>, multiply<4, 2>, multiply<4, 3>, multiply<4, 4>}};

}  // namespace vitrail
