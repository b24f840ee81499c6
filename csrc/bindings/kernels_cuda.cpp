// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The module _kernels_cuda: device addresses and strides in, launches on the caller's stream. It
// knows no tensor library; kvxfer.kernels._cuda takes tensors apart.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <string_view>
#include <tuple>
#include <vector>

#include "bindings/errors.hpp"
#include "common/error.hpp"
#include "kernels/cuda/kernels.hpp"

namespace py = pybind11;
namespace cuda = kvxfer::kernels::cuda;
using cuda::Element;
using kvxfer::Code;
using kvxfer::kernels::RowStrides;

namespace {

using Strides = std::array<int64_t, 3>;  // block, token, head; bytes

RowStrides strides_of(const Strides& s) { return {s[0], s[1], s[2]}; }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct AppendPart {
  uintptr_t rows, cache;
  Strides from, to;
  int32_t width;
  float scale;
};

void append_kv(const AppendPart& key, const AppendPart& value, uintptr_t slots, int64_t num_tokens,
               int32_t num_kv_heads, int64_t block_size, int from, int to, uintptr_t stream) {
  cuda::Append p{};
  const AppendPart* parts[] = {&key, &value};
  for (int i = 0; i < 2; ++i) {
    p.part[i] = {pointer<void>(parts[i]->rows),
                 pointer<void>(parts[i]->cache),
                 strides_of(parts[i]->from),
                 strides_of(parts[i]->to),
                 parts[i]->width,
                 parts[i]->scale};
  }
  p.slots = pointer<int64_t>(slots);
  p.num_tokens = num_tokens;
  p.num_kv_heads = num_kv_heads;
  p.block_size = block_size;
  p.from = static_cast<Element>(from);
  p.to = static_cast<Element>(to);
  cuda::append_kv(p, pointer<CUstream_st>(stream));
}

struct CopyPart {
  Strides src, dst;
  int32_t width;
};

// tables: bases int64, segments int64 and, where the copy is scaled, scales float32, one behind the
// other; at: their address on the device, or 0: they travel with the launch.
void copy_rows(const std::vector<CopyPart>& parts, const py::bytes& tables, uintptr_t at,
               int32_t num_layers, int64_t num_segments, int32_t num_heads, int32_t access,
               int32_t max_ctas, bool convert, bool scaled, int from, int to, uintptr_t stream) {
  if (parts.size() > cuda::kMaxParts) {
    kvxfer::fail(Code::kInvalidArgument, "parts: expected at most ", cuda::kMaxParts, ", given ",
                 parts.size());
  }
  cuda::Copy p{};
  for (size_t i = 0; i < parts.size(); ++i) {
    p.part[i] = {strides_of(parts[i].src), strides_of(parts[i].dst), parts[i].width};
  }
  p.num_parts = static_cast<int32_t>(parts.size());
  p.num_layers = num_layers;
  p.num_heads = num_heads;
  p.num_segments = num_segments;
  p.access = access;
  p.max_ctas = max_ctas;
  p.convert = convert;
  p.scaled = scaled;
  p.from = static_cast<Element>(from);
  p.to = static_cast<Element>(to);
  const std::string_view content = tables;
  const size_t expected =
      static_cast<size_t>(num_segments) * 5 * sizeof(int64_t) +
      parts.size() * static_cast<size_t>(num_layers) *
          (2 * sizeof(int64_t) + (scaled ? static_cast<size_t>(num_heads) * 2 * sizeof(float) : 0));
  if (content.size() != expected || (at == 0 && expected > cuda::kInlineTables)) {
    kvxfer::fail(Code::kInvalidArgument, "tables: expected ", expected, " bytes, at most ",
                 cuda::kInlineTables, " where they are not on the device, given ", content.size());
  }
  if (at != 0) {
    cuda::place_tables(p, pointer<void>(at));
  } else {
    std::memcpy(p.tables, content.data(), content.size());
  }
  cuda::copy_rows(p, pointer<CUstream_st>(stream));
}

// Attributes of a parameter struct: addresses are integers in Python, strides lists of three.
template <class Struct>
class Fields {
 public:
  Fields(py::module_& m, const char* name) : class_(m, name) { class_.def(py::init<>()); }

