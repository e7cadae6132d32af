// y = x W^T + bias for weights of 8 or 4 bits, on activations that are rounded to int8 on the way.
//
// A weight is scale * (q - zero), one scale (and zero) per output and group of inputs; int8 per
// channel is the case of one group. An activation row is rounded per group, symmetrically, to its
// largest magnitude / 127. All products of a group are summed exactly, in int32; sums of groups are
// added in order in float32. A row's result therefore depends neither on the rows beside it, nor on
// the number of threads, nor on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_features.h"

namespace vitrail {

constexpr int kPanel = 16;  // outputs whose weights stand together

struct QuantizedWeight {
  int bits;             // 4 or 8
  int outputs, inputs;  // neither need be a multiple of anything
  int group;            // divides inputs; a multiple of 8 if there is more than one group
  // [panel][step][kPanel][4] bytes. 8 bits: input 4 * step + i of output n of the panel in byte
  // [n][i]. 4 bits: input 8 * step + i in its low half, input 8 * step + 4 + i in its high half.
  // The last panel and the last step are filled up with anything.
  const uint8_t* packed;
  const float* scales;   // [panel][group index][kPanel]
  const uint8_t* zeros;  // the same, or null: all are 2^(bits - 1)

  int num_panels() const { return (outputs + kPanel - 1) / kPanel; }
  int num_groups() const { return inputs / group; }
  int steps_per_group() const { return (group + inputs_per_step() - 1) / inputs_per_step(); }
  int inputs_per_step() const { return bits == 8 ? 4 : 8; }
};

// Throws std::invalid_argument where the sizes do not fit together.
void check(const QuantizedWeight& weight);

enum class FloatType { kFloat32, kBFloat16 };

// x: [rows][inputs], y: [rows][outputs], both of `type`. bias: [outputs] or null. A group of
// activations with a value that is not finite makes its row NaN.
void quantized_matmul(const QuantizedWeight& weight, const void* x, int64_t rows, FloatType type,
                      const float* bias, void* y, int threads, Isa isa);

}  // namespace vitrail
