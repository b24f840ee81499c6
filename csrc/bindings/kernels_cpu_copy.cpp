// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Block copies: what depends on the layouts is taken apart once, and a call brings addresses and
// ids. The short ones take microseconds, so arguments are few and come by position.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>

#include "bindings/gil.hpp"
#include "bindings/host_array.hpp"
#include "bindings/kernels_cpu.hpp"
#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/segments.hpp"

namespace py = pybind11;
namespace cpu = kvxfer::kernels::cpu;
using kvxfer::Code;
using kvxfer::Error;
using kvxfer::fail;
using kvxfer::kernels::DType;

namespace kvxfer::bindings {
namespace {

using Ids = py::array_t<int64_t, py::array::c_style>;
using Factors = std::optional<py::array_t<float, py::array::c_style>>;
using Strides = std::array<int64_t, 3>;
using Extent = std::array<int64_t, 2>;  // num_blocks, block_size
using Tokens = std::array<int64_t, 4>;  // of source and destination the origin; first, end
constexpr py::ssize_t kColumns = 5;     // of a segment
static_assert(sizeof(cpu::Segment) == kColumns * sizeof(int64_t));

std::vector<cpu::Segment> cut(const Ids& src, const Ids& dst, const Extent& src_extent,
                              const Extent& dst_extent, const Tokens& tokens, bool apart) {
  const cpu::BlockList from{"src_blocks",  src.data(),    src.size(),
                            src_extent[1], src_extent[0], tokens[0]};
  const cpu::BlockList to{"dst_blocks",  dst.data(),    dst.size(),
                          dst_extent[1], dst_extent[0], tokens[1]};
  return cpu::cut_segments(from, to, tokens[2], tokens[3], apart);
}

// int64 [n, 5]: source block and slot, destination block and slot, tokens.
py::array cut_segments(const Ids& src, const Ids& dst, const Extent& src_extent,
                       const Extent& dst_extent, const Tokens& tokens, bool apart) {
  using Segments = std::vector<cpu::Segment>;
  auto segments = std::make_unique<Segments>(cut(src, dst, src_extent, dst_extent, tokens, apart));
  const Segments& found = *segments;
  const py::capsule owner(segments.release(), [](void* p) { delete static_cast<Segments*>(p); });
  return py::array_t<int64_t>({static_cast<py::ssize_t>(found.size()), kColumns},
                              reinterpret_cast<const int64_t*>(found.data()), owner);
}

// One part of a copy between two layouts.
struct PartArguments {
  py::array_t<int64_t, py::array::c_style> bases;  // [num_layers, 4], as CopyBase
  int64_t width, row_bytes;
  Strides src_strides, dst_strides;
  int src_dtype, dst_dtype;  // both -1: bytes are copied
  Factors factors;           // [num_layers, num_heads, 2]
};

class CopyRows {
 public:
  CopyRows(const std::vector<PartArguments>& parts, int64_t num_heads, const Extent& src_extent,
           const Extent& dst_extent)
      : src_extent_(src_extent), dst_extent_(dst_extent) {
    copy_.num_heads = num_heads;
    copy_.num_layers = parts.empty() ? 0 : parts[0].bases.shape(0);
    for (const PartArguments& part : parts) add(part);
    copy_.num_parts = static_cast<int64_t>(parts_.size());
  }
  CopyRows(const CopyRows&) = delete;
  CopyRows& operator=(const CopyRows&) = delete;

  void operator()(const std::vector<uintptr_t>& src_pieces,
                  const std::vector<uintptr_t>& dst_pieces, const Ids& src, const Ids& dst,
                  const Tokens& tokens, bool apart) const {
    if (src_pieces.size() < src_pieces_ || dst_pieces.size() < dst_pieces_) {
      fail(Code::kInvalidArgument, "pieces: expected at least ", src_pieces_, " and ", dst_pieces_,
           ", given ", src_pieces.size(), " and ", dst_pieces.size());
    }
    run(src_pieces.data(), dst_pieces.data(),
        cut(src, dst, src_extent_, dst_extent_, tokens, apart));
  }

  // All tokens that both lists hold, between two arrays that are one piece each. False: this is not
  // so simple, or not allowed; nothing was copied, and whoever asks in detail is told.
  bool whole(uintptr_t src, uint64_t src_nbytes, uintptr_t dst, uint64_t dst_nbytes,
             const py::object& src_blocks, const py::object& dst_blocks) const {
    const auto is_list = [](const py::object& ids) {
      return Ids::check_(ids) && py::detail::array_proxy(ids.ptr())->nd == 1;
    };
    if (src_pieces_ > 1 || dst_pieces_ > 1 || !is_list(src_blocks) || !is_list(dst_blocks))
      return false;
    if (src < dst + dst_nbytes && dst < src + src_nbytes) return false;
    const auto from = py::reinterpret_borrow<Ids>(src_blocks);
    const auto to = py::reinterpret_borrow<Ids>(dst_blocks);
    const int64_t held = std::min(from.size() * src_extent_[1], to.size() * dst_extent_[1]);
    std::vector<cpu::Segment> segments;
    try {
      segments = cut(from, to, src_extent_, dst_extent_, {0, 0, 0, held}, false);
    } catch (const Error&) {
      return false;
    }
    run(&src, &dst, segments);
    return true;
  }

