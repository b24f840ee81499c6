// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The module _kernels_cuda: device addresses and strides in, launches on the caller's stream. It
// knows no tensor library; kvxfer.kernels._cuda takes tensors apart.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/errors.hpp"
#include "common/error.hpp"
#include "kernels/cuda/kernels.hpp"

namespace py = pybind11;
namespace cuda = kvxfer::kernels::cuda;
using kvxfer::Code;
using kvxfer::kernels::DType;
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
  p.from = static_cast<DType>(from);
  p.to = static_cast<DType>(to);
  cuda::append_kv(p, pointer<CUstream_st>(stream));
}

struct CopyPart {
  Strides src, dst;
  int32_t width;
};

void copy_rows(const std::vector<CopyPart>& parts, uintptr_t bases, int32_t num_layers,
               uintptr_t segments, int64_t num_segments, int32_t num_heads, int32_t access,
               int32_t max_ctas, int from, int to, uintptr_t stream) {
  if (parts.size() > cuda::kMaxParts) {
    kvxfer::fail(Code::kInvalidArgument, "parts: expected at most ", cuda::kMaxParts, ", given ",
                 parts.size());
  }
  cuda::Copy p{};
  for (size_t i = 0; i < parts.size(); ++i) {
    p.part[i] = {strides_of(parts[i].src), strides_of(parts[i].dst), parts[i].width};
  }
  p.bases = pointer<int64_t>(bases);
  p.segments = pointer<int64_t>(segments);
  p.num_parts = static_cast<int32_t>(parts.size());
  p.num_layers = num_layers;
  p.num_heads = num_heads;
  p.num_segments = num_segments;
  p.access = access;
  p.max_ctas = max_ctas;
  p.convert = from != to;
  p.from = static_cast<DType>(from);
  p.to = static_cast<DType>(to);
  cuda::copy_rows(p, pointer<CUstream_st>(stream));
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
  m.def("copy_rows", &copy_rows, py::arg("parts"), py::kw_only(), py::arg("bases"),
        py::arg("num_layers"), py::arg("segments"), py::arg("num_segments"), py::arg("num_heads"),
        py::arg("access"), py::arg("max_ctas"), py::arg("from_dtype"), py::arg("to_dtype"),
        py::arg("stream"));
  m.def("device_count", &cuda::device_count);
  m.attr("MAX_PARTS") = cuda::kMaxParts;
}
