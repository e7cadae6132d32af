// The loops of token_ops.h, written so that the compiler vectorises them without leave to reorder,
// and compiled once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "token_ops.h"

namespace vitrail {

struct TokenKernels {
  // By type: float32, bfloat16.
  void (*norm[2])(const Norm& work, int64_t row);
  void (*rope[2])(const Rope& work, int64_t token);
  // scratch: attention_scratch() floats.
  void (*attend[2])(const Attention& work, int64_t sequence, int64_t kv_head, float* scratch);
};

inline int64_t attention_scratch(const Attention& work, int64_t context) {
  return work.heads / work.kv_heads * (2 * work.head_dim + context) + work.head_dim;
}

extern const TokenKernels kTokenPortable, kTokenNeon, kTokenAvx2, kTokenAvx512;

// Here and not in one place, so that it is compiled for each instruction set; nothing outside may
// link to one of them.
namespace {

constexpr int kLanes = 16;  // of every sum, whatever the width of a vector

inline float load(float x) { return x; }
inline float load(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
T round_to(float x);
template <>
inline float round_to<float>(float x) {
  return x;
}
template <>
inline uint16_t round_to<uint16_t>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // ties to even
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}

template <typename T>
float rounded(float x) {
  return load(round_to<T>(x));
}

inline float sum_of(float (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Sum of term(i) over i < count.
template <typename Term>
float sum(int64_t count, const Term& term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  return sum_of(lanes);
}

// e^x to about one unit in the last place, for x <= 88; 0 below -87. 2^n times a polynomial for
// the rest, the Taylor series to the seventh power: it is at most ln(2) / 2 from zero.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits) << 23) + 0x3f800000;  // 2^n
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

template <typename T>
void norm_row(const Norm& work, int64_t row) {
  const int64_t hidden = work.hidden;
  const auto* x = static_cast<const T*>(work.x) + row * work.x_stride;
  const auto* weight = static_cast<const T*>(work.weight);
  auto* out = static_cast<T*>(work.out) + row * hidden;
  if (work.branch != nullptr) {
    const auto* branch = static_cast<const T*>(work.branch) + row * hidden;
    const auto* scale = static_cast<const T*>(work.scale);
    auto* total = static_cast<T*>(work.total) + row * hidden;
    if (scale == nullptr) {
      for (int64_t i = 0; i < hidden; ++i) total[i] = round_to<T>(load(x[i]) + load(branch[i]));
    } else {
      for (int64_t i = 0; i < hidden; ++i) {
        total[i] = round_to<T>(load(x[i]) + load(branch[i]) * load(scale[i]));
      }
    }
    x = total;
  }
  const float squares = sum(hidden, [x](int64_t i) { return load(x[i]) * load(x[i]); });
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(hidden) + work.eps);
  for (int64_t i = 0; i < hidden; ++i) {
    out[i] = round_to<T>(rounded<T>(load(x[i]) * factor) * load(weight[i]));
  }
}

template <typename T>
void rope_token(const Rope& work, int64_t token) {
  const int64_t d = work.head_dim, half = d / 2, turned = work.heads + work.kv_heads;
  const auto* head = static_cast<const T*>(work.qkv) + token * (turned + work.kv_heads) * d;
  const auto* cos = static_cast<const T*>(work.cos) + token * d;
  const auto* sin = static_cast<const T*>(work.sin) + token * d;
  const int64_t slot = work.slots[token], size = work.cache.block_size;
  const int64_t place = slot < 0 ? 0
                                 : slot / size * work.cache.block_stride +
                                       slot % size * work.cache.token_stride;
  for (int64_t h = 0; h < turned; ++h, head += d) {
    const bool of_query = h < work.heads;
    if (!of_query && slot < 0) continue;
    T* out = of_query ? static_cast<T*>(work.q) + (token * work.heads + h) * d
                      : static_cast<T*>(work.cache.keys) + place +
                            (h - work.heads) * work.cache.head_stride;
    const T* in = head;
    if (work.q_weight != nullptr) {
      const auto* weight = static_cast<const T*>(of_query ? work.q_weight : work.k_weight);
      const float squares = sum(d, [head](int64_t i) { return load(head[i]) * load(head[i]); });
      const float factor = 1.0f / std::sqrt(squares / static_cast<float>(d) + work.eps);
      for (int64_t i = 0; i < d; ++i) {
        out[i] = round_to<T>(rounded<T>(load(head[i]) * factor) * load(weight[i]));
      }
      in = out;
    }
    for (int64_t i = 0; i < half; ++i) {
      const float x = load(in[i]), y = load(in[half + i]);
      const float left = rounded<T>(x * load(cos[i])) - rounded<T>(y * load(sin[i]));
      const float right = rounded<T>(y * load(cos[half + i])) + rounded<T>(x * load(sin[half + i]));
      out[i] = round_to<T>(left);
      out[half + i] = round_to<T>(right);
    }
  }
  if (slot < 0) return;
  for (int64_t h = 0; h < work.kv_heads; ++h, head += d) {
    T* value = static_cast<T*>(work.cache.values) + place + h * work.cache.head_stride;
    std::memcpy(value, head, static_cast<size_t>(d) * sizeof(T));
  }
}

inline const float* as_floats(const float* x, int64_t, float*) { return x; }
inline const float* as_floats(const uint16_t* x, int64_t count, float* row) {
  for (int64_t i = 0; i < count; ++i) row[i] = load(x[i]);
  return row;
}

// Calls visit(position, row) for each key, or value, of a sequence.
template <typename T, typename Visit>
void for_each_token(const Attention& work, const void* memory, int64_t sequence, int64_t kv_head,
                    const Visit& visit) {
  const int32_t* table = work.tables + sequence * work.table_width;
  const int64_t context = work.contexts[sequence];
  for (int64_t position = 0; position < context; ++table) {
    const T* row = static_cast<const T*>(memory) + *table * work.cache.block_stride +
                   kv_head * work.cache.head_stride;
    for (int64_t i = 0; i < work.cache.block_size && position < context; ++i, ++position) {
      visit(position, row + i * work.cache.token_stride);
    }
  }
}

template <typename T>
void attend(const Attention& work, int64_t sequence, int64_t kv_head, float* scratch) {
  const int64_t d = work.head_dim, group = work.heads / work.kv_heads;
  const int64_t context = work.contexts[sequence];
  const int64_t first = (sequence * work.heads + kv_head * group) * d;
  const auto* q = static_cast<const T*>(work.q) + first;
  auto* out = static_cast<T*>(work.out) + first;
  float* queries = scratch;              // [group][d]
  float* sums = queries + group * d;     // [group][d]
  float* scores = sums + group * d;      // [group][context]
  float* row = scores + group * context;  // [d]
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t i = 0; i < group * d; ++i) {
    queries[i] = load(q[i]) * scale;
    sums[i] = 0.0f;
  }
  for_each_token<T>(work, work.cache.keys, sequence, kv_head, [&](int64_t position, const T* in) {
    const float* key = as_floats(in, d, row);
    for (int64_t g = 0; g < group; ++g) {
      const float* query = queries + g * d;
      scores[g * context + position] = sum(d, [=](int64_t i) { return query[i] * key[i]; });
    }
  });
  for (int64_t g = 0; g < group; ++g) {
    float* of_query = scores + g * context;
    float largest[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) largest[lane] = -INFINITY;
    int64_t i = 0;
    for (; i + kLanes <= context; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float score = of_query[i + lane];
        largest[lane] = score > largest[lane] ? score : largest[lane];
      }
    }
    float most = -INFINITY;
    for (; i < context; ++i) most = of_query[i] > most ? of_query[i] : most;
    for (const float lane : largest) most = lane > most ? lane : most;
    for (i = 0; i < context; ++i) of_query[i] = exponential(of_query[i] - most);
    const float total = sum(context, [of_query](int64_t at) { return of_query[at]; });
    for (i = 0; i < context; ++i) of_query[i] /= total;
  }
  for_each_token<T>(work, work.cache.values, sequence, kv_head, [&](int64_t position, const T* in) {
    const float* value = as_floats(in, d, row);
    for (int64_t g = 0; g < group; ++g) {
      const float share = scores[g * context + position];
      float* into = sums + g * d;
      for (int64_t i = 0; i < d; ++i) into[i] += share * value[i];
    }
  });
  for (int64_t i = 0; i < group * d; ++i) out[i] = round_to<T>(sums[i]);
}

constexpr TokenKernels kTokenKernels{
    {norm_row<float>, norm_row<uint16_t>},
    {rope_token<float>, rope_token<uint16_t>},
    {attend<float>, attend<uint16_t>},
};

}  // namespace

}  // namespace vitrail
