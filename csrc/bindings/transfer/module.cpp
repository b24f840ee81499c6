// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The extension module kvxfer._transfer: the engine's classes, arguments checked. No logic of its
// own; the Python face is kvxfer/transfer/.
#include "bindings/transfer/handles.hpp"
#include "cuda_driver/memory.hpp"
#include "transport/tcp/tls.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
PYBIND11_MODULE(_transfer, m) {
  m.doc() = "The native half of kvxfer.transfer; import that instead.";
  register_errors();
  m.attr("MAX_NOTIFICATION_NBYTES") = kMaxNotificationBytes;
  m.def(
      "probe_transports",
      [] {
        py::list out;
        for (auto& each : probe_transports())
          out.append(py::make_tuple(each.name,
                                    each.reason ? py::object(py::str(*each.reason)) : py::none()));
        return out;
      },
      "[(name, None, or why it does not work here)] of all transports, best first.");
  m.def(
      "transport_details",
      [] {
        py::dict out;
        for (const auto& [name, detail] : transport_details()) out[py::str(name)] = detail;
        return out;
      },
      "{name: what it works with}, where there is something to say: of verbs, its ports, where "
      "their devices are, and which of several each GPU prefers.");
  m.def(
      "gpus",
      [] {
        std::string reason;
        py::list out;
        for (const cuda_driver::Gpu& gpu : cuda_driver::gpus(reason))
          out.append(py::make_tuple(gpu.name, gpu.bus_id, gpu.has_dmabuf, gpu.orders_writes));
        return py::make_tuple(out, reason);
      },
      "[(name, PCI address, whether its memory is exported as dma-bufs, whether kernels find what "
      "a "
      "NIC has written without a flush)] of those that CUDA shows this process, and the reason "
      "where there are none.");
  m.def(
      "peermem_module", [] { return cuda_driver::peermem_module(); },
      "Name of the kernel module that lets NICs register a GPU's memory by its address; empty: "
      "none "
      "is loaded.");
  m.def("tls_unavailable", &tcp::tls_unavailable,
        "None where tcp can speak TLS, else why it cannot.");

  register_requests(m);
  register_regions(m);
  register_peers(m);
  register_transfers(m);
  register_leases(m);
  register_engine(m);
  register_bounds(m);
}

}  // namespace kvxfer::bindings
