// A weight of 24 bits is no operand of a byte or word product, so it is cut in two: weight = high *
// 2^15 + low, and the sums of both products are put together at the end. Overflow of one sum is
// made good by the other: all is modulo 2^32.
#include <immintrin.h>

#include <cstring>

#include "resize_kernels.h"

namespace vitrail {
namespace {

constexpr int kLowBits = 15;

uint32_t pair(int32_t first, int32_t second) {
  return static_cast<uint16_t>(first) | static_cast<uint32_t>(static_cast<uint16_t>(second)) << 16;
}

void pack(const int32_t weights[4], uint32_t words[kQuadWords]) {
  constexpr int32_t kMask = (1 << kLowBits) - 1;
  for (int i = 0; i < 2;
       ++i) {  // pixels 0 and 2 of a quad are multiplied together, and so are 1 and 3
    words[2 * i] = pair(weights[i] & kMask, weights[i + 2] & kMask);
    words[2 * i + 1] = pair(weights[i] >> kLowBits, weights[i + 2] >> kLowBits);
  }
}

// 8 * kVectors lanes.
template <int kVectors>
void weigh_block(uint8_t* out, const uint8_t* const* quads, int num_quads, const uint32_t* words,
                 int begin) {
  __m256i low[kVectors], high[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    low[v] = _mm256_set1_epi32(1 << (kWeightBits - 1));
    high[v] = _mm256_setzero_si256();
  }
  for (int q = 0; q < num_quads; ++q, words += kQuadWords) {
    const uint8_t* in = quads[q] + 4 * begin;
    const __m256i low_even = _mm256_set1_epi32(words[0]), high_even = _mm256_set1_epi32(words[1]);
    const __m256i low_odd = _mm256_set1_epi32(words[2]), high_odd = _mm256_set1_epi32(words[3]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m256i pixels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 32 * v));
      const __m256i even = _mm256_and_si256(pixels, _mm256_set1_epi16(0xff));
      const __m256i odd = _mm256_srli_epi16(pixels, 8);
      low[v] = _mm256_add_epi32(low[v], _mm256_madd_epi16(even, low_even));
      high[v] = _mm256_add_epi32(high[v], _mm256_madd_epi16(even, high_even));
      low[v] = _mm256_add_epi32(low[v], _mm256_madd_epi16(odd, low_odd));
      high[v] = _mm256_add_epi32(high[v], _mm256_madd_epi16(odd, high_odd));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    __m256i sum = _mm256_add_epi32(low[v], _mm256_slli_epi32(high[v], kLowBits));
    sum = _mm256_srai_epi32(sum, kWeightBits);
    const __m128i shorts =
        _mm_packs_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + begin + 8 * v),
                     _mm_packus_epi16(shorts, shorts));
  }
}

void weigh(uint8_t* out, const uint8_t* const* quads, int num_quads, const uint32_t* words,
           int lanes) {
  int begin = 0;
  for (; begin + 24 <= lanes; begin += 24) weigh_block<3>(out, quads, num_quads, words, begin);
  for (; begin + 8 <= lanes; begin += 8) weigh_block<1>(out, quads, num_quads, words, begin);
  for (; begin < lanes; ++begin) {
    uint32_t low = 1u << (kWeightBits - 1), high = 0;
    for (int q = 0; q < num_quads; ++q) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t pixel = quads[q][4 * begin + i];
        const uint32_t* word = words + q * kQuadWords + i % 2 * 2;
        low += pixel * (word[0] >> i / 2 * 16 & 0xffff);
        high += pixel * static_cast<int16_t>(word[1] >> i / 2 * 16);
      }
    }
    const int32_t sum = static_cast<int32_t>(low + (high << kLowBits)) >> kWeightBits;
    out[begin] = static_cast<uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
  }
}

// The order of bytes that makes a quad of four pixels.
__m128i quad_order(int pixel_bytes) {
  return pixel_bytes == 3 ? _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1)
                          : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1);
}

}  // namespace

void interleave_avx2(uint8_t* out, ptrdiff_t out_step, const uint8_t* in, ptrdiff_t in_step,
                     int count, ptrdiff_t row_step, int rows, int pixel_bytes) {
  const __m128i order = quad_order(pixel_bytes);
  for (; count > 0; --count, out += out_step, in += in_step) {
    for (int row = 0; row < rows; ++row) {  // each overwrites what the one before wrote too much
      const auto* pixels = reinterpret_cast<const __m128i*>(in + row * row_step);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 12 * row),
                       _mm_shuffle_epi8(_mm_loadu_si128(pixels), order));
    }
  }
}

void interleave_rows_avx2(uint8_t* out, const uint8_t* const rows[4], int count, int pixel_bytes) {
  const __m128i order = quad_order(4);
  for (int i = 0; i < count; ++i, out += 12) {
    int pixels[4];
    for (int row = 0; row < 4; ++row) std::memcpy(&pixels[row], rows[row] + i * pixel_bytes, 4);
    const __m128i four = _mm_setr_epi32(pixels[0], pixels[1], pixels[2], pixels[3]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(four, order));
  }
}

const ResizeKernels kResizeAvx2{pack, weigh, interleave_avx2, interleave_rows_avx2};

}  // namespace vitrail
