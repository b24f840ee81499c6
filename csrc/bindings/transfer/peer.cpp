// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A peer and its regions, as Python sees them.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {

void register_peers(py::module_& m) {
  py::class_<RemoteRegion, RemoteRegionPtr>(m, "RemoteRegion")
      .def_readonly("name", &RemoteRegion::name)
      .def_readonly("nbytes", &RemoteRegion::nbytes)
      .def_readonly("writable", &RemoteRegion::writable)
      .def_property_readonly("peer", [](const RemoteRegion& r) { return r.peer.lock(); })
      .def("__repr__", [](const RemoteRegion& r) {
        return cat("<RemoteRegion '", r.name, "', ", r.nbytes, " bytes>");
      });

  py::class_<Peer, PeerPtr>(m, "Peer")
      .def_property_readonly("name", [](const Peer& p) { return p.identity.name; })
      .def_property_readonly("address", [](const Peer& p) { return p.identity.address; })
      .def_property_readonly("incarnation",
                             [](const Peer& p) { return hex(p.identity.incarnation); })
      .def_property_readonly("alive", [](const Peer& p) { return p.alive.load(); })
      .def_property_readonly("lost_because",
                             [](const Peer& p) {
                               check_process(p.birth);
                               std::lock_guard lock(p.mutex);
                               return p.lost_because;
                             })
      .def_property_readonly("regions",
                             [](const Peer& p) {
                               check_process(p.birth);
                               std::map<std::string, RemoteRegionPtr> copy;
                               {
                                 const WithoutGil release;
                                 std::lock_guard lock(p.mutex);
                                 copy = p.regions;
                               }
                               return copy;
                             })
      .def("__repr__", [](const Peer& p) {
        return cat("<Peer '", p.identity.name, "' at ", p.identity.address, ", incarnation ",
                   hex(p.identity.incarnation).substr(0, 8), p.alive ? "" : ", lost", ">");
      });
}

}  // namespace kvxfer::bindings
