// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The module _kernels_cpu: NumPy views in, plain parameters out. Shapes and dtypes were checked in
// Python (kvxfer.kernels); what is checked here is only what would otherwise reach memory.
#include "bindings/kernels_cpu.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/errors.hpp"
#include "bindings/gil.hpp"
#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"
#include "kernels/cpu/thread_pool.hpp"

namespace py = pybind11;
namespace cpu = kvxfer::kernels::cpu;
using kvxfer::Code;
using kvxfer::fail;
using kvxfer::bindings::WithoutGil;
using kvxfer::kernels::DType;
using kvxfer::kernels::itemsize;

namespace {

// bfloat16 has no NumPy type: it arrives as uint16; int8 arrives as itself. The 8-bit floats arrive
// as uint8, and the caller says which (`bytes_are`).
DType dtype_of(const char* name, const py::array& array, int bytes_are = -1) {
  const char kind = array.dtype().kind();
  const auto size = array.itemsize();
  if (kind == 'f' && size == 4) return DType::kFloat32;
  if (kind == 'f' && size == 2) return DType::kFloat16;
  if (kind == 'u' && size == 2) return DType::kBFloat16;
  if (kind == 'i' && size == 1) return DType::kInt8;
  const auto named = static_cast<DType>(bytes_are);
  if (kind == 'u' && size == 1 && (named == DType::kFloat8E4M3 || named == DType::kFloat8E5M2))
    return named;
  fail(Code::kInvalidArgument, name,
       ": expected float32, float16, uint16 (bfloat16), int8 or uint8 with its float type, given "
       "kind ",
       kind, " of ", size, " bytes");
}

void check_ndim(const char* name, const py::array& array, int ndim) {
  if (array.ndim() != ndim) {
    fail(Code::kInvalidArgument, name, ": expected ", ndim, " axes, given ", array.ndim());
  }
}

// Strides of axes of extent 1 mean nothing; 0 keeps them out of any product.
int64_t stride_of(const py::array& array, int axis) {
  return array.shape(axis) > 1 ? array.strides(axis) / array.itemsize() : 0;
}

cpu::Rows rows_of(const char* name, const py::array& array) {
  check_ndim(name, array, 3);
  return {const_cast<void*>(array.data()), dtype_of(name, array), stride_of(array, 0),
          stride_of(array, 1)};
}

cpu::Scales scales_of(const char* name, const std::optional<py::array>& array) {
  if (!array) return {};
  check_ndim(name, *array, 3);
  return {static_cast<float*>(const_cast<void*>(array->data())),
          {stride_of(*array, 0), stride_of(*array, 1), stride_of(*array, 2)}};
}

cpu::Cache cache_of(const char* name, const py::array& array, int bytes_are) {
  check_ndim(name, array, 4);
  return {const_cast<void*>(array.data()),
          dtype_of(name, array, bytes_are),
          {stride_of(array, 0), stride_of(array, 1), stride_of(array, 2)}};
}

template <class T>
const T* ints_of(const char* name, const py::array& array) {
  if (array.dtype().kind() != 'i' || array.itemsize() != sizeof(T)) {
    fail(Code::kInvalidArgument, name, ": expected int", sizeof(T) * 8, ", given kind ",
         array.dtype().kind(), " of ", array.itemsize(), " bytes");
  }
  const int last = static_cast<int>(array.ndim()) - 1;
  if (array.shape(last) > 1 && array.strides(last) != sizeof(T)) {
    fail(Code::kInvalidArgument, name,
         ": expected adjacent elements along the last axis, given stride ", array.strides(last),
         " bytes");
  }
  return static_cast<const T*>(array.data());
}

cpu::Attention attention_of(const py::array& q, const py::array& k_cache, const py::array& v_cache,
                            const py::array& block_table, const py::array& seq_lens, py::array& out,
                            std::optional<py::array>& lse, float sm_scale, float v_scale,
                            int64_t window_left, float logits_soft_cap,
                            const std::optional<py::array>& sinks,
                            const std::optional<py::array>& k_scales,
                            const std::optional<py::array>& v_scales, int bytes_are) {
  cpu::Attention a;
  a.q = rows_of("q", q);
  a.out = rows_of("out", out);
  a.k = cache_of("k_cache", k_cache, bytes_are);
  a.v = cache_of("v_cache", v_cache, bytes_are);
  a.k_scales = scales_of("k_scale_cache", k_scales);
  a.v_scales = scales_of("v_scale_cache", v_scales);
  check_ndim("block_table", block_table, 2);
  a.block_table = ints_of<int32_t>("block_table", block_table);
  a.table_stride = stride_of(block_table, 0);
  a.max_blocks = block_table.shape(1);
  a.seq_lens = ints_of<int32_t>("seq_lens", seq_lens);
  a.batch = seq_lens.shape(0);
  a.num_q_heads = q.shape(1);
  a.head_dim = q.shape(2);
  a.num_blocks = k_cache.shape(0);
  a.block_size = k_cache.shape(1);
  a.num_kv_heads = k_cache.shape(2);
  a.head_dim_v = v_cache.shape(3);
  a.sm_scale = sm_scale;
  a.v_scale = v_scale;
  a.window_left = window_left;
  a.logits_soft_cap = logits_soft_cap;
  if (sinks) a.sinks = static_cast<const float*>(sinks->data());
  if (lse) {
    a.lse = static_cast<float*>(lse->mutable_data());
    a.lse_stride = stride_of(*lse, 0);
  }
  return a;
}

cpu::Append append_of(const py::array& key, const py::array& value, py::array& k_cache,
                      py::array& v_cache, const py::array& slot_mapping, float k_scale,
                      float v_scale, const std::optional<py::array>& k_scales,
                      const std::optional<py::array>& v_scales, int bytes_are) {
  cpu::Append p;
  p.key = rows_of("key", key);
  p.value = rows_of("value", value);
  p.k = cache_of("k_cache", k_cache, bytes_are);
  p.v = cache_of("v_cache", v_cache, bytes_are);
  p.k_scales = scales_of("k_scale_cache", k_scales);
  p.v_scales = scales_of("v_scale_cache", v_scales);
  p.slots = ints_of<int64_t>("slot_mapping", slot_mapping);
  p.num_tokens = key.shape(0);
  p.num_kv_heads = key.shape(1);
  p.head_dim = key.shape(2);
  p.head_dim_v = value.shape(2);
  p.num_blocks = k_cache.shape(0);
  p.block_size = k_cache.shape(1);
  p.k_scale = k_scale;
  p.v_scale = v_scale;
  return p;
}

void append_kv(const py::array& key, const py::array& value, py::array& k_cache, py::array& v_cache,
               const py::array& slot_mapping, float k_scale, float v_scale,
               const std::optional<py::array>& k_scales, const std::optional<py::array>& v_scales,
               int bytes_are) {
  const cpu::Append p = append_of(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale,
                                  k_scales, v_scales, bytes_are);
  const WithoutGil release;
  cpu::append_kv(p);
}

// An append whose arrays were looked at once, for others of the same shapes, strides and dtypes: a
// view of each would take longer than the work.
struct AppendAgain {
  cpu::Append params;