  template <class T>
  Fields& value(const char* name, T Struct::* field) {
    class_.def_readwrite(name, field);
    return *this;
  }
  template <class T>
  Fields& address(const char* name, T* Struct::* field) {
    class_.def_property(
        name, [field](const Struct& p) { return reinterpret_cast<uintptr_t>(p.*field); },
        [field](Struct& p, uintptr_t at) { p.*field = reinterpret_cast<T*>(at); });
    return *this;
  }
  Fields& strides(const char* name, RowStrides Struct::* field) {
    class_.def_property(
        name,
        [field](const Struct& p) {
          return Strides{(p.*field).block, (p.*field).token, (p.*field).head};
        },
        [field](Struct& p, const Strides& s) { p.*field = strides_of(s); });
    return *this;
  }
  Fields& element(const char* name, Element Struct::* field) {
    class_.def_property(
        name, [field](const Struct& p) { return static_cast<int>(p.*field); },
        [field](Struct& p, int tag) { p.*field = static_cast<Element>(tag); });
    return *this;
  }

 private:
  py::class_<Struct> class_;
};

void register_decode(py::module_& m) {
  using D = cuda::Decode;
  Fields<D>(m, "Decode")
      .address("q", &D::q)
      .address("out", &D::out)
      .address("lse", &D::lse)
      .address("k", &D::k)
      .address("v", &D::v)
      .strides("k_strides", &D::k_strides)
      .strides("v_strides", &D::v_strides)
      .address("block_table", &D::block_table)
      .address("seq_lens", &D::seq_lens)
      .address("sinks", &D::sinks)
      .address("items", &D::items)
      .address("partial", &D::partial)
      .address("partial_lse", &D::partial_lse)
      .address("arrived", &D::arrived)
      .value("q_batch", &D::q_batch)
      .value("q_head", &D::q_head)
      .value("out_batch", &D::out_batch)
      .value("out_head", &D::out_head)
      .value("table_row", &D::table_row)
      .value("len_step", &D::len_step)
      .value("num_items", &D::num_items)
      .value("batch", &D::batch)
      .value("num_q_heads", &D::num_q_heads)
      .value("num_kv_heads", &D::num_kv_heads)
      .value("head_dim", &D::head_dim)
      .value("block_size", &D::block_size)
      .value("num_splits", &D::num_splits)
      .value("split_size", &D::split_size)
      .value("min_split", &D::min_split)
      .value("window_left", &D::window_left)
      .value("sm_scale", &D::sm_scale)
      .value("v_scale", &D::v_scale)
      .value("soft_cap", &D::soft_cap)
      .element("q_type", &D::q_type)
      .element("kv_type", &D::kv_type);
  m.def("paged_decode",
        [](const D& p, uintptr_t stream) { cuda::paged_decode(p, pointer<CUstream_st>(stream)); });
  m.def("decode_refuses", &cuda::decode_refuses);
  m.def("decode_slots", &cuda::decode_slots);
  m.def("capture_id",
        [](uintptr_t stream) { return cuda::capture_id(pointer<CUstream_st>(stream)); });
  m.attr("DECODE_TILE") = cuda::kDecodeTile;
}

void register_merge(py::module_& m) {
  using M = cuda::Merge;
  Fields<M>(m, "Merge")
      .address("v_a", &M::v_a)
      .address("v_b", &M::v_b)
      .address("lse_a", &M::lse_a)
      .address("lse_b", &M::lse_b)
      .address("out", &M::out)
      .address("lse", &M::lse)
      .value("a_row", &M::a_row)
      .value("a_head", &M::a_head)
      .value("b_row", &M::b_row)
      .value("b_head", &M::b_head)
      .value("lse_a_row", &M::lse_a_row)
      .value("lse_a_head", &M::lse_a_head)
      .value("lse_b_row", &M::lse_b_row)
      .value("lse_b_head", &M::lse_b_head)
      .value("num_rows", &M::num_rows)
      .value("num_heads", &M::num_heads)
      .value("width", &M::width)
      .element("type", &M::type);
  m.def("merge_states",
        [](const M& p, uintptr_t stream) { cuda::merge_states(p, pointer<CUstream_st>(stream)); });
}

// parts: strides, bytes of a row, id of the part.
void checksum_blocks(const std::vector<std::tuple<Strides, int32_t, int32_t>>& parts,
                     uintptr_t bases, uintptr_t layers, int32_t num_layers, uintptr_t segments,
                     int64_t num_segments, int32_t first_head, int32_t num_heads, uintptr_t sums,
                     uintptr_t stream) {
  if (parts.size() > cuda::kMaxParts) {
    kvxfer::fail(Code::kInvalidArgument, "parts: expected at most ", cuda::kMaxParts, ", given ",
                 parts.size());
  }
  cuda::Checksum p{};
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto& [strides, row_nbytes, id] = parts[i];
    p.part[i] = {strides_of(strides), row_nbytes, id};
  }
  p.bases = pointer<int64_t>(bases);
  p.layers = pointer<int64_t>(layers);
  p.segments = pointer<int64_t>(segments);
  p.sums = pointer<uint64_t>(sums);
  p.num_parts = static_cast<int32_t>(parts.size());
  p.num_layers = num_layers;
  p.first_head = first_head;
  p.num_heads = num_heads;
  p.num_segments = num_segments;
  cuda::checksum_blocks(p, pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_kernels_cuda, m) {
  m.doc() = "KV-cache kernels for CUDA devices; use kvxfer.kernels, which checks its arguments.";
  kvxfer::bindings::register_errors();
  py::class_<AppendPart>(m, "AppendPart")
      .def(py::init<uintptr_t, uintptr_t, Strides, Strides, int32_t, float>(), py::arg("rows"),
           py::arg("cache"), py::arg("from_strides"), py::arg("to_strides"), py::arg("width"),
           py::arg("scale"));
  py::class_<CopyPart>(m, "CopyPart")
      .def(py::init<Strides, Strides, int32_t>(), py::arg("src_strides"), py::arg("dst_strides"),
           py::arg("width"));
  m.def("append_kv", &append_kv, py::arg("key"), py::arg("value"), py::kw_only(), py::arg("slots"),
        py::arg("num_tokens"), py::arg("num_kv_heads"), py::arg("block_size"),
        py::arg("from_dtype"), py::arg("to_dtype"), py::arg("stream"));
  m.def("copy_rows", &copy_rows, py::arg("parts"), py::kw_only(), py::arg("tables"), py::arg("at"),
        py::arg("num_layers"), py::arg("num_segments"), py::arg("num_heads"), py::arg("access"),
        py::arg("max_ctas"), py::arg("convert"), py::arg("scaled"), py::arg("from_dtype"),
        py::arg("to_dtype"), py::arg("stream"));
  m.attr("INLINE_TABLES") = cuda::kInlineTables;
  m.def("checksum_blocks", &checksum_blocks, py::arg("parts"), py::kw_only(), py::arg("bases"),
        py::arg("layers"), py::arg("num_layers"), py::arg("segments"), py::arg("num_segments"),
        py::arg("first_head"), py::arg("num_heads"), py::arg("sums"), py::arg("stream"));
  register_decode(m);
  register_merge(m);
  m.def("device_count", &cuda::device_count);
  m.def("reach_peer", &cuda::reach_peer, py::arg("device"), py::arg("peer"));
  m.attr("MAX_PARTS") = cuda::kMaxParts;
}
