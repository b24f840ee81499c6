// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "bindings/errors.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

const char* class_name(Code code) {
  switch (code) {
    case Code::kInvalidArgument:
      return "InvalidArgumentError";
    case Code::kUnavailable:
      return "UnavailableError";
    case Code::kRegistration:
      return "RegistrationError";
    case Code::kTransport:
      return "TransportError";
    case Code::kPeerDisconnected:
      return "PeerDisconnectedError";
    case Code::kRemoteAccess:
      return "RemoteAccessError";
    case Code::kLease:
      return "LeaseError";
    case Code::kTimeout:
      return "TransferTimeoutError";
    case Code::kCancelled:
      return "TransferCancelledError";
    case Code::kBackPressure:
      return "BackPressureError";
    case Code::kOk:
    case Code::kAgain:
    case Code::kInternal:
      break;
  }
  return "InternalError";
}

}  // namespace

py::object make_exception(Code code, const std::string& message, int err,
                          const std::string& transport, const std::string& peer) {
  py::object cls = py::module_::import("kvxfer.errors").attr(class_name(code));
  py::dict fields;
  if (!transport.empty()) fields["transport"] = transport;
  if (!peer.empty()) fields["peer"] = peer;
  if (err != 0) fields["errno"] = err;
  return cls(message, **fields);
}

void raise(const py::object& exception) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  throw py::error_already_set();
}

void raise(Code code, const std::string& message) {
  raise(make_exception(code, message, 0, {}, {}));
}

void register_errors() {
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const Error& error) {
      py::object exception =
          make_exception(error.code, error.what(), error.err, error.transport, error.peer);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
    }
  });
}

}  // namespace kvxfer::bindings