  void operator()(uintptr_t key, uintptr_t value, uintptr_t k_cache, uintptr_t v_cache,
                  uintptr_t slot_mapping) const {
    cpu::Append p = params;
    p.key.data = reinterpret_cast<void*>(key);
    p.value.data = reinterpret_cast<void*>(value);
    p.k.data = reinterpret_cast<void*>(k_cache);
    p.v.data = reinterpret_cast<void*>(v_cache);
    p.slots = reinterpret_cast<const int64_t*>(slot_mapping);
    const WithoutGil release;
    cpu::append_kv(p);
  }
};

void paged_decode(const py::array& q, const py::array& k_cache, const py::array& v_cache,
                  const py::array& block_table, const py::array& seq_lens, py::array out,
                  std::optional<py::array> lse, float sm_scale, float v_scale, int64_t window_left,
                  float logits_soft_cap, const std::optional<py::array>& sinks,
                  const std::optional<py::array>& k_scales,
                  const std::optional<py::array>& v_scales, int bytes_are, int64_t split_size) {
  cpu::Attention a =
      attention_of(q, k_cache, v_cache, block_table, seq_lens, out, lse, sm_scale, v_scale,
                   window_left, logits_soft_cap, sinks, k_scales, v_scales, bytes_are);
  a.split_size = split_size;
  const WithoutGil release;
  cpu::paged_decode(a);
}

void paged_prefill(const py::array& q, const py::array& k_cache, const py::array& v_cache,
                   const py::array& cu_seqlens_q, const py::array& block_table,
                   const py::array& seq_lens, py::array out, std::optional<py::array> lse,
                   bool causal, float sm_scale, float v_scale, int64_t window_left,
                   float logits_soft_cap, const std::optional<py::array>& sinks,
                   const std::optional<py::array>& k_scales,
                   const std::optional<py::array>& v_scales, int bytes_are) {
  cpu::Attention a =
      attention_of(q, k_cache, v_cache, block_table, seq_lens, out, lse, sm_scale, v_scale,
                   window_left, logits_soft_cap, sinks, k_scales, v_scales, bytes_are);
  a.cu_seqlens_q = ints_of<int32_t>("cu_seqlens_q", cu_seqlens_q);
  a.causal = causal;
  const WithoutGil release;
  cpu::paged_prefill(a);
}

void merge_states(const py::array& v_a, const py::array& lse_a, const py::array& v_b,
                  const py::array& lse_b, py::array out, py::array lse) {
  cpu::Merge m;
  m.a = rows_of("v_a", v_a);
  m.b = rows_of("v_b", v_b);
  m.out = rows_of("out", out);
  m.lse_a = static_cast<const float*>(lse_a.data());
  m.lse_b = static_cast<const float*>(lse_b.data());
  m.lse_a_stride = stride_of(lse_a, 0);
  m.lse_b_stride = stride_of(lse_b, 0);
  m.lse = static_cast<float*>(lse.mutable_data());
  m.num_rows = v_a.shape(0);
  m.num_heads = v_a.shape(1);
  m.head_dim = v_a.shape(2);
  const WithoutGil release;
  cpu::merge_states(m);
}

using Strides = std::array<int64_t, 3>;
using Extent = std::array<int64_t, 2>;

void checksum_rows(const py::array_t<int64_t, py::array::c_style>& bases,
                   const py::array_t<int64_t, py::array::c_style>& layers,
                   const py::array_t<int64_t, py::array::c_style>& block_ids,
                   const py::array_t<uint32_t, py::array::c_style>& keys, py::array sums,
                   int64_t part_id, int64_t row_bytes, const Strides& strides, const Extent& extent,
                   const Extent& tokens, const Extent& heads) {
  if (sums.dtype().kind() != 'u' || sums.itemsize() != 8 || sums.size() != bases.size() ||
      layers.size() != bases.size()) {
    fail(Code::kInvalidArgument, "sums, layers: expected ", bases.size(), " uint64 and int64");
  }
  const int64_t words = (row_bytes + 7) / 8 * 2;
  if (row_bytes < 0 || words > keys.size() || tokens[0] < 0 || extent[1] <= 0 ||
      tokens[1] > block_ids.size() * extent[1]) {
    fail(Code::kInvalidArgument, "row_bytes, tokens: expected at most ", keys.size() * 4, " and ",
         block_ids.size() * extent[1], ", given ", row_bytes, " and ", tokens[1]);
  }
  cpu::Checksum p;
  p.bases = bases.data();
  p.layers = layers.data();
  p.sums = static_cast<uint64_t*>(sums.mutable_data());
  p.block_ids = block_ids.data();
  p.keys = keys.data();
  p.num_layers = bases.size();
  p.part_id = part_id;
  p.row_bytes = row_bytes;
  p.strides = {strides[0], strides[1], strides[2]};
  p.num_blocks = extent[0];
  p.block_size = extent[1];
  p.first_token = tokens[0];
  p.end_token = tokens[1];
  p.first_head = heads[0];
  p.num_heads = heads[1];
  const WithoutGil release;
  cpu::checksum_rows(p);
}

// For measurements. Blocks of nbytes at these offsets of each array: the first of all arrays, the
// second of all, ...
uint64_t read_blocks(const std::vector<py::array>& arrays,
                     const py::array_t<int64_t, py::array::c_style>& offsets, int64_t nbytes) {
  std::vector<const char*> blocks;
  blocks.reserve(arrays.size() * static_cast<size_t>(offsets.size()));
  for (py::ssize_t i = 0; i < offsets.size(); ++i) {
    const int64_t offset = offsets.data()[i];
    for (const py::array& array : arrays) {
      if (offset < 0 || nbytes < 0 || offset > array.nbytes() - nbytes) {
        fail(Code::kInvalidArgument, "offsets[", i, "]: expected 0 to ", array.nbytes() - nbytes,
             ", given ", offset);
      }
      blocks.push_back(static_cast<const char*>(array.data()) + offset);
    }
  }
  const WithoutGil release;
  return cpu::read_blocks(blocks.data(), static_cast<int64_t>(blocks.size()), nbytes);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = KVXFER_COMPILER;
  info["isa"] = cpu::isa_name();
  info["isas"] = cpu::available_isas();
  info["cpu"] = true;
  info["cuda"] = static_cast<bool>(KVXFER_BUILT_WITH_CUDA);
  info["cuda_reason"] = KVXFER_BUILT_WITHOUT_CUDA_REASON;
  return info;
}

}  // namespace

