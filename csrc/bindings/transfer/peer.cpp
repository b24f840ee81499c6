// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A peer and its regions, as Python sees them.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

std::map<std::string, RemoteRegionPtr> regions_of(const Peer& peer) {
  check_process(peer.birth);
  const WithoutGil release;
  std::lock_guard lock(peer.mutex);
  return peer.regions;
}

// A name that the dict does not have: why not.
void missing(const py::object& regions, const py::object& name) {
  const Peer& peer = regions.attr("peer").cast<const Peer&>();
  const std::string asked = py::repr(name), whose = cat("peer '", peer.identity.name, "'");
  std::string cause;
  {
    std::lock_guard lock(peer.mutex);
    cause = peer.lost_because;
  }
  if (!cause.empty())
    throw py::key_error(cat("no region ", asked, ": ", whose, " is lost (", cause,
                            "), its regions with it; engine.connect() again"));
  std::string others;
  size_t n = 0;
  for (const auto& each : py::cast<py::dict>(regions))
    if (n++ < 8) others += (n > 1 ? ", " : "") + std::string(py::repr(each.first));
  if (n > 8) others += cat(" and ", n - 8, " more");
  throw py::key_error(
      cat("no region ", asked, ": ", whose, " has ", n == 0 ? "none" : others,
          ". What it registers is told to us soon after; peer.regions is as of when "
          "it is asked"));
}

// A dict whose KeyError says what there is instead.
py::object regions_class() {
  const py::handle type(reinterpret_cast<PyObject*>(&PyType_Type));
  const py::handle dict(reinterpret_cast<PyObject*>(&PyDict_Type));
  py::dict body;
  body["__missing__"] = py::cpp_function(&missing, py::name("__missing__"), py::is_method(dict));
  body["__module__"] = "kvxfer._transfer";
  return type("PeerRegions", py::make_tuple(dict), body);
}

}  // namespace

void register_peers(py::module_& m) {
  py::class_<RemoteRegion, RemoteRegionPtr>(
      m, "RemoteRegion",
      "A region of a peer, as peer.regions gives it: the far end of a write or a read.\n\n"
      "A snapshot: transfers on a region that its owner has deregistered meanwhile, or whose "
      "owner\n"
      "was lost, fail.")
      .def_readonly("name", &RemoteRegion::name, "What its owner calls it.")
      .def_readonly("nbytes", &RemoteRegion::nbytes, "Its size; offsets in it are 0 to nbytes.")
      .def_readonly("writable", &RemoteRegion::writable, "False: it can be read and not written.")
      .def_property_readonly(
          "device", [](const RemoteRegion& r) { return device_text(r.device); },
          "\"cpu\", or \"cuda:N\" by the owner's count: a GPU's memory, which verbs alone reaches.")
      .def_property_readonly(
          "peer", [](const RemoteRegion& r) { return r.peer.lock(); },
          "The Peer that owns it; None when this side's engine is gone.")
      .def("__repr__", [](const RemoteRegion& r) {
        return cat("<RemoteRegion '", r.name, "', ", r.nbytes, " bytes>");
      });

  py::class_<Peer, PeerPtr>(
      m, "Peer",
      "Another engine: engine.connect() returns it, or it connected to us "
      "(engine.peer_events()).\n\n"
      "An engine that restarts is another Peer, with another incarnation and other\n"
      "regions: connect() again.")
      .def_property_readonly(
          "name", [](const Peer& p) { return p.identity.name; },
          "What it calls itself. Not unique.")
      .def_property_readonly(
          "address", [](const Peer& p) { return p.identity.address; },
          "\"host:port\" where it listens, as it says itself: \"0.0.0.0:port\" if it listens on "
          "all\n"
          "interfaces, which leads nowhere from another host.")
      .def_property_readonly(
          "incarnation", [](const Peer& p) { return hex(p.identity.incarnation); },
          "32 hex digits, new for each engine object.")
      .def_property_readonly(
          "alive", [](const Peer& p) { return p.alive.load(); },
          "False when its process or the connection has ended; `lost_because` has the cause.")
      .def_property_readonly(
          "lost_because",
          [](const Peer& p) {
            check_process(p.birth);
            std::lock_guard lock(p.mutex);
            return p.lost_because;
          },
          "The cause of its loss, in words; empty while it is alive.")
      .def_property_readonly(
          "regions",
          [type = regions_class()](const PeerPtr& p) {
            py::object out = type();
            out.attr("peer") = p;
            for (const auto& [name, region] : regions_of(*p)) out[py::str(name)] = region;
            return out;
          },
          "{name: RemoteRegion}, as of now: a new dict at each call, so hold on to what you "
          "need.\n\n"
          "It follows what the owner registers and deregisters, and is empty once the peer is "
          "lost.")
      .def("__repr__", [](const Peer& p) {
        return cat("<Peer '", p.identity.name, "' at ", p.identity.address, ", incarnation ",
                   hex(p.identity.incarnation).substr(0, 8), p.alive ? "" : ", lost", ">");
      });
}

}  // namespace kvxfer::bindings
