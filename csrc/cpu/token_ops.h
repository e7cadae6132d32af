// What a decoder does to each token between its matrix products. In torch these are some twenty
// small operations a layer, which take longer to start than to run.
//
// Values are float32 or bfloat16; everything is computed in float32 and rounded where the plain
// torch references round. A token's result depends neither on the tokens beside it, nor on the
// number of threads, nor on the instruction set.
#pragma once

#include <cstdint>

#include "cpu_features.h"

namespace vitrail {

// Addresses are of float32, or of bfloat16 where `bfloat16` says so; rows are contiguous unless a
// stride, in elements, is given.

// total = x + scale * branch, out = RMSNorm(total) * weight.
struct Norm {
  bool bfloat16;
  int64_t rows, hidden, x_stride;
  const void *x, *branch, *scale;  // branch null: total is x, and not written; scale null: 1
  const void* weight;
  void *total, *out;
  float eps;
};

// A paged cache: [block][token][head][head_dim] in any order of the first three.
struct Cache {
  void *keys, *values;
  int64_t block_size, block_stride, token_stride, head_stride;
};

// Rotates queries and keys, after an RMSNorm of each head where there are weights; queries go to
// `q`, keys and values to the slots of their tokens, where those are not negative.
struct Rope {
  bool bfloat16;
  int64_t tokens, heads, kv_heads, head_dim;
  const void *qkv, *cos, *sin;      // [tokens][(heads + 2 kv_heads) head_dim], [tokens][head_dim]
  const void *q_weight, *k_weight;  // [head_dim] or both null
  float eps;
  const int64_t* slots;  // [tokens]
  void* q;               // [tokens][heads][head_dim]
  Cache cache;
};

// One query of each sequence over the keys that it has: softmax(q k^T / sqrt(head_dim)) v. Without
// any keys the result is zero.
struct Attention {
  bool bfloat16;
  int64_t sequences, heads, kv_heads, head_dim;
  const void* q;          // [sequences][heads][head_dim]
  const int32_t* tables;  // [sequences][table_width], blocks
  int64_t table_width;
  const int32_t* contexts;  // [sequences]
  void* out;                // as q
  Cache cache;
};

void rms_norm(const Norm& work, int threads, Isa isa);
void rope_and_cache(const Rope& work, int threads, Isa isa);
void paged_decode(const Attention& work, int threads, Isa isa);

}  // namespace vitrail