PYBIND11_MODULE(_kernels_cpu, m) {
  m.doc() = "KV-cache kernels for the CPU; use kvxfer.kernels, which checks its arguments.";
  kvxfer::bindings::register_errors();
  m.def("append_kv", &append_kv, py::arg("key"), py::arg("value"), py::arg("k_cache"),
        py::arg("v_cache"), py::arg("slot_mapping"), py::kw_only(), py::arg("k_scale"),
        py::arg("v_scale"), py::arg("k_scale_cache"), py::arg("v_scale_cache"),
        py::arg("bytes_are"));
  py::class_<AppendAgain>(m, "AppendAgain")
      .def(py::init([](const py::array& key, const py::array& value, py::array& k_cache,
                       py::array& v_cache, const py::array& slot_mapping, float k_scale,
                       float v_scale, int bytes_are) {
             return AppendAgain{append_of(key, value, k_cache, v_cache, slot_mapping, k_scale,
                                          v_scale, {}, {}, bytes_are)};
           }),
           py::arg("key"), py::arg("value"), py::arg("k_cache"), py::arg("v_cache"),
           py::arg("slot_mapping"), py::kw_only(), py::arg("k_scale"), py::arg("v_scale"),
           py::arg("bytes_are"))
      .def("__call__", &AppendAgain::operator(), py::arg("key"), py::arg("value"),
           py::arg("k_cache"), py::arg("v_cache"), py::arg("slot_mapping"));
  m.def("paged_decode", &paged_decode, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
        py::arg("block_table"), py::arg("seq_lens"), py::arg("out"), py::arg("lse"), py::kw_only(),
        py::arg("sm_scale"), py::arg("v_scale"), py::arg("window_left"), py::arg("logits_soft_cap"),
        py::arg("sinks"), py::arg("k_scale_cache"), py::arg("v_scale_cache"), py::arg("bytes_are"),
        py::arg("split_size"));
  m.def("paged_prefill", &paged_prefill, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
        py::arg("cu_seqlens_q"), py::arg("block_table"), py::arg("seq_lens"), py::arg("out"),
        py::arg("lse"), py::kw_only(), py::arg("causal"), py::arg("sm_scale"), py::arg("v_scale"),
        py::arg("window_left"), py::arg("logits_soft_cap"), py::arg("sinks"),
        py::arg("k_scale_cache"), py::arg("v_scale_cache"), py::arg("bytes_are"));
  m.def("merge_states", &merge_states, py::arg("v_a"), py::arg("lse_a"), py::arg("v_b"),
        py::arg("lse_b"), py::arg("out"), py::arg("lse"));
  kvxfer::bindings::register_copies(m);
  m.def("checksum_rows", &checksum_rows, py::arg("bases"), py::arg("layers"), py::arg("block_ids"),
        py::arg("keys"), py::arg("sums"), py::kw_only(), py::arg("part_id"), py::arg("row_bytes"),
        py::arg("strides"), py::arg("extent"), py::arg("tokens"), py::arg("heads"));
  m.def("read_blocks", &read_blocks, py::arg("arrays"), py::arg("offsets"), py::arg("nbytes"));
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("num_threads"));
  m.def("get_num_threads", &cpu::get_num_threads);
  m.def("set_isa", &cpu::set_isa, py::arg("name"));
  m.def("build_info", &build_info);
}
