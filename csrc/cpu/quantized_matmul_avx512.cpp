// The weights are the unsigned operand of the dot product, as they are stored; their zero is taken
// out at the end of a group, by means of the sum of its activations.
#include <immintrin.h>

#include "quantized_matmul_kernels.h"

namespace vitrail {
namespace {

template <int kBits, int kRows>
void multiply(const MatmulBlock& block) {
  // Sums that do not wait for each other: a dot product takes four cycles, and two start in each.
  constexpr int kChains = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
  constexpr int kQuads = kBits == 8 ? 1 : 2;  // of inputs in a step
  const uint8_t* packed = block.packed;
  const int8_t* x = block.x;
  __m512 y[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) y[r] = _mm512_setzero_ps();
  for (int g = 0; g < block.num_groups; ++g) {
    __m512i sums[kRows][kChains];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) sums[r][chain] = _mm512_setzero_si512();
    }
    const auto take = [&](__m512i weights, int chain) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        int32_t quad;
        std::memcpy(&quad, x + 4 * r, 4);
        sums[r][chain] = _mm512_dpbusd_epi32(sums[r][chain], weights, _mm512_set1_epi32(quad));
      }
      x += 4 * kRows;
    };
    const auto step = [&](int chain) {
      const __m512i bytes = _mm512_loadu_si512(packed);
      packed += 4 * kPanel;
      if constexpr (kBits == 8) {
        take(bytes, chain);
      } else {
        const __m512i low = _mm512_set1_epi8(15);
        take(_mm512_and_si512(bytes, low), chain);
        take(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), (chain + 1) % kChains);
      }
    };
    constexpr int kUnroll = kChains > kQuads ? kChains / kQuads : 1;
    int done = 0;
    for (; done + kUnroll <= block.steps_per_group; done += kUnroll) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnroll; ++i) step(i * kQuads % kChains);
    }
    for (; done < block.steps_per_group; ++done) step(0);

    __m512i zeros = _mm512_set1_epi32(1 << (kBits - 1));
    if (block.zeros != nullptr) {
      zeros = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.zeros + g * kPanel)));
    }
    const __m512 scales = _mm512_loadu_ps(block.scales + g * kPanel);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      __m512i sum = sums[r][0];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sum = _mm512_add_epi32(sum, sums[r][chain]);
      const int at = r * block.num_groups + g;
      sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(block.x_sums[at])));
      const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(block.x_scales[at]));
      y[r] = _mm512_add_ps(y[r], _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(block.y[r], y[r]);
}

}  // namespace

const MatmulKernels kMatmulAvx512{
    12,
    round_row<float>,
    round_row<uint16_t>,
    {nullptr, multiply<8, 1>, multiply<8, 2>, multiply<8, 3>, multiply<8, 4>, multiply<8, 5>,
     multiply<8, 6>, multiply<8, 7>, multiply<8, 8>, multiply<8, 9>, multiply<8, 10>,
     multiply<8, 11>, multiply<8, 12>},
    {nullptr, multiply<4, 1>, multiply<4, 2>, multiply<4, 3>, multiply<4, 4>, multiply<4, 5>,
     multiply<4, 6>, multiply<4, 7>, multiply<4, 8>, multiply<4, 9>, multiply<4, 10>,
     multiply<4, 11>, multiply<4, 12>}};

}  // namespace vitrail
