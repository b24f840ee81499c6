// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "bindings/buffer.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "bindings/dlpack.hpp"
#include "bindings/errors.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

// A stack without a lock: a fork cannot leave it held, and to see it empty
// costs one load.
struct Buried {
  PyObject* object;
  Buried* next;
};
// Pushed by any thread (release: the node), taken whole by who holds the GIL
// (acquire).
std::atomic<Buried*> graveyard{nullptr};

// The object, as something that any thread may drop.
std::shared_ptr<void> bury_later(py::object object) {
  return {
      object.release().ptr(), [](void* p) {
        auto* grave = new Buried{static_cast<PyObject*>(p), graveyard.load()};
        while (!graveyard.compare_exchange_weak(grave->next, grave, std::memory_order_release)) {
        }
      }};
}

std::string type_name(const py::object& object) { return Py_TYPE(object.ptr())->tp_name; }

[[noreturn]] void not_contiguous(const std::string& what) {
  raise(Code::kInvalidArgument, what +
                                    " is not C-contiguous; pass a contiguous copy, or register the "
                                    "memory it is a view of");
}

bool contiguous(const DlTensor& t) {
  if (t.strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t i = t.ndim; i-- > 0;) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

struct One {
  Piece piece;
  bool writable;
  py::object keep;
  bool is_on_gpu = false;
};

constexpr const char* kGpuByInterface =
    "; memory of a GPU is taken from what has __cuda_array_interface__, all else must be host "
    "memory";

One from_tensor(const DlTensor& t, bool writable, py::object keep, const std::string& what) {
  if (t.device.device_type != kDlCpu)
    raise(Code::kInvalidArgument,
          what + " is on device type " + std::to_string(t.device.device_type) + kGpuByInterface);
  if (!contiguous(t)) not_contiguous(what);
  uint64_t count = 1;
  for (int32_t i = 0; i < t.ndim; ++i) count *= static_cast<uint64_t>(t.shape[i]);
  return {{static_cast<std::byte*>(t.data) + t.byte_offset, 0,
           count * t.dtype.bits * t.dtype.lanes / 8},
          writable,
          std::move(keep)};
}

One take_dlpack(const py::object& source, const std::string& what) {
  const auto device = source.attr("__dlpack_device__")().cast<py::tuple>();
  if (device[0].cast<int>() != kDlCpu)  // before __dlpack__, which would synchronise a stream
    raise(Code::kInvalidArgument,
          what + " is on device " + std::string(py::str(device)) + kGpuByInterface);
  py::object capsule;
  try {
    capsule = source.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_BufferError))  // a tensor that needs gradients, say
      raise(Code::kInvalidArgument,
            what + " does not lend its memory: " + std::string(py::str(error.value())));
    if (!error.matches(PyExc_TypeError)) throw;
    capsule = source.attr("__dlpack__")();  // producers of before 1.0 do not know max_version
  }
  // The capsule is not consumed: it lives with the region and frees the tensor when it goes.
  if (void* p = PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")
                    ? PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned")
                    : nullptr) {
    auto* managed = static_cast<DlManagedTensorVersioned*>(p);
    return from_tensor(managed->tensor, !(managed->flags & kDlReadOnly), capsule, what);
  }
  if (void* p = PyCapsule_IsValid(capsule.ptr(), "dltensor")
                    ? PyCapsule_GetPointer(capsule.ptr(), "dltensor")
                    : nullptr)
    return from_tensor(static_cast<DlManagedTensor*>(p)->tensor, true, capsule, what);
  raise(Code::kInvalidArgument, what + ".__dlpack__() gave no DLPack capsule");
}

