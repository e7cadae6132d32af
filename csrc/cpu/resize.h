// Tiles of an image: Pillow's antialiased bicubic to the last bit, written straight into the tiles.
//
// Pillow resizes in two passes, one side after the other, with weights rounded to 22 bits and an
// 8-bit image between the passes; so does this. Which side comes first differs between Pillow's
// versions and is told by the caller. The image is fed from top to bottom in blocks of rows, and
// what lies between the passes is kept only for the rows that the filter still needs, so that
// everything but the image and the tiles stays in the caches.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu_features.h"

namespace vitrail {

struct Grid {
  int columns, rows;
  bool down_first;  // whether the height is resized before the width
};

class TileResizer {
 public:
  // The whole image fills each of the grids with tiles of tile_size^2 RGB pixels, row-major, one
  // grid behind the other from `tiles` on. Throws std::invalid_argument.
  TileResizer(int width, int height, uint8_t* tiles, int tile_size, const std::vector<Grid>& grids,
              Isa isa);
  ~TileResizer();

  // The next `num_rows` rows, one behind the other, with 3 or 4 bytes a pixel. Every block but the
  // last holds a multiple of kBandRows rows. Throws std::invalid_argument.
  void feed(const uint8_t* pixels, int64_t num_rows, int pixel_bytes, int threads);

  bool complete() const { return rows_fed_ == height_; }

  static constexpr int kBandRows = 16;  // rows that go through a pass together

 private:
  struct Axis;
  struct Canvas;
  class AcrossPass;
  class DownPass;
  class Strip;

  const int width_, height_;
  int rows_fed_ = 0;
  std::vector<std::unique_ptr<Canvas>> canvases_;
  std::vector<std::unique_ptr<Strip>> strips_;
};

}  // namespace vitrail
