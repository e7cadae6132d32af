// y = x W^T + bias, or silu(x G^T) * (x U^T), for up to 32 tokens and weights of 4 or 8 bits: decoding, where the time
// is that of reading the weights once.
//
// The weights are the *left* operand of the tensor cores, so that eight tokens, and not sixteen, fill an instruction.
// They were laid out offline (kernels/int4_decode.py) as the fragments of mma.m16n8k16: 16 bytes a lane hold, for 16
// outputs by 64 inputs (8 bits: 32 inputs), what the lane multiplies. Which 16 inputs of a step of 64 a lane has is
// free as long as the activations agree; they are 16 neighbours, so that the right operand comes in loads of 16 bytes,
// too, without ldmatrix, and every lane copies exactly what it needs: nothing is read twice, and no bank conflict is
// possible.
//
// The warps of a CTA share its outputs and split the inputs. Each has a ring of stages of its own, filled by cp.async,
// and waits for no other warp (but many tokens make it worth while for two warps to share activations); at the end
// their sums are added in order, so that the result is deterministic.
//
// Unpacking is exact: an integer below 128 becomes the mantissa of a float between 128 and 256 (fp16: 1024 and 2048)
// with one LOP3 for two weights, and 128 + zero is taken away again. The scale meets the sum of a stage, in float32.
#include "intrinsics.h"

namespace vitrail {
namespace {

constexpr int kStep = 64;       // inputs
constexpr int kFragment = 512;  // bytes: 16 a lane
constexpr int kScales = 64;     // bytes of scales and zeros for 16 outputs
constexpr int kDequantizeWarps = 4;

struct Decode {
  const Word4* weights;  // [tile of 16 outputs][step][bits / 4][lane]
  const Word4* scales;   // [tile][group][g][outputs g and g + 8] floats, whose last 8 bits are the zero
  const uint16_t* x;     // [tokens][inputs], a row every `x_stride` elements
  const uint16_t* bias;  // [outputs] or null
  uint16_t* y;           // [tokens][outputs], of half as many if gated
  int tokens, outputs, inputs;
  int group;  // inputs that share a scale; divides inputs, a multiple of a stage's
  int gated;  // 1: the first half of the outputs are gates of the other half
  int64_t x_stride;
};

// 128 or 1024 in a float type, whose mantissa's last bits are then whole numbers, and the upper half of minus that.
template <typename Float>
struct Magic {
  static constexpr uint32_t kOne = 0x4300, kMinus = 0xc3;
};
template <>
struct Magic<Half> {
  static constexpr uint32_t kOne = 0x6400, kMinus = 0xe4;
};

VITRAIL_INLINE constexpr uint32_t twice(uint32_t bits) { return bits * 0x10001u; }

constexpr int kAndOr = 0xea, kAndXor = 0x6a;  // (a & b) | c, (a & b) ^ c

// -(128 + zero), twice, of a scale with its zero.
template <typename Float>
VITRAIL_INLINE uint32_t minus_zero(uint32_t scale) {
  return permute_bytes<0x4040>(scale, Magic<Float>::kMinus);
}

// The fragment of 16 outputs by 16 inputs number `k` of a step, minus their zeros; those of outputs g and g + 8.
template <typename Float, int kBits>
VITRAIL_INLINE void unpack(const Word4 (&packed)[kBits / 4], int k, const uint32_t (&minus_zeros)[2],
                           uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBits == 4) {
      const uint32_t bits = packed[0].word[k] >> 4 * i;
      a[i] = add2<Float>(logic3<kAndOr>(bits, twice(0xf), twice(Magic<Float>::kOne)), minus_zeros[i % 2]);
    } else {
      const uint32_t bits = packed[k / 2].word[k % 2 * 2 + i / 2] >> 8 * (i % 2);
      if constexpr (std::is_same_v<Float, Half>) {
        a[i] = add2<Float>(logic3<kAndOr>(bits, twice(0xff), twice(Magic<Float>::kOne)), minus_zeros[i % 2]);
      } else {
        // A mantissa of bf16 has room for seven of the eight bits; the highest chooses between -128 and -256.
        a[i] = add2<Float>(logic3<kAndOr>(bits, twice(0x7f), twice(Magic<Float>::kOne)),
                           logic3<kAndXor>(bits, twice(0x80), twice(0xc380)));
      }
    }
  }
}

