#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "resize_kernels.h"
#include "threads.h"

namespace vitrail {
namespace {

constexpr int kBandRows = TileResizer::kBandRows;
constexpr int kMaxStripWidth = 224;  // its buffers fit into a level-2 cache; a tile makes two

constexpr int kSlack = 4;  // bytes behind a buffer of quads: 12 are written as 16

int quads_of(int pixels) { return pixels / 4 + (pixels % 4 != 0); }

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

const ResizeKernels& kernels_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return kResizeAvx512;
    case Isa::kAvx2:
      return kResizeAvx2;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return kResizeNeon;
#endif
    default:
      return kResizePortable;
  }
}

}  // namespace

// The filter along one side: for each output pixel the quads of source pixels that it sees, and
// their packed weights.
struct TileResizer::Axis {
  struct Window {
    int first_quad, num_quads;
    int end;  // behind the last source pixel
  };
  std::vector<Window> windows;
  int max_quads = 0;
  std::vector<uint32_t> words;  // [window][max_quads][kQuadWords], zero behind a window's quads

  // Operation for operation what Pillow computes, down to the length in single precision: every
  // bit depends on it.
  Axis(int source, int size, const ResizeKernels& kernels) {
    const double scale = static_cast<double>(static_cast<float>(source)) / size;
    const double filter_scale = std::max(scale, 1.0);
    const double support = 2.0 * filter_scale;
    const double inverse = 1.0 / filter_scale;
    const auto center = [&](int i) { return (i + 0.5) * scale; };
    const auto begin = [&](int i) {
      return std::max(static_cast<int>(center(i) - support + 0.5), 0);
    };
    for (int i = 0; i < size; ++i) {
      const int end = std::min(static_cast<int>(center(i) + support + 0.5), source);
      const int first_quad = begin(i) / 4;
      windows.push_back({first_quad, quads_of(end) - first_quad, end});
      max_quads = std::max(max_quads, windows.back().num_quads);
    }
    words.resize(static_cast<size_t>(size) * max_quads * kQuadWords);
    std::vector<double> weights;
    std::vector<int32_t> fixed;
    for (int i = 0; i < size; ++i) {
      const Window& window = windows[i];
      weights.clear();
      double total = 0.0;
      for (int pixel = begin(i); pixel < window.end; ++pixel) {
        weights.push_back(bicubic((pixel - center(i) + 0.5) * inverse));
        total += weights.back();
      }
      fixed.assign(static_cast<size_t>(window.num_quads) * 4, 0);
      for (int pixel = begin(i); pixel < window.end; ++pixel) {
        const double weight = weights[pixel - begin(i)] / (total != 0.0 ? total : 1.0);
        fixed[pixel - 4 * window.first_quad] =
            static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kWeightBits));
      }
      for (int q = 0; q < window.num_quads; ++q) {
        const size_t at = static_cast<size_t>(i) * max_quads + q;
        kernels.pack(&fixed[static_cast<size_t>(q) * 4], &words[at * kQuadWords]);
      }
    }
  }

  const uint32_t* words_of(int i) const {
    return &words[static_cast<size_t>(i) * max_quads * kQuadWords];
  }
};

// What the whole image is resized to.
struct TileResizer::Canvas {
  uint8_t* tiles;
  int tile_size;
  Grid grid;
  Axis across, down;

  uint8_t* at(int x, int y) const {
    const size_t tile = static_cast<size_t>(y / tile_size) * grid.columns + x / tile_size;
    return tiles + ((tile * tile_size + y % tile_size) * tile_size + x % tile_size) * 3;
  }
};

// Resizes the width of up to kBandRows rows, for the output columns [begin, end).
class TileResizer::AcrossPass {
 public:
  AcrossPass(const Axis& axis, const ResizeKernels& kernels, int begin, int end)
      : axis_(axis), kernels_(kernels), begin_(begin), end_(end) {
    first_quad_ = axis.windows[begin].first_quad;
    int last_quad = first_quad_;
    for (int x = begin; x < end; ++x) {
      first_quad_ = std::min(first_quad_, axis.windows[x].first_quad);
      last_quad = std::max(last_quad, axis.windows[x].first_quad);
    }
    num_quads_ = last_quad + axis.max_quads - first_quad_;
    bands_.resize(static_cast<size_t>(num_quads_ + 1) * kQuadBytes + kSlack);
    for (int q = 0; q < num_quads_; ++q) {
      quads_.push_back(&bands_[static_cast<size_t>(q) * kQuadBytes]);
    }
    resized_.resize(static_cast<size_t>(end - begin) * kPixelBytes + kSlack);
  }

  int first_pixel() const { return 4 * first_quad_; }
  int end_pixel() const { return 4 * (first_quad_ + num_quads_); }