One take_buffer(const py::object& source, const std::string& what) {
  // A memoryview holds the export, so the memory can neither move nor be resized under us.
  PyObject* raw = PyMemoryView_FromObject(source.ptr());
  if (raw == nullptr) throw py::error_already_set();
  py::object view = py::reinterpret_steal<py::object>(raw);
  const Py_buffer* buffer = PyMemoryView_GET_BUFFER(raw);
  if (!PyBuffer_IsContiguous(buffer, 'C')) not_contiguous(what);
  // A peer that wrote here would make up pointers for the interpreter.
  if (buffer->format != nullptr && std::strchr(buffer->format, 'O') != nullptr)
    raise(Code::kInvalidArgument, what +
                                      " holds references to Python objects (dtype object), not "
                                      "data; register an array of numbers");
  return {{static_cast<std::byte*>(buffer->buf), 0, static_cast<uint64_t>(buffer->len)},
          !buffer->readonly,
          std::move(view)};
}

// The object's word for being a GPU's memory: a dict with shape, typestr, data (pointer, read-only)
// and perhaps strides in bytes; or null. What makes it fail is told with what can be done: torch
// has no name for fp8 there, and gives none of a tensor that requires grad.
py::object cuda_array_interface(const py::object& source, const std::string& what) {
  PyObject* const raw = PyObject_GetAttrString(source.ptr(), "__cuda_array_interface__");
  if (raw != nullptr) return py::reinterpret_steal<py::object>(raw);
  py::error_already_set error;
  if (error.matches(PyExc_AttributeError)) return {};
  if (!error.matches(PyExc_Exception)) throw error;  // Ctrl-C is not its fault
  raise(Code::kInvalidArgument, cat(what, ".__cuda_array_interface__ failed: ", error.what(),
                                    "; pass the bytes: tensor.detach().view(torch.uint8)"));
}

One take_cuda(const py::object& interface, const py::object& source, const std::string& what) {
  std::vector<int64_t> shape, strides;
  std::string type;
  uintptr_t address = 0;
  bool read_only = false;
  try {
    const auto dict = interface.cast<py::dict>();
    const auto data = dict["data"].cast<py::tuple>();
    address = data[0].cast<uintptr_t>();
    read_only = data[1].cast<bool>();
    shape = dict["shape"].cast<std::vector<int64_t>>();
    type = dict["typestr"].cast<std::string>();
    if (dict.contains("strides") && !dict["strides"].is_none())
      strides = dict["strides"].cast<std::vector<int64_t>>();
  } catch (const std::exception& error) {
    raise(Code::kInvalidArgument,
          cat(what, ".__cuda_array_interface__ is not what it should be: ", error.what()));
  }
  // "<f4": order, kind, bytes of one element.
  int64_t expected = type.size() > 2 ? std::strtoll(type.c_str() + 2, nullptr, 10) : 0;
  if (expected <= 0 || type[1] == 'O')
    raise(Code::kInvalidArgument, cat(what, " has a typestr of no known size: '", type, "'"));
  if (!strides.empty() && strides.size() != shape.size())
    raise(Code::kInvalidArgument,
          cat(what, " has ", shape.size(), " dimensions and ", strides.size(), " strides"));
  for (size_t i = shape.size(); i-- > 0;) {
    if (!strides.empty() && shape[i] != 1 && strides[i] != expected) not_contiguous(what);
    expected *= shape[i];
  }
  return {{reinterpret_cast<std::byte*>(address), 0, static_cast<uint64_t>(expected)},
          !read_only,
          source,
          true};
}

One take_one(const py::object& source, const std::string& what) {
  if (PyObject_CheckBuffer(source.ptr())) return take_buffer(source, what);
  if (const py::object interface = cuda_array_interface(source, what); interface)
    return take_cuda(interface, source, what);
  if (py::hasattr(source, "__dlpack__") && py::hasattr(source, "__dlpack_device__"))
    return take_dlpack(source, what);
  raise(Code::kInvalidArgument, what + " of type " + type_name(source) +
                                    " has neither the buffer protocol nor __dlpack__ nor "
                                    "__cuda_array_interface__");
}

}  // namespace

