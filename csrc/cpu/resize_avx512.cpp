// A weight is cut into three signed bytes, so that one dot product of bytes takes four taps of 16
// lanes at once.
#include <immintrin.h>

#include <cstring>

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
    sums[0][v] = _mm512_set1_epi32(1 << (kWeightBits - 1));
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
    sum = _mm512_max_epi32(_mm512_srai_epi32(sum, kWeightBits), _mm512_setzero_si512());
    const __m128i bytes = _mm512_cvtusepi32_epi8(sum);
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

void store_12(uint8_t* out, __m128i quad) { _mm_mask_storeu_epi32(out, 0x7, quad); }

// The order of bytes that makes a quad of four pixels.
__m128i quad_order(int pixel_bytes) {
  return pixel_bytes == 3 ? _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1)
                          : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1);
}

void interleave(uint8_t* out, ptrdiff_t out_step, const uint8_t* in, ptrdiff_t in_step, int count,
                int pixel_bytes) {
  const __m128i order = quad_order(pixel_bytes);
  for (; count > 0; --count, out += out_step, in += in_step) {
    const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    store_12(out, _mm_shuffle_epi8(pixels, order));
  }
}

void interleave_rows(uint8_t* out, const uint8_t* const rows[4], int count, int pixel_bytes) {
  const __m128i order = quad_order(4);
  for (int i = 0; i < count; ++i, out += 12) {
    int pixels[4];
    for (int row = 0; row < 4; ++row) std::memcpy(&pixels[row], rows[row] + i * pixel_bytes, 4);
    const __m128i four = _mm_setr_epi32(pixels[0], pixels[1], pixels[2], pixels[3]);
    store_12(out, _mm_shuffle_epi8(four, order));
  }
}

}  // namespace

const ResizeKernels kResizeAvx512{pack, weigh, interleave, interleave_rows};

}  // namespace vitrail