// A warp has kTiles of 16 outputs and kTokenTiles of 8 tokens; a CTA has kBeside warps with outputs of their own by
// kSlices of the inputs. A stage of its ring holds kDepth steps, which have one scale: the more, the fewer instructions
// beside the multiplication.
template <typename Float, int kBits, int kTiles, int kTokenTiles, int kBeside, int kSlices, int kDepth, int kStages>
VITRAIL_INLINE void int4_decode(const Decode& decode) {
  constexpr int kLoads = kBits / 4, kWarps = kBeside * kSlices;
  // A stage of a slice: weights and scales of each warp, then the activations, which they share.
  constexpr int kTileLoads = kDepth * kLoads, kXLoads = kDepth * 2 * kTokenTiles;
  constexpr uint32_t kS = kTiles * kTileLoads * kFragment, kOwn = kS + kTiles * kScales;
  constexpr uint32_t kX = kBeside * kOwn, kStage = kX + kXLoads * kFragment;
  constexpr int kSums = kTiles * kTokenTiles * 4;
  static_assert(4 * kTiles <= 32 && kWarps * kSums * 128 <= kSlices * kStages * kStage);

  const int warp = thread_index() / 32, lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int slice = warp / kBeside, beside = warp % kBeside;
  const int rounds = decode.inputs / (kDepth * kStep), groups = decode.inputs / decode.group;
  const int first = slice * rounds / kSlices, last = (slice + 1) * rounds / kSlices;

  // Tiles of a warp follow each other; where half of them are gates, they alternate with what they gate.
  const int first_tile = (block_index() * kBeside + beside) * (decode.gated ? kTiles / 2 : kTiles);
  const int pair = decode.gated ? 1 : 2, odd = decode.gated ? decode.outputs / 32 : 1;
  const auto tile_of = [&](int i) { return first_tile + i / 2 * pair + i % 2 * odd; };
  const uint32_t x_stride = static_cast<uint32_t>(decode.x_stride);
  const uint32_t tile_words = rounds * kTileLoads * 32;  // 32 bits are enough to count 16 bytes, and spare registers

  const uint32_t ring = slice * kStages * kStage, own = beside * kOwn;
  // The group of what is fetched next, and for how many rounds it still is: a division in each would be felt.
  const int rounds_of_group = decode.group / (kDepth * kStep);
  int group = first / rounds_of_group, left = rounds_of_group - first % rounds_of_group;
  const auto fetch = [&](int round, uint32_t stage) {
    if (round < last) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const Word4* from = decode.weights + (tile_of(i) * tile_words + round * kTileLoads * 32 + lane);
#pragma unroll
        for (int l = 0; l < kTileLoads; ++l) {
          copy_async<16, true>(stage + own + (i * kTileLoads + l) * kFragment + lane * 16, from + l * 32);
        }
      }
#pragma unroll
      for (int j = 0; j < kXLoads / kBeside; ++j) {
        // Load (token tile, step, half): eight neighbours of a token.
        const int i = beside * (kXLoads / kBeside) + j, token = i / (2 * kDepth) * 8 + g;
        const uint32_t input = (round * kDepth + i / 2 % kDepth) * kStep + 16 * t + 8 * (i % 2);
        copy_async<16>(stage + kX + i * kFragment + lane * 16, decode.x + (token * x_stride + input),
                       token < decode.tokens);
      }
      if (lane < 4 * kTiles) {
        const uint32_t at = (tile_of(lane / 4) * groups + group) * 4 + lane % 4;
        copy_async<16>(stage + own + kS + lane * 16, decode.scales + at);
      }
      if (--left == 0) {
        ++group;
        left = rounds_of_group;
      }
    }
    commit_copies();
  };

  float sums[kTiles][kTokenTiles][4] = {};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(first + i, ring + i * kStage);
  uint32_t stage = ring, next = ring + (kStages - 1) * kStage;
  for (int round = first; round < first + (rounds + kSlices - 1) / kSlices; ++round) {
    wait_for_copies<kStages - 2>();
    // What other lanes and warps copied for this stage is there, and all have read the one that is fetched next.
    if constexpr (kBeside == 1) {
      warp_barrier();
    } else {
      block_barrier();
    }
    fetch(round + kStages - 1, next);
    next = stage;
    stage = stage + kStage == ring + kStages * kStage ? ring : stage + kStage;
    if (round >= last) continue;  // slices differ by one round at most

    Word4 x[kTokenTiles][2 * kDepth];
#pragma unroll
    for (int i = 0; i < kXLoads; ++i) {
      x[i / (2 * kDepth)][i % (2 * kDepth)] = load_shared<Word4>(next + kX + i * kFragment + lane * 16);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Word2 scales = load_shared<Word2>(next + own + kS + i * kScales + g * 8);
      const uint32_t minus_zeros[2] = {minus_zero<Float>(scales.word[0]), minus_zero<Float>(scales.word[1])};
      float partial[kTokenTiles][4] = {};
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        Word4 packed[kLoads];
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          packed[l] = load_shared<Word4>(next + own + (i * kTileLoads + d * kLoads + l) * kFragment + lane * 16);
        }
#pragma unroll
        for (int k = 0; k < kStep / 16; ++k) {
          uint32_t a[4];
          unpack<Float, kBits>(packed, k, minus_zeros, a);
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            const Word4& right = x[j][2 * d + k / 2];
            multiply_float<Float>(partial[j], a, right.word[k % 2 * 2], right.word[k % 2 * 2 + 1]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[i][j][c] += partial[j][c] * float_of_bits(scales.word[c / 2]);
      }
    }
  }

  // Sums of all warps, in the memory of the rings: [warp][tile][token tile][4][lane].
  wait_for_copies<0>();
  block_barrier();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    store_shared((warp * kSums + i) * 128 + lane * 4, sums[i / 4 / kTokenTiles][i / 4 % kTokenTiles][i % 4]);
  }
  block_barrier();
  // Output 16 i + r of tile i of a warp.
  const auto total = [&](int of_warp, int output, int token) {
    const int fragment = (output / 16 * kTokenTiles + token / 8) * 4 + output % 16 / 8 * 2 + token % 2;
    const int owner = output % 8 * 4 + token % 8 / 2;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      sum += load_shared<float>(((i * kBeside + of_warp) * kSums + fragment) * 128 + owner * 4);
    }
    return sum;
  };
  const int results = decode.gated ? 8 * kTiles : 16 * kTiles;  // of a warp
  const int columns = decode.gated ? decode.outputs / 2 : decode.outputs;
  for (int i = thread_index(); i < kBeside * results * decode.tokens; i += 32 * kWarps) {
    const int token = i / (kBeside * results), in_block = i % (kBeside * results);
    const int of_warp = in_block / results, result = in_block % results;
    const int column = block_index() * kBeside * results + in_block;
    if (column >= columns) continue;
    float value;
    if (decode.gated) {
      const int output = result / 16 * 32 + result % 16;
      const float gate = total(of_warp, output, token);
      value = total(of_warp, output + 16, token) * gate / (1.0f + exp2_approximately(gate * -1.44269504f));
    } else {
      value = total(of_warp, result, token);
      if (decode.bias != nullptr) value += to_float<Float>(load_global(decode.bias + column));
    }
    store_global(decode.y + token * columns + column, static_cast<uint16_t>(pack_floats<Float>(value, 0.0f)));
  }
}