Buffers take_buffers(const py::object& source) {
  Buffers out;
  py::list keep;
  auto add = [&](const py::object& each, const std::string& what) {
    One one = take_one(each, what);
    if (!out.pieces.empty() && one.is_on_gpu != out.is_on_gpu)
      raise(Code::kInvalidArgument,
            cat(what,
                one.is_on_gpu ? " is a GPU's memory, those before it are the host's"
                              : " is host memory, those before it are a GPU's",
                "; a region is all of one kind: register one for each"));
    out.is_on_gpu = one.is_on_gpu;
    out.pieces.push_back(one.piece);
    out.writable = out.writable && one.writable;
    keep.append(one.keep);
  };
  if (py::isinstance<py::list>(source) || py::isinstance<py::tuple>(source)) {
    size_t i = 0;
    for (py::handle each : source)
      add(py::reinterpret_borrow<py::object>(each), "buffers[" + std::to_string(i++) + "]");
    if (i == 0) raise(Code::kInvalidArgument, "the list of buffers is empty");
  } else {
    add(source, "the buffer");
  }
  out.keep = bury_later(std::move(keep));
  return out;
}

Buffers take_host_buffers(const py::object& source) {
  Buffers out = take_buffers(source);
  if (out.is_on_gpu)
    raise(Code::kInvalidArgument, "this is a GPU's memory, and the CPU has to touch it here");
  return out;
}

void empty_graveyard() {
  if (graveyard.load(std::memory_order_relaxed) == nullptr) return;
  for (Buried* grave = graveyard.exchange(nullptr, std::memory_order_acquire); grave != nullptr;) {
    Py_DECREF(grave->object);
    delete std::exchange(grave, grave->next);
  }
}

Offsets::Offsets(const char* name, const py::object& value) { take(name, value, 1); }
Offsets::Offsets(const char* name, const py::object& value, int columns) {
  take(name, value, columns);
}
Offsets::~Offsets() {
  if (has_view_) PyBuffer_Release(&view_);
}

Column Offsets::column() const noexcept {
  return {scalar_ ? &value_ : data_, scalar_ ? size_t{1} : size_, scalar_};
}

namespace {

bool is_int64(const Py_buffer& view) {
  const std::string_view format = view.format ? view.format : "B";
  return view.itemsize == 8 &&
         (format == "l" || format == "q" || format == "=q" || format == "<q" || format == "<l");
}

bool is_int32(const Py_buffer& view) {
  const std::string_view format = view.format ? view.format : "B";
  return view.itemsize == 4 && (format == "i" || format == "=i" || format == "<i");
}

// As NumPy calls it; a code that it has no simple name for is told as it is.
std::string dtype_name(const Py_buffer& view) {
  std::string_view code = view.format ? view.format : "B";
  const bool swapped = code.starts_with('>') || code.starts_with('!');
  if (swapped || code.find_first_of("@=<") == 0) code.remove_prefix(1);
  const char letter = code.size() == 1 ? code[0] : '\0';
  const char* kind = letter == '?'                                                ? "bool"
                     : letter != '\0' && std::strchr("bhilqn", letter) != nullptr ? "int"
                     : letter != '\0' && std::strchr("BHILQN", letter) != nullptr ? "uint"
                     : letter != '\0' && std::strchr("efdg", letter) != nullptr   ? "float"
                                                                                  : nullptr;
  if (kind == nullptr) return cat("of buffer format '", code, "'");
  std::string name = kind;
  if (letter != '?') name += std::to_string(view.itemsize * 8);
  return swapped ? name + ", big-endian" : name;
}

std::string describe(const Py_buffer& view) {
  std::string text = cat("dtype ", dtype_name(view), ", shape [");
  for (int i = 0; i < view.ndim; ++i) text += cat(i ? ", " : "", view.shape[i]);
  return text + "]";
}

constexpr const char* kStrided = "a strided view; use numpy.ascontiguousarray";

// An array of NumPy's that is right as it stands. All else goes by the buffer protocol, for which
// NumPy writes a format and a shape: a fifth of the instructions of a submit.
template <typename T>
bool is_numpy(const py::object& value, int ndim) {
  using Array = py::array_t<T, py::array::c_style>;
  return Array::check_(value) && py::detail::array_proxy(value.ptr())->nd == ndim;
}

const void* numpy_data(const py::object& value) {
  return py::detail::array_proxy(value.ptr())->data;
}

size_t numpy_length(const py::object& value, int axis) {
  return static_cast<size_t>(py::detail::array_proxy(value.ptr())->dimensions[axis]);
}

}  // namespace

