// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The extension module kvxfer._transfer: the engine's classes, arguments checked. No logic of its
// own; the Python face is kvxfer/transfer/.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

// The bound of same-host transports: the same scattered copy inside one process (bench/).
void scattered_copy(const py::object& destination, const py::object& source,
                    const py::object& destination_offsets, const py::object& source_offsets,
                    uint64_t nbytes) {
  empty_graveyard();
  Buffers to = take_buffers(destination), from = take_buffers(source);
  Offsets into("destination_offsets", destination_offsets), out("source_offsets", source_offsets);
  if (!to.writable) fail(Code::kInvalidArgument, "the destination is read-only");
  const Piece &t = to.pieces.at(0), &f = from.pieces.at(0);
  const Column a = into.column(), b = out.column();
  if (a.size != b.size)
    fail(Code::kInvalidArgument, "offsets differ in length: ", a.size, " and ", b.size);
  for (size_t i = 0; i < a.size; ++i)
    for (auto [offset, size] : {std::pair{a[i], t.nbytes}, {b[i], f.nbytes}})
      if (offset < 0 || nbytes > size || static_cast<uint64_t>(offset) > size - nbytes)
        fail(Code::kInvalidArgument, "copy ", i, ": offset ", offset, " + ", nbytes,
             " is out of range");
  py::gil_scoped_release release;
  for (size_t i = 0; i < a.size; ++i) std::memcpy(t.base + a[i], f.base + b[i], nbytes);
}

}  // namespace

PYBIND11_MODULE(_transfer, m) {
  m.doc() = "The native half of kvxfer.transfer; import that instead.";
  register_errors();
  m.attr("MAX_NOTIFICATION_NBYTES") = kMaxNotificationBytes;
  m.def("scattered_copy", &scattered_copy, py::arg("destination"), py::arg("source"),
        py::arg("destination_offsets"), py::arg("source_offsets"), py::arg("nbytes"));
  m.def("probe_transports", [] {
    py::list out;
    for (auto& each : probe_transports())
      out.append(
          py::make_tuple(each.name, each.reason ? py::object(py::str(*each.reason)) : py::none()));
    return out;
  });

  register_regions(m);
  register_peers(m);
  register_transfers(m);
  register_leases(m);
  register_engine(m);
}

}  // namespace kvxfer::bindings
