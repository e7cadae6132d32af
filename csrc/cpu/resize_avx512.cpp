// A weight is cut into three signed bytes, so that one dot product of bytes takes four taps of 16
// lanes at once.
#include <immintrin.h>

#include "resize_kernels.h"

namespace vitrail {
namespace {

void pack(const int32_t weights[4], uint32_t words[kQuadWords]) {
  words[0] = words[1] = words[2] = words[3] = 0;
  for (int i = 0; i < 4; ++i) {
    int32_t weight = weights[i];
#pragma GCC unroll 4
    for (int part = 0; part < 3; ++part) {
      const auto byte = static_cast<int8_t>(static_cast<uint8_t>(weight));
      words[part] |= static_cast<uint32_t>(static_cast<uint8_t>(byte)) << 8 * i;
      weight = (weight - byte) >>
               8;  // what the signed byte took too much or too little is in the next part
    }
  }
}

// 16 * kVectors lanes, those of `mask` in the last vector.
template <int kVectors>
void weigh_block(uint8_t* out, const uint8_t* const* quads, int num_quads, const uint32_t* words,
                 int begin, __mmask16 mask) {
  __m512i sums[3][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    sums[0][v] = _mm512_set1_epi32((1 << (kWeightBits - 1)) - (128 << kWeightBits));
    sums[1][v] = sums[2][v] = _mm512_setzero_si512();
  }
  for (int q = 0; q < num_quads; ++q, words += kQuadWords) {
    const uint8_t* in = quads[q] + 4 * begin;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m512i pixels =
          _mm512_maskz_loadu_epi32(v == kVectors - 1 ? mask : 0xffff, in + 64 * v);
#pragma GCC unroll 4
      for (int part = 0; part < 3; ++part) {
        sums[part][v] = _mm512_dpbusd_epi32(sums[part][v], pixels, _mm512_set1_epi32(words[part]));
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    __m512i sum = _mm512_add_epi32(sums[1][v], _mm512_slli_epi32(sums[2][v], 8));
    sum = _mm512_add_epi32(sums[0][v], _mm512_slli_epi32(sum, 8));
    // Clipped as a signed byte, 128 lower.
    const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(_mm512_srai_epi32(sum, kWeightBits)),
                                        _mm_set1_epi8(-128));
    _mm_mask_storeu_epi8(out + begin + 16 * v, v == kVectors - 1 ? mask : 0xffff, bytes);
  }
}

void weigh(uint8_t* out, const uint8_t* const* quads, int num_quads, const uint32_t* words,
           int lanes) {
  int begin = 0;
  for (; begin + 48 <= lanes; begin += 48)
    weigh_block<3>(out, quads, num_quads, words, begin, 0xffff);
  for (; begin < lanes; begin += 16) {
    const int rest = lanes - begin;
    weigh_block<1>(out, quads, num_quads, words, begin, rest < 16 ? (1 << rest) - 1 : 0xffff);
  }
}

}  // namespace

const ResizeKernels kResizeAvx512{pack, weigh, interleave_avx2, interleave_rows_avx2};

}  // namespace vitrail
