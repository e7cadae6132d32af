// The inner loops of the quantised matmul, one set for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "quantized_matmul.h"

namespace vitrail {

// A block of activation rows after rounding, and one panel of weights.
struct MatmulBlock {
  const uint8_t* packed;
  const float* scales;
  const uint8_t* zeros;  // or null
  int num_groups, steps_per_group;
  const int8_t* x;        // [input / 4][rows][4], zeros behind the last input of a group
  const float* x_scales;  // [rows][group]
  const int32_t* x_sums;  // [rows][group], of x
  float (*y)[kPanel];     // [rows]
};

constexpr int kMaxBlockRows = 12;

struct MatmulKernels {
  int block_rows;  // the most rows that go through `int8` and `int4` together

  // Rounds a row to int8 by groups; writes `padded` bytes for each group.
  void (*round_float32)(const float* x, int num_groups, int group, int padded, int8_t* q,
                        float* scales, int32_t* sums);
  void (*round_bfloat16)(const uint16_t* x, int num_groups, int group, int padded, int8_t* q,
                         float* scales, int32_t* sums);
  void (*int8[kMaxBlockRows + 1])(const MatmulBlock& block);  // by the number of rows
  void (*int4[kMaxBlockRows + 1])(const MatmulBlock& block);
};

extern const MatmulKernels kMatmulPortable, kMatmulNeon, kMatmulAvx2, kMatmulAvx512;

// Here and not in one place, so that it is compiled for each instruction set; nothing outside may
// link to one of them.
namespace {

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline int32_t bits_of(uint16_t bfloat16) {
  return static_cast<int32_t>(static_cast<uint32_t>(bfloat16) << 16);
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Written so that the compiler vectorises it without leave to reorder: a maximum of bit patterns is
// one of magnitudes, and adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
template <typename Float>
void round_row(const Float* x, int num_groups, int group, int padded, int8_t* q, float* scales,
               int32_t* sums) {
  constexpr float kTiny = 1e-30f;  // its inverse is still finite
  constexpr float kRound = 12582912.0f;
  for (int g = 0; g < num_groups; ++g, x += group, q += padded) {
    int32_t bits = 0;
    for (int i = 0; i < group; ++i) {
      const int32_t magnitude = bits_of(x[i]) & 0x7fffffff;
      bits = magnitude > bits ? magnitude : bits;
    }
    const bool finite = bits < 0x7f800000;
    const float largest = float_of(bits);
    scales[g] = largest < kTiny ? 0.0f : largest / 127.0f;  // not finite: times zero it is NaN
    int32_t sum = 0;
    const bool rounds = finite && largest >= kTiny;
    if (rounds) {
      const float inverse = 127.0f / largest;
      for (int i = 0; i < group; ++i) {
        const float scaled = float_of(bits_of(x[i])) * inverse;
        const int32_t rounded = static_cast<int32_t>((scaled + kRound) - kRound);
        q[i] = static_cast<int8_t>(rounded);
        sum += rounded;
      }
    }
    const int written = rounds ? group : 0;
    std::memset(q + written, 0, padded - written);
    sums[g] = sum;
  }
}

}  // namespace

}  // namespace vitrail