 private:
  void run(const uintptr_t* src_pieces, const uintptr_t* dst_pieces,
           const std::vector<cpu::Segment>& segments) const {
    cpu::Copy p = copy_;
    p.parts = parts_.data();
    p.src_pieces = src_pieces;
    p.dst_pieces = dst_pieces;
    p.segments = segments.data();
    p.num_segments = static_cast<int64_t>(segments.size());
    const WithoutGil release;
    cpu::copy_rows(p);
  }

  void add(const PartArguments& from) {
    if (from.bases.ndim() != 2 || from.bases.shape(0) != copy_.num_layers ||
        from.bases.shape(1) != 4) {
      fail(Code::kInvalidArgument, "bases: expected ", copy_.num_layers, " rows of 4");
    }
    cpu::CopyPart part;
    static_assert(sizeof(cpu::CopyBase) == 4 * sizeof(int64_t));
    part.bases = reinterpret_cast<const cpu::CopyBase*>(from.bases.data());
    for (int64_t i = 0; i < copy_.num_layers; ++i) {
      src_pieces_ = std::max(src_pieces_, static_cast<size_t>(part.bases[i].src_piece) + 1);
      dst_pieces_ = std::max(dst_pieces_, static_cast<size_t>(part.bases[i].dst_piece) + 1);
    }
    part.width = from.width;
    part.row_bytes = from.row_bytes;
    part.src = {from.src_strides[0], from.src_strides[1], from.src_strides[2]};
    part.dst = {from.dst_strides[0], from.dst_strides[1], from.dst_strides[2]};
    part.convert = from.src_dtype >= 0;
    if (part.convert) {
      part.src_dtype = static_cast<DType>(from.src_dtype);
      part.dst_dtype = static_cast<DType>(from.dst_dtype);
    }
    if (from.factors) {
      if (from.factors->size() != copy_.num_layers * copy_.num_heads * 2) {
        fail(Code::kInvalidArgument, "factors: expected ", copy_.num_layers * copy_.num_heads * 2,
             " numbers, given ", from.factors->size());
      }
      part.factors = from.factors->data();
    }
    parts_.push_back(part);
    kept_.push_back(from);
  }

  Extent src_extent_, dst_extent_;
  cpu::Copy copy_;
  std::vector<cpu::CopyPart> parts_;  // point into kept_
  std::vector<PartArguments> kept_;
  size_t src_pieces_ = 0, dst_pieces_ = 0;
};

}  // namespace

void register_copies(py::module_& m) {
  m.def(
      "address_of",
      [](const py::array& array) { return reinterpret_cast<uintptr_t>(array.data()); },
      py::arg("array"));
  m.def(
      "host_arrays",
      [](const py::object& src, const py::object& dst) -> py::object {
        const auto from = host_array(src, false), to = host_array(dst, true);
        if (!from || !to) return py::none();
        return py::make_tuple(from->address, from->nbytes, to->address, to->nbytes,
                              uint64_t{from->dtype} << 32 | to->dtype);
      },
      py::arg("src"), py::arg("dst"));
  m.def("tensor_facts", &tensor_facts, py::arg("tensors"));
  m.def("cut_segments", &cut_segments, py::arg("src_blocks"), py::arg("dst_blocks"),
        py::arg("src_extent"), py::arg("dst_extent"), py::arg("tokens"), py::arg("apart"));
  py::class_<PartArguments>(m, "CopyPart")
      .def(py::init<py::array_t<int64_t, py::array::c_style>, int64_t, int64_t, Strides, Strides,
                    int, int, Factors>(),
           py::kw_only(), py::arg("bases"), py::arg("width"), py::arg("row_bytes"),
           py::arg("src_strides"), py::arg("dst_strides"), py::arg("src_dtype"),
           py::arg("dst_dtype"), py::arg("factors"));
  py::class_<CopyRows>(m, "CopyRows")
      .def(py::init<const std::vector<PartArguments>&, int64_t, const Extent&, const Extent&>(),
           py::arg("parts"), py::kw_only(), py::arg("num_heads"), py::arg("src_extent"),
           py::arg("dst_extent"))
      .def("__call__", &CopyRows::operator(), py::arg("src_pieces"), py::arg("dst_pieces"),
           py::arg("src_blocks"), py::arg("dst_blocks"), py::arg("tokens"), py::arg("apart"))
      .def("whole", &CopyRows::whole, py::arg("src"), py::arg("src_nbytes"), py::arg("dst"),
           py::arg("dst_nbytes"), py::arg("src_blocks"), py::arg("dst_blocks"));
}

}  // namespace kvxfer::bindings
