// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "bindings/host_array.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "bindings/dlpack.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

constexpr uint32_t kNumPy = 1u << 31;  // beside torch's dtypes

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

// How torch.Tensor's objects are looked at; null: this torch has no such table, and their
// attributes are asked.
struct TensorClass {
  PyTypeObject* type = nullptr;
  DlTensorFromObject look = nullptr;
};

// Null where this is not torch.Tensor itself: a subclass may mean something else.
const TensorClass* tensor_class(PyTypeObject* type) {
  static TensorClass known;  // under the GIL
  if (type == known.type) return &known;
  // Not imported here: who has a tensor has torch, and it stays.
  const auto torch = py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch").ptr()));
  const py::object tensor = torch ? py::getattr(torch, "Tensor", py::none()) : py::none();
  if (tensor.ptr() != reinterpret_cast<PyObject*>(type)) return nullptr;
  known.type = type;
  known.look = nullptr;
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") != 0) {
    const auto* api = static_cast<const DlExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->major == 1) known.look = api->dltensor_from_object;
  }
  return &known;
}

// torch.dtype objects live as long as the process; the few there are get numbers as they come.
uint32_t number_of(const py::object& dtype) {
  static std::vector<PyObject*> known;  // under the GIL
  const auto found = std::find(known.begin(), known.end(), dtype.ptr());
  const auto number = static_cast<uint32_t>(found - known.begin());
  if (found == known.end()) known.push_back(py::object(dtype).release().ptr());
  return number;
}

bool wants_gradient(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!answer) throw py::error_already_set();
  return answer.ptr() != Py_False;
}

std::optional<HostArray> of_attributes(py::handle tensor) {
  if (!tensor.attr("is_cpu").cast<bool>() || !tensor.attr("is_contiguous")().cast<bool>() ||
      wants_gradient(tensor.ptr()))
    return std::nullopt;
  return HostArray{tensor.attr("data_ptr")().cast<uintptr_t>(),
                   tensor.attr("nbytes").cast<uint64_t>(), number_of(tensor.attr("dtype"))};
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

// False: not in host memory, a gradient is wanted, or DLPack has no name for such as its dtype.
// Whoever asks in detail says so.
bool look_at(PyObject* tensor, DlTensorFromObject look, DlTensor& into) {
  if (wants_gradient(tensor)) return false;
  if (look(tensor, &into) == 0) return into.device.device_type == kDlCpu;
  PyErr_Clear();
  return false;
}

uintptr_t address_of(const DlTensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
}

uint32_t number_of(const DlDataType& dtype) {
  return (dtype.code | uint32_t{dtype.bits} << 8 | uint32_t{dtype.lanes} << 16) & ~kNumPy;
}

std::optional<HostArray> of_exchange(PyObject* tensor, DlTensorFromObject look) {
  DlTensor t{};
  if (!look_at(tensor, look, t) || !is_contiguous(t)) return std::nullopt;
  uint64_t nbytes = (uint64_t{t.dtype.bits} * t.dtype.lanes + 7) / 8;
  for (int i = 0; i < t.ndim; ++i) nbytes *= static_cast<uint64_t>(t.shape[i]);
  return HostArray{address_of(t), nbytes, number_of(t.dtype)};
}

}  // namespace

std::optional<HostArray> host_array(py::handle array, bool written) {
  PyTypeObject* type = Py_TYPE(array.ptr());
  if (type == py::detail::npy_api::get().PyArray_Type_) return of_numpy(array, written);
  const TensorClass* tensors = tensor_class(type);
  if (tensors == nullptr) return std::nullopt;
  return tensors->look == nullptr ? of_attributes(array) : of_exchange(array.ptr(), tensors->look);
}

py::object tensor_facts(const py::tuple& tensors) {
  std::string facts;
  const auto add = [&](const void* from, size_t nbytes) {
    facts.append(static_cast<const char*>(from), nbytes);
  };
  py::tuple addresses(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* tensor = PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    const TensorClass* known = tensor_class(Py_TYPE(tensor));
    if (known == nullptr) return py::none();
    if (known->look == nullptr) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    DlTensor t{};
    if (!look_at(tensor, known->look, t) || t.strides == nullptr) return py::none();
    const uint32_t head[] = {number_of(t.dtype), static_cast<uint32_t>(t.ndim)};
    add(head, sizeof head);
    add(t.shape, static_cast<size_t>(t.ndim) * sizeof(int64_t));
    add(t.strides, static_cast<size_t>(t.ndim) * sizeof(int64_t));
    addresses[i] = py::int_(address_of(t));
  }
  return py::make_tuple(py::bytes(facts), addresses);
}

}  // namespace kvxfer::bindings
