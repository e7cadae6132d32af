#include "quantized_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "quantized_matmul_kernels.h"
#include "threads.h"

namespace vitrail {
namespace {

constexpr int kMaxRows = 240;                // rounded activations that wait at a time
constexpr int64_t kChunkBytes = 256 << 10;   // weights that stay in a level-2 cache for all rows
constexpr int64_t kThreadBytes = 128 << 10;  // weights that are worth another thread
constexpr int kChunksPerThread = 4;  // so that a thread that is held up leaves work to others

const MatmulKernels& kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return kMatmulAvx512;
    case Isa::kAvx2:
      return kMatmulAvx2;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return kMatmulNeon;
#endif
    default:
      return kMatmulPortable;
  }
}

uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // ties to even
}

// Up to kMaxRows activation rows, rounded, in blocks of as many rows as a kernel takes.
class Activations {
 public:
  // Makes room for `count` rows.
  void start(const QuantizedWeight& weight, const MatmulKernels& kernels, int count) {
    weight_ = &weight;
    kernels_ = &kernels;
    count_ = count;
    groups_ = weight.num_groups();
    padded_group_ = weight.steps_per_group() * weight.inputs_per_step();
    padded_ = static_cast<size_t>(padded_group_) * groups_;
    grow(rounded_, count * padded_);
    grow(blocks_, count * padded_);
    grow(scales_, static_cast<size_t>(count) * groups_);
    grow(sums_, static_cast<size_t>(count) * groups_);
  }

  int num_blocks() const { return (count_ + kernels_->block_rows - 1) / kernels_->block_rows; }
  int first_row(int block) const { return block * kernels_->block_rows; }
  int num_rows(int block) const {
    return std::min(kernels_->block_rows, count_ - first_row(block));
  }

  // x: the first of all rows.
  void round_block(int block, const void* x, FloatType type) {
    const int rows = num_rows(block);
    int8_t* out = &blocks_[first_row(block) * padded_];
    for (int r = 0; r < rows; ++r, out += 4) {
      const size_t row = first_row(block) + r;
      const size_t at = row * weight_->inputs;
      int8_t* rounded = &rounded_[row * padded_];
      float* scales = &scales_[row * groups_];
      int32_t* sums = &sums_[row * groups_];
      if (type == FloatType::kFloat32) {
        kernels_->round_float32(static_cast<const float*>(x) + at, groups_, weight_->group,
                                padded_group_, rounded, scales, sums);
      } else {
        kernels_->round_bfloat16(static_cast<const uint16_t*>(x) + at, groups_, weight_->group,
                                 padded_group_, rounded, scales, sums);
      }
      for (size_t i = 0; i < padded_; i += 4) std::memcpy(out + i * rows, rounded + i, 4);
    }
  }

  void multiply(int block, int panel, float (*y)[kPanel]) const {
    const size_t row = first_row(block);
    const int steps = weight_->steps_per_group();
    const size_t group_at = static_cast<size_t>(panel) * groups_;
    const auto& kernels = weight_->bits == 8 ? kernels_->int8 : kernels_->int4;
    kernels[num_rows(block)](
        {weight_->packed + group_at * steps * kPanel * 4, weight_->scales + group_at * kPanel,
         weight_->zeros ? weight_->zeros + group_at * kPanel : nullptr, groups_, steps,
         &blocks_[row * padded_], &scales_[row * groups_], &sums_[row * groups_], y});
  }

 private:
  template <typename T>
  static void grow(std::vector<T>& vector, size_t size) {
    if (vector.size() < size) vector.resize(size);
  }

  const QuantizedWeight* weight_;
  const MatmulKernels* kernels_;
  int count_, groups_, padded_group_;
  size_t padded_;                // bytes of a rounded row
  std::vector<int8_t> rounded_;  // [row][padded_]
  std::vector<int8_t> blocks_;   // [block][padded_ / 4][rows of the block][4]
  std::vector<float> scales_;    // [row][group]
  std::vector<int32_t> sums_;    // [row][group]
};

// Adds the bias and writes a row of a panel.
void store(float sums[kPanel], const float* bias, int width, FloatType type, void* y, size_t at) {
  if (bias != nullptr) {
    for (int i = 0; i < width; ++i) sums[i] += bias[i];
  }
  if (type == FloatType::kFloat32) {
    std::memcpy(static_cast<float*>(y) + at, sums, width * sizeof(float));
  } else {
    uint16_t* out = static_cast<uint16_t*>(y) + at;
    for (int i = 0; i < width; ++i) out[i] = to_bfloat16(sums[i]);
  }
}

}  // namespace

void check(const QuantizedWeight& weight) {
  if ((weight.bits != 4 && weight.bits != 8) || weight.outputs < 1 || weight.inputs < 1) {
    throw std::invalid_argument("weights have 4 or 8 bits and at least one element");
  }
  if (weight.group < 1 || weight.inputs % weight.group != 0 ||
      (weight.group % 8 != 0 && weight.group != weight.inputs)) {
    throw std::invalid_argument("groups of " + std::to_string(weight.group) + " in " +
                                std::to_string(weight.inputs) +
                                " inputs: they must divide and be a multiple of 8");
  }
  if (weight.group > 65536) {  // 65536 * 255 * 127 just fits an int32
    throw std::invalid_argument("a group of " + std::to_string(weight.group) +
                                " inputs exceeds 65536");
  }
}

void quantized_matmul(const QuantizedWeight& weight, const void* x, int64_t rows, FloatType type,
                      const float* bias, void* y, int threads, Isa isa) {
  const MatmulKernels& kernels = kernels_of(isa);
  const int panels = weight.num_panels();
  const int64_t panel_bytes =
      static_cast<int64_t>(weight.num_groups()) * weight.steps_per_group() * kPanel * 4;
  const int64_t work = panels * panel_bytes * (rows / kernels.block_rows + 1);
  threads = static_cast<int>(std::min<int64_t>(threads, work / kThreadBytes + 1));
  const int64_t by_size = panels * panel_bytes / kChunkBytes;
  const int64_t by_threads = threads > 1 ? static_cast<int64_t>(threads) * kChunksPerThread : 1;
  const int64_t chunks = std::min<int64_t>(panels, std::max(by_size, by_threads));

  // Kept from call to call: fresh pages cost more than the rounding.
  static thread_local Activations kept;
  Activations& activations = kept;  // the caller's, in all threads

  const size_t element = type == FloatType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
  for (int64_t first = 0; first < rows; first += kMaxRows) {
    const char* in = static_cast<const char*>(x) + first * weight.inputs * element;
    activations.start(weight, kernels, static_cast<int>(std::min<int64_t>(kMaxRows, rows - first)));
    parallel_for(activations.num_blocks(), threads,
                 [&](int block) { activations.round_block(block, in, type); });
    parallel_for(static_cast<int>(chunks), threads, [&](int chunk) {
      const int begin = static_cast<int>(panels * static_cast<int64_t>(chunk) / chunks);
      const int end = static_cast<int>(panels * static_cast<int64_t>(chunk + 1) / chunks);
      for (int block = 0; block < activations.num_blocks(); ++block) {
        for (int panel = begin; panel < end; ++panel) {
          float sums[kMaxBlockRows][kPanel];
          activations.multiply(block, panel, sums);
          const int n = panel * kPanel;
          for (int r = 0; r < activations.num_rows(block); ++r) {
            const size_t row = first + activations.first_row(block) + r;
            store(sums[r], bias ? bias + n : nullptr, std::min(kPanel, weight.outputs - n), type, y,
                  row * weight.outputs + n);
          }
        }
      }
    });
  }
}

}  // namespace vitrail