  // From rows of `width` pixels, the first of which is first_pixel(), to [column][kBandRows][3],
  // with kSlack bytes behind that may be read. What is in rows behind `num_rows` is undefined.
  const uint8_t* run(const uint8_t* pixels, ptrdiff_t row_bytes, int num_rows, int width,
                     int pixel_bytes) {
    // The last two to five pixels of the rows take a way round, as two quads: 16 bytes from where
    // their quads start may not be ours to read.
    const int whole = std::max(0, std::min(num_quads_, (width - 2) / 4));
    const int quad_bytes = 4 * pixel_bytes;
    kernels_.interleave(bands_.data(), kQuadBytes, pixels, quad_bytes, whole, row_bytes, num_rows,
                        pixel_bytes);
    if (whole < num_quads_) {
      uint8_t rest[kBandRows][48] = {};
      const size_t rest_pixels = std::min(width - 4 * whole, 8);
      for (int row = 0; row < num_rows; ++row) {
        std::memcpy(rest[row],
                    pixels + row * row_bytes + static_cast<ptrdiff_t>(whole) * quad_bytes,
                    rest_pixels * pixel_bytes);
      }
      kernels_.interleave(&bands_[static_cast<size_t>(whole) * kQuadBytes], kQuadBytes, rest[0],
                          quad_bytes, 2, sizeof(rest[0]), num_rows, pixel_bytes);
    }
    for (int x = begin_; x < end_; ++x) {
      // As many quads for every column: a loop of varying length is mispredicted most of the time.
      kernels_.weigh(&resized_[static_cast<size_t>(x - begin_) * kPixelBytes],
                     &quads_[axis_.windows[x].first_quad - first_quad_], axis_.max_quads,
                     axis_.words_of(x), num_rows * 3);
    }
    return resized_.data();
  }

  static constexpr int kPixelBytes = kBandRows * 3;  // of a column of the result

 private:
  static constexpr int kQuadBytes = kBandRows * 12;  // of four columns

  const Axis& axis_;
  const ResizeKernels& kernels_;
  const int begin_, end_;
  int first_quad_, num_quads_;
  std::vector<uint8_t> bands_;         // [quad][row][12]
  std::vector<const uint8_t*> quads_;  // into it
  std::vector<uint8_t> resized_;       // [column][row][3]
};

// Resizes the height of rows of `width` pixels, which come in quads of rows from the top.
class TileResizer::DownPass {
 public:
  DownPass(const Axis& axis, const ResizeKernels& kernels, int width)
      : axis_(axis),
        kernels_(kernels),
        width_(width),
        slots_(axis.max_quads + kBandRows / 4),
        slot_bytes_((static_cast<size_t>(width) * 12 + kSlack + 63) / 64 * 64) {
    rows_.resize(slots_ * slot_bytes_);
    for (int slot = 0; slot < 2 * slots_; ++slot) {  // twice: the quads of a window stand in a line
      quads_.push_back(&rows_[slot % slots_ * slot_bytes_]);
    }
  }

  // Where the four rows from `row` on are to be put: [pixel][12], and kSlack bytes.
  uint8_t* quad(int row) { return &rows_[row / 4 % slots_ * slot_bytes_]; }

  // The next output row, -1 where its source rows have not all come yet, or none is left.
  int next(int rows_fed) const {
    const bool ready =
        next_ < static_cast<int>(axis_.windows.size()) && axis_.windows[next_].end <= rows_fed;
    return ready ? next_ : -1;
  }

  void write_next(uint8_t* out) {
    const Axis::Window& window = axis_.windows[next_];
    kernels_.weigh(out, &quads_[window.first_quad % slots_], window.num_quads,
                   axis_.words_of(next_), width_ * 3);
    ++next_;
  }

 private:
  const Axis& axis_;
  const ResizeKernels& kernels_;
  const int width_, slots_;
  const size_t slot_bytes_;
  int next_ = 0;
  std::vector<uint8_t> rows_;          // [row quad % slots_][pixel][12]
  std::vector<const uint8_t*> quads_;  // into it
};

// Some columns of a canvas, all in one column of tiles, with all that it takes to fill them: strips
// share nothing, so that each can be filled by another thread.
class TileResizer::Strip {
 public:
  Strip(const Canvas& canvas, const ResizeKernels& kernels, int width, int begin, int end)
      : canvas_(canvas),
        kernels_(kernels),
        begin_(begin),
        end_(end),
        across_(canvas.across, kernels, begin, end),
        seen_(std::min(across_.end_pixel(), width) - across_.first_pixel()),
        down_(canvas.down, kernels, canvas.grid.down_first ? seen_ : end - begin) {
    if (canvas.grid.down_first) between_.resize(static_cast<size_t>(kBandRows) * seen_ * 3);
  }

  // Up to kBandRows whole rows of `width` pixels, from `row` on.
  void feed(const uint8_t* pixels, ptrdiff_t row_bytes, int row, int num_rows, int width,
            int pixel_bytes, bool last) {
    const uint8_t* in = pixels + static_cast<ptrdiff_t>(across_.first_pixel()) * pixel_bytes;
    if (canvas_.grid.down_first) {
      interleave_rows(in, row_bytes, row, num_rows, pixel_bytes);
      resize_down_first(row + num_rows, last);
    } else {
      const uint8_t* resized =
          across_.run(in, row_bytes, num_rows, width - across_.first_pixel(), pixel_bytes);
      for (int quad_row = 0; quad_row < num_rows; quad_row += 4) {
        kernels_.interleave(down_.quad(row + quad_row), 0, resized + quad_row * 3, 0, 1,
                            AcrossPass::kPixelBytes, end_ - begin_, 3);
      }
      for (int y; (y = down_.next(row + num_rows)) >= 0;) down_.write_next(canvas_.at(begin_, y));
    }
  }

