// What Python sees as `vitrail._cpu`: buffers in, their shapes checked, the interpreter lock
// released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu_features.h"
#include "quantized_matmul.h"
#include "resize.h"
#include "token_ops.h"

namespace py = pybind11;

namespace {

using vitrail::Isa;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Shorts = py::array_t<uint16_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

void check_shape(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
  if (array.ndim() == static_cast<py::ssize_t>(shape.size()) &&
      std::equal(shape.begin(), shape.end(), array.shape())) {
    return;
  }
  const auto text = [](const auto* sizes, size_t count) {
    std::string joined;
    for (size_t i = 0; i < count; ++i) joined += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    return "(" + joined + ")";
  };
  throw std::invalid_argument(std::string(name) + " has shape " +
                              text(array.shape(), array.ndim()) + ", not " +
                              text(shape.data(), shape.size()));
}

// The two structures of the Arrow C data interface, as far as they are read here.
// https://arrow.apache.org/docs/format/CDataInterface.html
struct ArrowSchema {
  const char* format;
  const char* name;
  const char* metadata;
  int64_t flags, num_children;
  ArrowSchema** children;
};
struct ArrowArray {
  int64_t length, null_count, offset, num_buffers, num_children;
  const void** buffers;
  ArrowArray** children;
};

struct Block {
  const uint8_t* pixels;
  int64_t rows;
  int pixel_bytes;
};

template <typename T>
const T* arrow_struct(const py::handle& capsule, const char* name) {
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), name);
  if (pointer == nullptr) throw py::error_already_set();
  return static_cast<const T*>(pointer);
}

// What Pillow exports of an RGB image whose rows are contiguous: its own memory, a padding byte
// behind each pixel.
Block arrow_block(const py::tuple& exported, int width) {
  if (exported.size() != 2) throw std::invalid_argument("an Arrow block is a schema and an array");
  const auto* schema = arrow_struct<ArrowSchema>(exported[0], "arrow_schema");
  const auto* array = arrow_struct<ArrowArray>(exported[1], "arrow_array");
  if (std::strcmp(schema->format, "+w:4") != 0 || schema->num_children != 1 ||
      std::strcmp(schema->children[0]->format, "C") != 0) {
    throw std::invalid_argument("an Arrow block must hold lists of four uint8");
  }
  const ArrowArray* bytes = array->children[0];
  if (array->length % width != 0 || array->offset != 0 || bytes->offset != 0 ||
      bytes->num_buffers != 2 || bytes->length < 4 * array->length) {
    throw std::invalid_argument("an Arrow block must hold whole rows of " + std::to_string(width) +
                                " pixels");
  }
  return {static_cast<const uint8_t*>(bytes->buffers[1]), array->length / width, 4};
}

Block numpy_block(const py::array& array, int width) {
  if (!py::isinstance<Bytes>(array) || array.ndim() != 3 || array.shape(1) != width ||
      array.shape(2) != 3) {
    throw std::invalid_argument("a block must be contiguous uint8 of shape (rows, " +
                                std::to_string(width) + ", 3)");
  }
  return {static_cast<const uint8_t*>(array.data()), array.shape(0), 3};
}

// grids: (columns, rows, height first) of each grid that the image fills.
void fill_tiles(Bytes tiles, const std::vector<std::tuple<int, int, bool>>& grids, int width,
                int height, const py::iterable& blocks, int threads, const std::string& isa) {
  std::vector<vitrail::Grid> all;
  int64_t num_tiles = 0;
  for (const auto& [columns, rows, down_first] : grids) {
    all.push_back({columns, rows, down_first});
    num_tiles += static_cast<int64_t>(columns) * rows;
  }
  if (tiles.ndim() != 4 || tiles.shape(0) != num_tiles || tiles.shape(1) != tiles.shape(2) ||
      tiles.shape(3) != 3) {
    throw std::invalid_argument("tiles must be uint8 of shape (" + std::to_string(num_tiles) +
                                ", size, size, 3)");
  }
  vitrail::TileResizer resizer(width, height, tiles.mutable_data(),
                               static_cast<int>(tiles.shape(1)), all, vitrail::isa_from_name(isa));
  for (const py::handle item : blocks) {
    const Block block = py::isinstance<py::tuple>(item)
                            ? arrow_block(py::cast<py::tuple>(item), width)
                            : numpy_block(py::cast<py::array>(item), width);
    py::gil_scoped_release unlocked;
    resizer.feed(block.pixels, block.rows, block.pixel_bytes, threads);
  }
  if (!resizer.complete()) throw std::invalid_argument("the blocks end before the image does");
}

// The arrays of a quantised weight, checked once and kept alive.
class Weight {
 public:
  Weight(Bytes packed, Floats scales, std::optional<Bytes> zeros, int bits, int outputs, int inputs,
         int group)
      : packed_(std::move(packed)), scales_(std::move(scales)), zeros_(std::move(zeros)) {
    weight_ = {bits,
               outputs,
               inputs,
               group,
               packed_.data(),
               scales_.data(),
               zeros_ ? zeros_->data() : nullptr};
    vitrail::check(weight_);
    const py::ssize_t panels = weight_.num_panels();
    const py::ssize_t groups = weight_.num_groups();
    check_shape("packed", packed_,
                {panels, groups * weight_.steps_per_group(), vitrail::kPanel, 4});
    check_shape("scales", scales_, {panels, groups, vitrail::kPanel});
    if (zeros_) check_shape("zeros", *zeros_, {panels, groups, vitrail::kPanel});
  }

