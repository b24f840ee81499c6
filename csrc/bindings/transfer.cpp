// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The extension module kvxfer._transfer: the engine's classes, arguments checked, the GIL released
// around everything that may block. No logic of its own; the Python face is kvxfer/transfer/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>

#include "bindings/buffer.hpp"
#include "bindings/errors.hpp"
#include "engine/engine.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

using Timeout = std::optional<double>;

int64_t deadline_of(const Timeout& timeout_s, const char* name = "timeout_s") {
  if (!timeout_s) return kNever;
  if (std::isnan(*timeout_s) || *timeout_s < 0)
    fail(Code::kInvalidArgument, name, " must not be negative, not ", *timeout_s);
  return deadline_after(*timeout_s);
}

// Runs `wait` without the GIL until it says something else than "a signal came"; Python's signal
// handlers run in between, so Ctrl-C works.
template <typename Wait>
Woken blocking(Wait&& wait) {
  for (;;) {
    Woken why;
    {
      py::gil_scoped_release release;
      why = wait();
    }
    if (why != Woken::kInterrupted) return why;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
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

// ---------------------------------------------------------------- handles
// Python's view of a region keeps the memory, not the engine, alive.
struct RegionHandle {
  RegionPtr region;
};

struct EngineHandle {
  std::shared_ptr<Engine> engine;
  explicit EngineHandle(std::shared_ptr<Engine> e) : engine(std::move(e)) {}
  ~EngineHandle() {
    // Joins threads; the interpreter may be going down, and then it holds no GIL to release.
    if (PyGILState_Check()) {
      py::gil_scoped_release release;
      engine->close();
    } else {
      engine->close();
    }
  }
};

struct LeaseHandle {
  LeasePtr lease;
  std::shared_ptr<Engine> engine;
};

py::object error_of(const Transfer& t) {
  if (!t.terminal() || t.state.load() == State::kDone) return py::none();
  const char* transport = t.transport.load();
  return make_exception(t.failure.code, t.message, t.failure.err, transport ? transport : "",
                        t.peer->identity.name);
}

void end_of_wait(const TransferPtr& t, Woken why, const Timeout& timeout_s) {
  if (why == Woken::kTimedOut)
    raise(make_exception(Code::kTimeout,
                         cat("the transfer is still ", to_string(t->state.load()), " after ",
                             *timeout_s, " s of waiting; it goes on until its own deadline"),
                         0, {}, t->peer->identity.name));
  if (t->state.load() != State::kDone) raise(error_of(*t));
}

SubmitOptions submit_options(const py::object& notify, const std::optional<uint64_t>& arrival,
                             const py::object& lease, const Timeout& deadline_s) {
  SubmitOptions out;
  if (!notify.is_none()) out.has_notify = true, out.notify = from_bytes("notify", notify);
  if (arrival) out.has_arrival = true, out.arrival = *arrival;
  if (!lease.is_none()) out.has_lease = true, out.lease = from_bytes("lease", lease);
  out.deadline_ns = deadline_of(deadline_s, "deadline_s");
  return out;
}

TransferPtr submit(EngineHandle& self, Op op, const RegionHandle& region,
                   const RemoteRegionPtr& remote, const py::object& local_offsets,
                   const py::object& remote_offsets, const py::object& nbytes,
                   const py::object& bases, const py::object& notify,
                   const std::optional<uint64_t>& arrival, const py::object& lease,
                   const Timeout& deadline_s) {
  empty_graveyard();
  Offsets local("local_offsets", local_offsets), into("remote_offsets", remote_offsets),
      size("nbytes", nbytes);
  std::optional<Offsets> pairs;
  SpanArguments arguments{local.column(), into.column(), size.column(), {}, false};
  if (!bases.is_none()) {
    pairs.emplace("bases", bases, Offsets::kPairs);
    arguments.bases = {pairs->data(), pairs->size()};
    arguments.has_bases = true;
  }
  SubmitOptions options = submit_options(notify, arrival, lease, deadline_s);
  py::gil_scoped_release release;
  return self.engine->submit(op, region.region, remote, arguments, std::move(options));
}

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

uint64_t check_index(const Lease& lease, int64_t index) {
  if (index < 0 || static_cast<uint64_t>(index) >= lease.num_arrivals)
    fail(Code::kInvalidArgument, "arrival index ", index, " is not in 0 to ", lease.num_arrivals,
         " - 1");
  return static_cast<uint64_t>(index);
}

void wait_arrived(LeaseHandle& self, const py::object& indices, const Timeout& timeout_s) {
  Offsets wanted("indices", indices);
  const Column column = wanted.column();
  std::vector<uint64_t> missing;
  for (size_t i = 0; i < column.size; ++i) missing.push_back(check_index(*self.lease, column[i]));
  const int64_t deadline_ns = deadline_of(timeout_s);
  Lease& lease = *self.lease;
  bool closed = false;
  const Woken why = blocking([&] {
    for (;;) {
      const uint32_t seen = lease.arrival_word.read();
      closed = lease.gate.closed();
      std::erase_if(missing, [&](uint64_t index) { return lease.arrived(index); });
      if (missing.empty() || closed) return Woken::kNotified;
      if (Woken woken = lease.arrival_word.wait(seen, deadline_ns); woken != Woken::kNotified)
        return woken;
    }
  });
  if (missing.empty()) return;
  if (why == Woken::kTimedOut)
    raise(Code::kTimeout, cat(missing.size(), " of ", column.size, " arrivals are missing after ",
                              *timeout_s, " s, the first is ", missing.front()));
  raise(Code::kLease, cat("the lease has ended (", lease.expired ? "expired" : "revoked", ") with ",
                          missing.size(), " of ", column.size, " arrivals missing, the first is ",
                          missing.front()));
}

void revoke(LeaseHandle& self, const Timeout& timeout_s) {
  const int64_t deadline_ns = deadline_of(timeout_s);
  Woken why = blocking([&] {
    self.engine->begin_revoke(self.lease);
    return self.lease->gate.wait_quiet(deadline_ns);
  });
  if (why == Woken::kTimedOut && !self.lease->gate.quiet())
    raise(Code::kTimeout, cat("the lease is not quiet after ", *timeout_s,
                              " s; its spans stay quarantined until lease.quiet is true"));
}

void wait_arrivals(EngineHandle& self, uint64_t tag, const PeerPtr& peer, uint64_t count,
                   const Timeout& timeout_s) {
  const int64_t deadline_ns = deadline_of(timeout_s);
  uint64_t have = 0;
  bool alive = true;
  const Woken why = blocking([&] {
    for (;;) {
      const uint32_t seen = peer->tags_changed.read();
      alive = peer->alive;
      have = self.engine->arrivals(tag, *peer);
      if (have >= count || !alive) return Woken::kNotified;
      if (Woken woken = peer->tags_changed.wait(seen, deadline_ns); woken != Woken::kNotified)
        return woken;
    }
  });
  if (have >= count) return;
  if (why == Woken::kTimedOut)
    raise(make_exception(
        Code::kTimeout,
        cat(have, " of ", count, " arrivals under tag ", tag, " after ", *timeout_s, " s"), 0, {},
        peer->identity.name));
  raise(make_exception(Code::kPeerDisconnected,
                       cat("peer '", peer->identity.name, "' is gone with ", have, " of ", count,
                           " arrivals under tag ", tag),
                       0, {}, peer->identity.name));
}

void deregister(EngineHandle& self, const RegionHandle& region, const Timeout& timeout_s) {
  const int64_t deadline_ns = deadline_of(timeout_s);
  const Woken why = blocking([&] {
    self.engine->deregister(region.region);
    return region.region->gate.wait_quiet(deadline_ns);
  });
  empty_graveyard();
  if (why == Woken::kTimedOut)
    raise(Code::kTimeout,
          cat("region '", region.region->name, "' is not quiet after ", *timeout_s, " s"));
}

py::list arrived(const LeaseHandle& self) {
  py::list out;
  for (uint64_t i = 0; i < self.lease->num_arrivals; ++i)
    if (self.lease->arrived(i)) out.append(i);
  return out;
}

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

py::dict stats(EngineHandle& self) {
  empty_graveyard();
  EngineStats s;
  {
    py::gil_scoped_release release;
    s = self.engine->stats();
  }
  py::dict peers;
  for (auto& peer : s.peers) {
    py::dict d;
    d["name"] = peer.name, d["address"] = peer.address, d["alive"] = peer.alive;
    d["transport"] = transports_dict(peer.transports);
    peers[py::str(peer.incarnation)] = d;
  }
  py::dict out;
  out["peers"] = peers;
  out["transport"] = transports_dict(s.totals);
  out["transfers"] =
      py::dict(py::arg("done") = s.done, py::arg("failed") = s.failed,
               py::arg("timed_out") = s.timed_out, py::arg("cancelled") = s.cancelled,
               py::arg("in_flight") = s.in_flight, py::arg("unquiesced") = s.unquiesced);
  out["late_events"] = s.late_events, out["late_writes_refused"] = s.late_writes_refused;
  out["leases_open"] = s.leases_open, out["leases_expired"] = s.leases_expired;
  out["wakeups"] = s.wakeups;
  out["handshakes_refused"] = s.handshakes_refused;
  out["last_handshake_refusal"] = s.last_handshake_refusal;
  return out;
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

  py::class_<Watch, std::shared_ptr<Watch>>(m, "Watch")
      .def(py::init<>())
      .def("fileno", &Watch::fileno)
      .def("take", &Watch::take);

  py::class_<RegionHandle>(m, "Region", py::buffer_protocol())
      .def_property_readonly("name", [](const RegionHandle& r) { return r.region->name; })
      .def_property_readonly("nbytes", [](const RegionHandle& r) { return r.region->nbytes; })
      .def_property_readonly("writable", [](const RegionHandle& r) { return r.region->writable; })
      .def_property_readonly("allocated",
                             [](const RegionHandle& r) { return bool(r.region->memfd); })
      .def_property_readonly("piece_offsets",
                             [](const RegionHandle& r) {
                               std::vector<uint64_t> out;
                               for (auto& piece : r.region->pieces) out.push_back(piece.offset);
                               return out;
                             })
      .def_buffer([](RegionHandle& r) {
        if (r.region->pieces.size() != 1)
          raise(Code::kInvalidArgument,
                cat("region '", r.region->name, "' has ", r.region->pieces.size(),
                    " pieces and no single array; use the buffers it was made of"));
        return py::buffer_info(reinterpret_cast<uint8_t*>(r.region->pieces[0].base),
                               static_cast<py::ssize_t>(r.region->nbytes), !r.region->writable);
      });

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
                               std::lock_guard lock(p.mutex);
                               return p.lost_because;
                             })
      .def_property_readonly("regions",
                             [](const Peer& p) {
                               std::map<std::string, RemoteRegionPtr> copy;
                               {
                                 py::gil_scoped_release release;
                                 std::lock_guard lock(p.mutex);
                                 copy = p.regions;
                               }
                               return copy;
                             })
      .def("__repr__", [](const Peer& p) {
        return cat("<Peer '", p.identity.name, "' at ", p.identity.address, ", incarnation ",
                   hex(p.identity.incarnation).substr(0, 8), p.alive ? "" : ", lost", ">");
      });

  py::class_<Transfer, TransferPtr>(m, "Transfer")
      .def_readonly("id", &Transfer::id)
      .def_readonly("nbytes", &Transfer::nbytes)
      .def_property_readonly("state", [](const Transfer& t) { return to_string(t.state.load()); })
      .def_property_readonly("done", [](const Transfer& t) { return t.terminal(); })
      .def_property_readonly("error", &error_of)
      .def_property_readonly("agreed", [](const Transfer& t) { return t.terminal() && t.agreed; })
      .def_property_readonly(
          "quiesced", [](const Transfer& t) { return t.quiesced.load(std::memory_order_acquire); })
      .def_property_readonly("nbytes_done", [](const Transfer& t) { return t.nbytes_done.load(); })
      .def_property_readonly("peer", [](const Transfer& t) { return t.peer; })
      .def_property_readonly("transport",
                             [](const Transfer& t) -> py::object {
                               const char* name = t.transport.load(std::memory_order_acquire);
                               return name ? py::object(py::str(name)) : py::none();
                             })
      .def(
          "wait",
          [](const TransferPtr& t, Timeout timeout_s) {
            const int64_t deadline_ns = deadline_of(timeout_s);
            end_of_wait(t, blocking([&] { return t->wait(deadline_ns); }), timeout_s);
          },
          py::arg("timeout_s") = py::none())
      .def("cancel",
           [](const TransferPtr& t) {
             py::gil_scoped_release release;
             if (auto engine = t->engine.lock()) engine->cancel(t);
           })
      .def("watch", &Transfer::watch, py::arg("watch"))
      .def("__await__",
           [](py::object self) {
             return py::module_::import("kvxfer.transfer.waiting")
                 .attr("wait_async")(self)
                 .attr("__await__")();
           })
      .def("__repr__", [](const Transfer& t) {
        return cat("<Transfer ", t.id, " ", to_string(t.state.load()), ", ", t.nbytes, " bytes>");
      });

  py::class_<LeaseHandle>(m, "Lease")
      .def_property_readonly("token", [](const LeaseHandle& l) { return to_bytes(l.lease->token); })
      .def_property_readonly("num_arrivals",
                             [](const LeaseHandle& l) { return l.lease->num_arrivals; })
      .def_property_readonly(
          "num_arrived",
          [](const LeaseHandle& l) { return l.lease->num_arrived.load(std::memory_order_acquire); })
      .def("arrived_indices", &arrived)
      .def("wait_arrived", &wait_arrived, py::arg("indices"), py::arg("timeout_s"))
      .def(
          "extend",
          [](LeaseHandle& l, double ttl_s) {
            py::gil_scoped_release release;
            l.engine->extend(l.lease, ttl_s);
          },
          py::arg("ttl_s"))
      .def_property_readonly("expired",
                             [](const LeaseHandle& l) { return l.lease->expired.load(); })
      .def_property_readonly("closed", [](const LeaseHandle& l) { return l.lease->gate.closed(); })
      .def_property_readonly("quiet", [](const LeaseHandle& l) { return l.lease->gate.quiet(); })
      .def("begin_revoke",
           [](LeaseHandle& l) {
             py::gil_scoped_release release;
             l.engine->begin_revoke(l.lease);
           })
      .def("revoke", &revoke, py::arg("timeout_s"));

  py::class_<TransportConfig>(m, "TransportConfig")
      .def(py::init<>())
      .def_readwrite("num_lanes", &TransportConfig::num_lanes)
      .def_readwrite("copy_threads", &TransportConfig::copy_threads)
      .def_readwrite("spin_ns", &TransportConfig::spin_ns)
      .def_readwrite("allow_ptrace", &TransportConfig::allow_ptrace)
      .def_readwrite("tls_certificate", &TransportConfig::tls_certificate)
      .def_readwrite("tls_key", &TransportConfig::tls_key)
      .def_readwrite("tls_authority", &TransportConfig::tls_authority)
      .def_readwrite("faults", &TransportConfig::faults);

  py::class_<EngineHandle>(m, "Engine")
      .def(py::init([](std::string name, std::string listen, std::vector<std::string> transports,
                       const py::bytes& secret, bool secret_is_explicit, TransportConfig config) {
             EngineOptions options;
             options.name = std::move(name);
             options.listen = std::move(listen);
             options.transports = std::move(transports);
             options.secret = from_bytes("secret", secret);
             options.secret_is_explicit = secret_is_explicit;
             options.transport = std::move(config);
             py::gil_scoped_release release;
             return std::make_unique<EngineHandle>(Engine::create(std::move(options)));
           }),
           py::kw_only(), py::arg("name"), py::arg("listen"), py::arg("transports"),
           py::arg("secret"), py::arg("secret_is_explicit"), py::arg("config"))
      .def_property_readonly("address", [](const EngineHandle& e) { return e.engine->address(); })
      .def_property_readonly("name", [](const EngineHandle& e) { return e.engine->self().name; })
      .def_property_readonly(
          "incarnation", [](const EngineHandle& e) { return hex(e.engine->self().incarnation); })
      .def_property_readonly("closed", [](const EngineHandle& e) { return e.engine->closed(); })
      .def(
          "allocate",
          [](EngineHandle& e, uint64_t nbytes, std::string name, bool require_lease,
             bool shareable) {
            py::gil_scoped_release release;
            return RegionHandle{
                e.engine->allocate(nbytes, {std::move(name), require_lease, shareable})};
          },
          py::arg("nbytes"), py::kw_only(), py::arg("name"), py::arg("require_lease"),
          py::arg("shareable"))
      .def(
          "register",
          [](EngineHandle& e, const py::object& buffer, std::string name, bool require_lease,
             bool shareable) {
            empty_graveyard();
            Buffers buffers = take_buffers(buffer);
            py::gil_scoped_release release;
            return RegionHandle{e.engine->register_pieces(
                std::move(buffers.pieces), buffers.writable, std::move(buffers.keep),
                {std::move(name), require_lease, shareable})};
          },
          py::arg("buffer"), py::kw_only(), py::arg("name"), py::arg("require_lease"),
          py::arg("shareable"))
      .def("deregister", &deregister, py::arg("region"), py::arg("timeout_s"))
      .def(
          "connect",
          [](EngineHandle& e, const std::string& address, double timeout_s) {
            deadline_of(timeout_s);
            py::gil_scoped_release release;
            return e.engine->connect(address, timeout_s);
          },
          py::arg("address"), py::arg("timeout_s"))
      .def(
          "submit",
          [](EngineHandle& e, bool is_read, const RegionHandle& region,
             const RemoteRegionPtr& remote, const py::object& local_offsets,
             const py::object& remote_offsets, const py::object& nbytes, const py::object& bases,
             const py::object& notify, std::optional<uint64_t> arrival, const py::object& lease,
             Timeout deadline_s) {
            return submit(e, is_read ? Op::kRead : Op::kWrite, region, remote, local_offsets,
                          remote_offsets, nbytes, bases, notify, arrival, lease, deadline_s);
          },
          py::arg("is_read"), py::arg("region"), py::arg("remote"), py::arg("local_offsets"),
          py::arg("remote_offsets"), py::arg("nbytes"), py::arg("bases"), py::arg("notify"),
          py::arg("arrival"), py::arg("lease"), py::arg("deadline_s"))
      .def(
          "notify",
          [](EngineHandle& e, const PeerPtr& peer, const py::object& payload, Timeout deadline_s) {
            empty_graveyard();
            SubmitOptions options = submit_options(payload, {}, py::none(), deadline_s);
            options.has_notify = true;
            py::gil_scoped_release release;
            return e.engine->notify(peer, std::move(options));
          },
          py::arg("peer"), py::arg("payload"), py::arg("deadline_s"))
      .def("notifications",
           [](EngineHandle& e) {
             empty_graveyard();
             std::vector<Notification> taken;
             {
               py::gil_scoped_release release;
               taken = e.engine->notifications();
             }
             py::list out;
             for (auto& each : taken) out.append(py::make_tuple(each.peer, to_bytes(each.payload)));
             return out;
           })
      .def("peer_events",
           [](EngineHandle& e) {
             py::list out;
             for (auto& each : e.engine->peer_events())
               out.append(
                   py::make_tuple(each.connected ? "connected" : "lost", each.peer, each.cause));
             return out;
           })
      .def(
          "grant",
          [](EngineHandle& e, const RegionHandle& region, const py::object& offsets,
             const py::object& nbytes, double ttl_s, std::optional<std::string> peer,
             uint64_t num_arrivals) {
            Offsets from("offsets", offsets), size("nbytes", nbytes);
            std::optional<Incarnation> who;
            if (peer) {
              auto& incarnation = who.emplace();
              if (peer->size() != 2 * incarnation.size() ||
                  peer->find_first_not_of("0123456789abcdef") != std::string::npos)
                fail(Code::kInvalidArgument,
                     "peer must be a Peer or an incarnation of 32 hex digits, not '", *peer, "'");
              for (size_t i = 0; i < incarnation.size(); ++i)
                incarnation[i] = std::byte(std::stoi(peer->substr(2 * i, 2), nullptr, 16));
            }
            py::gil_scoped_release release;
            return LeaseHandle{e.engine->grant(region.region, from.column(), size.column(), ttl_s,
                                               who, num_arrivals),
                               e.engine};
          },
          py::arg("region"), py::arg("offsets"), py::arg("nbytes"), py::kw_only(), py::arg("ttl_s"),
          py::arg("peer"), py::arg("num_arrivals"))
      .def(
          "arrivals",
          [](EngineHandle& e, uint64_t tag, const PeerPtr& peer) {
            return e.engine->arrivals(tag, *peer);
          },
          py::arg("tag"), py::arg("peer"))
      .def("wait_arrivals", &wait_arrivals, py::arg("tag"), py::arg("peer"), py::arg("n"),
           py::arg("timeout_s"))
      .def("fileno", [](const EngineHandle& e) { return e.engine->fileno(); })
      .def("clear_wakeup", [](EngineHandle& e) { e.engine->clear_wakeup(); })
      .def(
          "explain",
          [](const EngineHandle& e, const PeerPtr& peer) {
            py::gil_scoped_release release;
            return e.engine->explain(*peer);
          },
          py::arg("peer"))
      .def("stats", &stats)
      .def("close", [](EngineHandle& e) {
        {
          py::gil_scoped_release release;
          e.engine->close();
        }
        empty_graveyard();
      });
}

}  // namespace kvxfer::bindings