BlockIdArray::BlockIdArray(const char* name, const py::object& value) {
  if (const bool wide = is_numpy<int64_t>(value, 1); wide || is_numpy<int32_t>(value, 1)) {
    keep_ = value;
    ids_ = {numpy_data(value), numpy_length(value, 0), wide};
    return;
  }
  auto bad = [&](const std::string& given) {
    PyBuffer_Release(&view_);  // harmless before there is one
    raise(Code::kInvalidArgument, std::string(name) +
                                      " must be a one-dimensional C-contiguous int32 or int64 "
                                      "array, not " +
                                      given);
  };
  if (!PyObject_CheckBuffer(value.ptr())) bad(type_name(value));
  if (PyObject_GetBuffer(value.ptr(), &view_, PyBUF_FULL_RO) != 0) throw py::error_already_set();
  const bool wide = is_int64(view_);
  if ((!wide && !is_int32(view_)) || view_.ndim != 1) bad(describe(view_));
  if (!PyBuffer_IsContiguous(&view_, 'C')) bad(kStrided);
  ids_ = {view_.buf, static_cast<size_t>(view_.len / view_.itemsize), wide};
}

BlockIdArray::~BlockIdArray() { PyBuffer_Release(&view_); }

void Offsets::take(const char* name, const py::object& value, int columns) {
  auto bad = [&](const std::string& given) {
    const char* expected = columns == 1 ? "an int or a one-dimensional C-contiguous int64 array"
                                        : "a C-contiguous int64 array of shape [m, 2]";
    raise(Code::kInvalidArgument, cat(name, " must be ", expected, ", not ", given));
  };
  if (columns == 1 && !PyBool_Check(value.ptr()) && PyIndex_Check(value.ptr()) &&
      !PyObject_CheckBuffer(value.ptr())) {
    py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!index) {  // a tensor of several elements says that it is an index, and is none
      PyErr_Clear();
      bad(type_name(value));
    }
    int overflow = 0;
    value_ = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) bad("an integer beyond 64 bits");
    scalar_ = true;
    return;
  }
  if (is_numpy<int64_t>(value, columns) && (columns == 1 || numpy_length(value, 1) == 2)) {
    keep_ = value;
    data_ = static_cast<const int64_t*>(numpy_data(value));
    size_ = numpy_length(value, 0) * static_cast<size_t>(columns);
    return;
  }
  if (!PyObject_CheckBuffer(value.ptr())) bad(type_name(value));
  if (PyObject_GetBuffer(value.ptr(), &view_, PyBUF_FULL_RO) != 0) throw py::error_already_set();
  has_view_ = true;
  const bool int64 = is_int64(view_);
  if (columns == 1 && int64 && view_.ndim == 0) {  // a NumPy scalar
    value_ = *static_cast<const int64_t*>(view_.buf);
    scalar_ = true;
    return;
  }
  const bool shape = columns == 1 ? view_.ndim == 1 : view_.ndim == 2 && view_.shape[1] == columns;
  if (!int64 || !shape) bad(describe(view_));
  if (!PyBuffer_IsContiguous(&view_, 'C')) bad(kStrided);
  data_ = static_cast<const int64_t*>(view_.buf);
  size_ = static_cast<size_t>(view_.len) / 8;
}

}  // namespace kvxfer::bindings