 private:
  void interleave_rows(const uint8_t* pixels, ptrdiff_t row_bytes, int row, int num_rows,
                       int pixel_bytes) {
    for (int quad_row = 0; quad_row < num_rows; quad_row += 4) {
      const uint8_t* rows[4];
      uint8_t last[4][4] = {};  // 4 bytes from a row's last pixel may not be ours to read
      const uint8_t* last_rows[4] = {last[0], last[1], last[2], last[3]};
      for (int i = 0; i < 4; ++i) {  // rows behind the image have no weight
        rows[i] = pixels + std::min(quad_row + i, num_rows - 1) * row_bytes;
        std::memcpy(last[i], rows[i] + static_cast<ptrdiff_t>(seen_ - 1) * pixel_bytes, 3);
      }
      uint8_t* out = down_.quad(row + quad_row);
      kernels_.interleave_rows(out, rows, seen_ - 1, pixel_bytes);
      kernels_.interleave_rows(out + static_cast<ptrdiff_t>(seen_ - 1) * 12, last_rows, 1, 4);
    }
  }

  void resize_down_first(int rows_fed, bool last) {
    const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(seen_) * 3;
    for (int y; (y = down_.next(rows_fed)) >= 0;) {
      down_.write_next(&between_[waiting_ * row_bytes]);
      if (++waiting_ == kBandRows) resize_across_waiting(y + 1);
    }
    if (last && waiting_ > 0) resize_across_waiting(static_cast<int>(canvas_.down.windows.size()));
  }

  void resize_across_waiting(int end_row) {
    const uint8_t* resized =
        across_.run(between_.data(), static_cast<ptrdiff_t>(seen_) * 3, waiting_, seen_, 3);
    for (int row = 0; row < waiting_; ++row) {
      uint8_t* out = canvas_.at(begin_, end_row - waiting_ + row);
      const uint8_t* in = resized + row * 3;
      for (int x = begin_; x < end_; ++x, out += 3, in += AcrossPass::kPixelBytes) {
        std::memcpy(out, in, 3);
      }
    }
    waiting_ = 0;
  }

  const Canvas& canvas_;
  const ResizeKernels& kernels_;
  const int begin_, end_;
  AcrossPass across_;
  const int seen_;  // source columns
  DownPass down_;
  std::vector<uint8_t> between_;  // where the height comes first: output rows, [row][seen_][3]
  int waiting_ = 0;               // rows in it
};

TileResizer::TileResizer(int width, int height, uint8_t* tiles, int tile_size,
                         const std::vector<Grid>& grids, Isa isa)
    : width_(width), height_(height) {
  const ResizeKernels& kernels = kernels_of(isa);
  for (const Grid& grid : grids) {
    if (std::min({width, height, tile_size, grid.columns, grid.rows}) < 1) {
      throw std::invalid_argument("an image and a grid of tiles have at least one pixel");
    }
    canvases_.push_back(std::unique_ptr<Canvas>(
        new Canvas{tiles, tile_size, grid, Axis(width, grid.columns * tile_size, kernels),
                   Axis(height, grid.rows * tile_size, kernels)}));
    const int parts = (tile_size + kMaxStripWidth - 1) / kMaxStripWidth;
    const auto border = [&](int index) {
      return index / parts * tile_size + index % parts * tile_size / parts;
    };
    for (int part = 0; part < grid.columns * parts; ++part) {
      strips_.push_back(std::make_unique<Strip>(*canvases_.back(), kernels, width, border(part),
                                                border(part + 1)));
    }
    tiles += static_cast<size_t>(grid.columns) * grid.rows * tile_size * tile_size * 3;
  }
}

TileResizer::~TileResizer() = default;

void TileResizer::feed(const uint8_t* pixels, int64_t num_rows, int pixel_bytes, int threads) {
  const int missing = height_ - rows_fed_;
  if (num_rows < 1 || num_rows > missing || (num_rows % kBandRows != 0 && num_rows != missing)) {
    throw std::invalid_argument(
        "a block of " + std::to_string(num_rows) + " rows where " + std::to_string(missing) +
        " are missing and all but the last block hold a multiple of " + std::to_string(kBandRows));
  }
  const int rows = static_cast<int>(num_rows);
  const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(width_) * pixel_bytes;
  parallel_for(static_cast<int>(strips_.size()), threads, [&](int index) {
    for (int row = 0; row < rows; row += kBandRows) {
      const int band = std::min(kBandRows, rows - row);
      strips_[index]->feed(pixels + row * row_bytes, row_bytes, rows_fed_ + row, band, width_,
                           pixel_bytes, rows_fed_ + row + band == height_);
    }
  });
  rows_fed_ += rows;
}

}  // namespace vitrail