  void multiply(const py::array& x, const std::optional<Floats>& bias, py::array y, int threads,
                const std::string& isa) const {
    const bool single = py::isinstance<Floats>(x);
    if (!single && !py::isinstance<Shorts>(x)) {
      throw std::invalid_argument("x must be contiguous float32, or uint16 that holds bfloat16");
    }
    if (single ? !py::isinstance<Floats>(y) : !py::isinstance<Shorts>(y)) {
      throw std::invalid_argument("y must be contiguous and of x's type");
    }
    const py::ssize_t rows = x.ndim() == 2 ? x.shape(0) : 0;
    check_shape("x", x, {rows, weight_.inputs});
    check_shape("y", y, {rows, weight_.outputs});
    if (bias) check_shape("bias", *bias, {weight_.outputs});
    const float* added = bias ? bias->data() : nullptr;
    const void* in = x.data();
    void* out = y.mutable_data();
    const Isa chosen = vitrail::isa_from_name(isa);
    py::gil_scoped_release unlocked;
    vitrail::quantized_matmul(weight_, in, rows,
                              single ? vitrail::FloatType::kFloat32 : vitrail::FloatType::kBFloat16,
                              added, out, threads, chosen);
  }

 private:
  Bytes packed_;
  Floats scales_;
  std::optional<Bytes> zeros_;
  vitrail::QuantizedWeight weight_;
};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Isa isa : vitrail::supported_isas()) names.emplace_back(vitrail::isa_name(isa));
  return names;
}

// The operations on tokens take addresses, as a GPU's kernels do: their launchers have checked the
// shapes, and to look into a dozen arrays would take longer than the work.
using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using CacheArguments = std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t>;

vitrail::Cache cache_of(const CacheArguments& arguments) {
  const auto& [keys, values, block_size, block_stride, token_stride, head_stride] = arguments;
  return {at(keys), at(values), block_size, block_stride, token_stride, head_stride};
}

void rms_norm(bool bfloat16, int64_t rows, int64_t hidden, int64_t x_stride, Address x,
              Address branch, Address scale, Address weight, Address total, Address out, float eps,
              int threads, const std::string& isa) {
  const Isa chosen = vitrail::isa_from_name(isa);
  py::gil_scoped_release unlocked;
  vitrail::rms_norm({bfloat16, rows, hidden, x_stride, at(x), at(branch), at(scale), at(weight),
                     at(total), at(out), eps},
                    threads, chosen);
}

void rope_and_cache(bool bfloat16, int64_t tokens, int64_t heads, int64_t kv_heads,
                    int64_t head_dim, Address qkv, Address cos, Address sin, Address q_weight,
                    Address k_weight, float eps, Address slots, Address q,
                    const CacheArguments& cache, int threads, const std::string& isa) {
  const Isa chosen = vitrail::isa_from_name(isa);
  py::gil_scoped_release unlocked;
  vitrail::rope_and_cache(
      {bfloat16, tokens, heads, kv_heads, head_dim, at(qkv), at(cos), at(sin), at(q_weight),
       at(k_weight), eps, at<int64_t>(slots), at(q), cache_of(cache)},
      threads, chosen);
}

void paged_decode(bool bfloat16, int64_t sequences, int64_t heads, int64_t kv_heads,
                  int64_t head_dim, Address q, Address tables, int64_t table_width,
                  Address contexts, Address out, const CacheArguments& cache, int threads,
                  const std::string& isa) {
  const Isa chosen = vitrail::isa_from_name(isa);
  py::gil_scoped_release unlocked;
  vitrail::paged_decode({bfloat16, sequences, heads, kv_heads, head_dim, at(q), at<int32_t>(tables),
                         table_width, at<int32_t>(contexts), at(out), cache_of(cache)},
                        threads, chosen);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Tile preprocessing, quantised matrix products and operations on tokens for CPUs.";
  module.def("instruction_sets", instruction_sets,
             "Names of the instruction sets that run here, slowest first.");
  module.def("fill_tiles", fill_tiles, py::arg("tiles").noconvert(), py::arg("grids"),
             py::arg("width"), py::arg("height"), py::arg("blocks"), py::kw_only(),
             py::arg("threads"), py::arg("isa") = "");
  py::class_<Weight>(module, "Weight", "Packed weights of a linear layer.")
      .def(py::init<Bytes, Floats, std::optional<Bytes>, int, int, int, int>(),
           py::arg("packed").noconvert(), py::arg("scales").noconvert(),
           py::arg("zeros").noconvert(), py::kw_only(), py::arg("bits"), py::arg("outputs"),
           py::arg("inputs"), py::arg("group"))
      .def("multiply", &Weight::multiply, py::arg("x"), py::arg("bias").noconvert(), py::arg("y"),
           py::kw_only(), py::arg("threads"), py::arg("isa") = "");
  module.def("rms_norm", rms_norm);
  module.def("rope_and_cache", rope_and_cache);
  module.def("paged_decode", paged_decode);
}