// The matrix that the weights stand for, rounded to 16-bit floats: (outputs, inputs). A warp writes a fragment of 16
// outputs by a step; the last outputs may be there to fill up a tile.
template <typename Float, int kBits>
VITRAIL_INLINE void dequantize(const Word4* weights, const Word2* scales, uint16_t* matrix, int outputs, int inputs,
                               int group) {
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int steps = inputs / kStep, tiles = (outputs + 15) / 16;
  const int64_t fragment = static_cast<int64_t>(block_index()) * kDequantizeWarps + thread_index() / 32;
  const int tile = static_cast<int>(fragment / steps), step = static_cast<int>(fragment % steps);
  if (tile >= tiles) return;
  Word4 packed[kBits / 4];
#pragma unroll
  for (int l = 0; l < kBits / 4; ++l) packed[l] = load_global(weights + (fragment * (kBits / 4) + l) * 32 + lane);
  const Word2 scale =
      load_global(scales + (static_cast<int64_t>(tile) * (inputs / group) + step * kStep / group) * 8 + g);
  const uint32_t minus_zeros[2] = {minus_zero<Float>(scale.word[0]), minus_zero<Float>(scale.word[1])};
  Word4 row[2][2];  // 16 neighbours of outputs g and g + 8
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k) {
    uint32_t a[4];
    unpack<Float, kBits>(packed, k, minus_zeros, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = float_of_bits(scale.word[i % 2]);
      row[i % 2][k / 2].word[k % 2 * 2 + i / 2] =
          pack_floats<Float>(to_float<Float>(a[i]) * factor, to_float<Float>(a[i] >> 16) * factor);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int output = tile * 16 + 8 * h + g;
    if (output >= outputs) continue;
    Word4* to = reinterpret_cast<Word4*>(matrix + static_cast<int64_t>(output) * inputs + step * kStep + 16 * t);
    store_global(to, row[h][0]);
    store_global(to + 1, row[h][1]);
  }
}

}  // namespace
}  // namespace vitrail

