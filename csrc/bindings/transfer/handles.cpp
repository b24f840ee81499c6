// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "bindings/transfer/handles.hpp"

#include <cmath>
#include <cstring>

namespace py = pybind11;

namespace kvxfer::bindings {

EngineHandle::~EngineHandle() {
  if (!engine->here()) {
    // Its destructor would join threads that only the parent has.
    new std::shared_ptr<Engine>(std::move(engine));
    return;
  }
  // Joins threads; the interpreter may be going down, and then it holds no GIL to release.
  if (PyGILState_Check()) {
    const WithoutGil release;
    engine->close();
  } else {
    engine->close();
  }
}

void check_process(const Birth& birth) {
  if (!birth.here())
    fail(Code::kInvalidArgument,
         "this belongs to an engine of the process that this one was forked "
         "from; make an engine "
         "here, or start processes by spawn");
}

int64_t deadline_of(const Timeout& timeout_s, const char* name) {
  if (!timeout_s) return kNever;
  if (std::isnan(*timeout_s) || *timeout_s < 0)
    fail(Code::kInvalidArgument, name, " must not be negative, not ", *timeout_s);
  return deadline_after(*timeout_s);
}

py::bytes to_bytes(ByteView bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Bytes from_bytes(const char* name, const py::object& value) {
  if (!PyObject_CheckBuffer(value.ptr()))
    raise(Code::kInvalidArgument,
          std::string(name) + " must be bytes, not " + Py_TYPE(value.ptr())->tp_name);
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(value).request();
  if (!PyBuffer_IsContiguous(info.view(), 'C'))
    raise(Code::kInvalidArgument, std::string(name) + " must be contiguous");
  Bytes out(static_cast<size_t>(info.view()->len));
  if (!out.empty()) std::memcpy(out.data(), info.ptr, out.size());
  return out;
}

}  // namespace kvxfer::bindings
