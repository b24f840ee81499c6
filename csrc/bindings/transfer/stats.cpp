// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Engine::stats() as the dictionary that Python sees.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

py::dict totals_dict(const Totals& t) {
  py::dict d;
  d["bytes_written"] = t.bytes_written, d["bytes_read"] = t.bytes_read;
  d["bytes_received"] = t.bytes_received, d["bytes_served"] = t.bytes_served,
  d["bytes_sunk"] = t.bytes_sunk;
  d["requests"] = t.requests, d["requests_served"] = t.requests_served, d["refused"] = t.refused;
  d["notifications_sent"] = t.notifications_sent,
  d["notifications_received"] = t.notifications_received;
  return d;
}

py::dict transports_dict(const std::map<std::string, Totals>& transports) {
  py::dict d;
  for (auto& [name, totals] : transports) d[py::str(name)] = totals_dict(totals);
  return d;
}

}  // namespace

py::dict stats(EngineHandle& self) {
  empty_graveyard();
  EngineStats s;
  {
    const WithoutGil release;
    s = self.get().stats();
  }
  py::dict peers;
  for (auto& peer : s.peers) {
    py::dict d;
    d["name"] = peer.name, d["address"] = peer.address, d["alive"] = peer.alive;
    d["transport"] = transports_dict(peer.transports);
    peers[py::str(peer.incarnation)] = d;
  }
  py::dict registration;
  for (auto& [transport, r] : s.registration)
    registration[py::str(transport)] =
        py::dict(py::arg("regions") = r.regions, py::arg("running") = r.running,
                 py::arg("failed") = r.failed, py::arg("nbytes") = r.nbytes,
                 py::arg("nbytes_done") = r.nbytes_done);
  py::dict out;
  out["registration"] = registration;
  out["peers"] = peers;
  out["transport"] = transports_dict(s.totals);
  out["transfers"] =
      py::dict(py::arg("done") = s.done, py::arg("failed") = s.failed,
               py::arg("timed_out") = s.timed_out, py::arg("cancelled") = s.cancelled,
               py::arg("in_flight") = s.in_flight, py::arg("unquiesced") = s.unquiesced);
  out["spans"] = py::dict(py::arg("given") = s.spans_given, py::arg("posted") = s.spans_posted);
  out["quarantine"] =
      py::dict(py::arg("nbytes") = s.quarantined_nbytes, py::arg("age_s") = s.quarantined_age_s);
  out["refused"] = s.refused;
  out["late_events"] = s.late_events, out["late_writes_refused"] = s.late_writes_refused;
  out["leases_open"] = s.leases_open, out["leases_expired"] = s.leases_expired;
  out["wakeups"] = s.wakeups;
  out["handshakes_refused"] = s.handshakes_refused;
  out["last_handshake_refusal"] = s.last_handshake_refusal;
  return out;
}

}  // namespace kvxfer::bindings