#define INT4_DECODE(name, Float, bits, tiles, token_tiles, beside, slices, depth, stages, ctas)                       \
  KERNEL(name, 32 * beside * slices, ctas,                                                                            \
         (const void* weights, const void* scales, const uint16_t* x, const uint16_t* bias, uint16_t* y, int tokens,  \
          int outputs, int inputs, int group, int gated, int64_t x_stride)) {                                         \
    vitrail::int4_decode<vitrail::Float, bits, tiles, token_tiles, beside, slices, depth, stages>(                    \
        {static_cast<const vitrail::Word4*>(weights), static_cast<const vitrail::Word4*>(scales), x, bias, y, tokens, \
         outputs, inputs, group, gated, x_stride});                                                                   \
  }
// name: bits, float type, most tokens, outputs of a CTA. The table of kernels/int4_decode.py, with CTAs an SM.
#define BOTH_FLOATS(bits, tokens, outputs, beside, slices, depth, stages, ctas)                                        \
  INT4_DECODE(int##bits##_decode_bf16_##tokens##x##outputs, BFloat16, bits, outputs / 16 / beside, tokens / 8, beside, \
              slices, depth, stages, ctas)                                                                             \
  INT4_DECODE(int##bits##_decode_fp16_##tokens##x##outputs, Half, bits, outputs / 16 / beside, tokens / 8, beside,     \
              slices, depth, stages, ctas)

BOTH_FLOATS(4, 8, 32, 1, 8, 2, 3, 1)
BOTH_FLOATS(4, 8, 64, 1, 4, 2, 3, 2)
BOTH_FLOATS(4, 16, 32, 1, 8, 1, 3, 2)
BOTH_FLOATS(4, 16, 64, 1, 4, 1, 4, 2)
BOTH_FLOATS(4, 32, 32, 1, 4, 1, 3, 2)
BOTH_FLOATS(4, 32, 64, 2, 4, 1, 4, 1)
BOTH_FLOATS(4, 32, 128, 2, 4, 1, 4, 1)
BOTH_FLOATS(8, 8, 32, 1, 4, 2, 3, 2)
BOTH_FLOATS(8, 16, 32, 1, 4, 1, 4, 2)
BOTH_FLOATS(8, 32, 32, 1, 4, 1, 3, 2)
BOTH_FLOATS(8, 32, 128, 2, 4, 1, 3, 1)

#define DEQUANTIZE(name, Float, bits)                                                                              \
  KERNEL(name, 128, 4,                                                                                             \
         (const void* weights, const void* scales, uint16_t* matrix, int outputs, int inputs, int group)) {        \
    vitrail::dequantize<vitrail::Float, bits>(static_cast<const vitrail::Word4*>(weights),                         \
                                              static_cast<const vitrail::Word2*>(scales), matrix, outputs, inputs, \
                                              group);                                                              \
  }
DEQUANTIZE(int4_dequantize_bf16, BFloat16, 4)
DEQUANTIZE(int4_dequantize_fp16, Half, 4)
DEQUANTIZE(int8_dequantize_bf16, BFloat16, 8)
DEQUANTIZE(int8_dequantize_fp16, Half, 8)
