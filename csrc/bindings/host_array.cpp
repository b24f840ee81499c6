// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "bindings/host_array.hpp"

#include <pybind11/numpy.h>

#include <cstring>

#include "bindings/dlpack.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

constexpr uint32_t kNumPy = 1u << 31;  // beside DLPack's code, bits and lanes

std::optional<HostArray> of_numpy(py::handle array, bool written) {
  using Api = py::detail::npy_api;
  const auto* a = py::detail::array_proxy(array.ptr());
  const auto dtype = py::reinterpret_borrow<py::array>(array).dtype();
  // Numbers, whose dtype's number says all of it.
  const bool plain = std::strchr("biufc", dtype.kind()) != nullptr && dtype.byteorder() != '>';
  const bool right = (a->flags & Api::NPY_ARRAY_C_CONTIGUOUS_) != 0 &&
                     (!written || (a->flags & Api::NPY_ARRAY_WRITEABLE_) != 0);
  if (!plain || !right) return std::nullopt;
  auto nbytes = static_cast<uint64_t>(dtype.itemsize());
  for (int i = 0; i < a->nd; ++i) nbytes *= static_cast<uint64_t>(a->dimensions[i]);
  return HostArray{reinterpret_cast<uintptr_t>(a->data), nbytes,
                   kNumPy | static_cast<uint32_t>(dtype.num())};
}

// The class's way to look at its objects, or null. The last one is remembered, under the GIL: a
// server's arrays are of one class. It is held, so that no other class ever has its address.
DlTensorFromObject exchange_of(PyTypeObject* type) {
  static PyTypeObject* known = nullptr;
  static DlTensorFromObject answer = nullptr;
  if (type == known) return answer;
  const auto own = py::reinterpret_borrow<py::dict>(type->tp_dict);
  if (!own.contains("__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = own["__dlpack_c_exchange_api__"];
  const auto* api =
      static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  if (api->major != 1) return nullptr;
  Py_INCREF(type);
  Py_XDECREF(known);
  known = type;
  return answer = api->dltensor_from_object;
}

bool is_contiguous(const DlTensor& t) {
  if (t.strides == nullptr) return true;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

std::optional<HostArray> of_exchange(PyObject* array, DlTensorFromObject look) {
  DlTensor t{};
  if (look(array, &t) != 0) {
    PyErr_Clear();  // such as a dtype that DLPack has no name for: whoever resolves it says so
    return std::nullopt;
  }
  if (t.device.device_type != kDlCpu || !is_contiguous(t)) return std::nullopt;
  uint64_t nbytes = (uint64_t{t.dtype.bits} * t.dtype.lanes + 7) / 8;
  for (int i = 0; i < t.ndim; ++i) nbytes *= static_cast<uint64_t>(t.shape[i]);
  const uint32_t dtype = t.dtype.code | uint32_t{t.dtype.bits} << 8 | uint32_t{t.dtype.lanes} << 16;
  return HostArray{reinterpret_cast<uintptr_t>(t.data) + t.byte_offset, nbytes, dtype & ~kNumPy};
}

}  // namespace

std::optional<HostArray> host_array(py::handle array, bool written) {
  PyTypeObject* type = Py_TYPE(array.ptr());
  if (type == py::detail::npy_api::get().PyArray_Type_) return of_numpy(array, written);
  if (type->tp_dict == nullptr) return std::nullopt;
  const DlTensorFromObject look = exchange_of(type);
  return look == nullptr ? std::nullopt : of_exchange(array.ptr(), look);
}

}  // namespace kvxfer::bindings
