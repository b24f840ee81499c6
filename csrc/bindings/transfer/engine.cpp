// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine, as the Python face calls it.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

// The engine, to be asked about a peer of its own.
Engine& engine_of(const EngineHandle& self, const PeerPtr& peer) {
  Engine& engine = self.get();
  if (peer->owner != &engine)
    fail(Code::kInvalidArgument, "peer '", peer->identity.name, "' is not a peer of this engine");
  return engine;
}

void wait_arrivals(EngineHandle& self, uint64_t tag, const PeerPtr& peer, uint64_t count,
                   const Timeout& timeout_s) {
  Engine& engine = engine_of(self, peer);
  const int64_t deadline_ns = deadline_of(timeout_s);
  uint64_t have = 0;
  bool alive = true;
  const Woken why = blocking(deadline_ns, [&](int64_t until_ns) {
    engine.rest();
    for (;;) {
      const uint32_t seen = peer->tags_changed.read();
      alive = peer->alive;
      have = engine.arrivals(tag, *peer);
      if (have >= count || !alive) return Woken::kNotified;
      if (Woken woken = peer->tags_changed.wait(seen, until_ns); woken != Woken::kNotified)
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
  Engine& engine = self.get();
  const int64_t deadline_ns = deadline_of(timeout_s);
  const Woken why = blocking(deadline_ns, [&](int64_t until_ns) {
    engine.rest();
    engine.deregister(region.region);
    return region.region->gate.wait_quiet(until_ns);
  });
  empty_graveyard();
  if (why == Woken::kTimedOut)
    raise(Code::kTimeout,
          cat("region '", region.region->name, "' is not quiet after ", *timeout_s, " s"));
}

}  // namespace

void register_engine(py::module_& m) {
  py::class_<TransportConfig>(m, "TransportConfig")
      .def(py::init<>())
      .def_readwrite("num_lanes", &TransportConfig::num_lanes)
      .def_readwrite("copy_threads", &TransportConfig::copy_threads)
      .def_readwrite("spin_ns", &TransportConfig::spin_ns)
      .def_readwrite("allow_ptrace", &TransportConfig::allow_ptrace)
      .def_readwrite("tls_certificate", &TransportConfig::tls_certificate)
      .def_readwrite("tls_key", &TransportConfig::tls_key)
      .def_readwrite("tls_authority", &TransportConfig::tls_authority)
      .def_readwrite("deadline_ns", &TransportConfig::deadline_ns)
      .def_readwrite("max_pending", &TransportConfig::max_pending)
      .def_readwrite("max_pending_spans", &TransportConfig::max_pending_spans)
      .def_readwrite("verbs_device", &TransportConfig::verbs_device)
      .def_readwrite("verbs_gid_index", &TransportConfig::verbs_gid_index)
      .def_readwrite("verbs_queue_pairs", &TransportConfig::verbs_queue_pairs)
      .def_readwrite("verbs_background_nbytes", &TransportConfig::verbs_background_nbytes)
      .def_readwrite("verbs_part_nbytes", &TransportConfig::verbs_part_nbytes)
      .def_readwrite("verbs_push", &TransportConfig::verbs_push)
      .def_readwrite("faults", &TransportConfig::faults);

  py::class_<EngineHandle> engine(m, "Engine");
  define_submits(engine);
  engine
      .def(py::init([](std::string name, std::string listen, std::vector<std::string> transports,
                       const py::bytes& secret, bool secret_is_explicit, TransportConfig config) {
             EngineOptions options;
             options.name = std::move(name);
             options.listen = std::move(listen);
             options.transports = std::move(transports);
             options.secret = from_bytes("secret", secret);
             options.secret_is_explicit = secret_is_explicit;
             options.transport = std::move(config);
             const WithoutGil release;
             return std::make_unique<EngineHandle>(Engine::create(std::move(options)));
           }),
           py::kw_only(), py::arg("name"), py::arg("listen"), py::arg("transports"),
           py::arg("secret"), py::arg("secret_is_explicit"), py::arg("config"))
      .def_property_readonly("address", [](const EngineHandle& e) { return e.engine->address(); })
      .def_property_readonly("name", [](const EngineHandle& e) { return e.engine->self().name; })
      .def_property_readonly(
          "incarnation", [](const EngineHandle& e) { return hex(e.engine->self().incarnation); })
      .def_property_readonly("closed", [](const EngineHandle& e) { return e.engine->closed(); })
      .def("unused_region_name",
           [](EngineHandle& e) {
             const WithoutGil release;
             return e.get().unused_region_name();
           })
      .def(
          "allocate",
          [](EngineHandle& e, uint64_t nbytes, std::string name, bool require_lease,
             bool shareable) {
            const WithoutGil release;
            return RegionHandle{
                e.get().allocate(nbytes, {std::move(name), require_lease, shareable})};
          },
          py::arg("nbytes"), py::kw_only(), py::arg("name"), py::arg("require_lease"),
          py::arg("shareable"))
      .def(
          "register",
          [](EngineHandle& e, const py::object& buffer, std::string name, bool require_lease,
             bool shareable) {
            empty_graveyard();
            Buffers buffers = take_buffers(buffer);
            const WithoutGil release;
            return RegionHandle{e.get().register_pieces(
                std::move(buffers.pieces), buffers.writable, std::move(buffers.keep),
                {std::move(name), require_lease, shareable, buffers.is_on_gpu})};
          },
          py::arg("buffer"), py::kw_only(), py::arg("name"), py::arg("require_lease"),
          py::arg("shareable"))
      .def("deregister", &deregister, py::arg("region"), py::arg("timeout_s"))
      .def(
          "connect",
          [](EngineHandle& e, const std::string& address, double timeout_s) {
            deadline_of(timeout_s);
            try {
              WithoutGil release;
              return e.get().connect(address, timeout_s, [&] { return release.interrupted(); });
            } catch (const Error&) {
              if (PyErr_Occurred() != nullptr) throw py::error_already_set();  // Ctrl-C
              throw;
            }
          },
          py::arg("address"), py::arg("timeout_s"))
      .def("notifications",
           [](EngineHandle& e) {
             empty_graveyard();
             std::vector<Notification> taken;
             {
               const WithoutGil release;
               taken = e.get().notifications();
             }
             py::list out;
             for (auto& each : taken) out.append(py::make_tuple(each.peer, to_bytes(each.payload)));
             return out;
           })
      .def("peer_events",
           [](EngineHandle& e) {
             std::vector<PeerEvent> taken;
             {
               const WithoutGil release;
               taken = e.get().peer_events();
             }
             py::list out;
             for (auto& each : taken)
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
                     "peer must be a Peer or an incarnation of 32 hex digits, "
                     "not '",
                     *peer, "'");
              for (size_t i = 0; i < incarnation.size(); ++i)
                incarnation[i] = std::byte(std::stoi(peer->substr(2 * i, 2), nullptr, 16));
            }
            const WithoutGil release;
            return LeaseHandle{e.get().grant(region.region, from.column(), size.column(), ttl_s,
                                             who, num_arrivals),
                               e.engine};
          },
          py::arg("region"), py::arg("offsets"), py::arg("nbytes"), py::kw_only(), py::arg("ttl_s"),
          py::arg("peer"), py::arg("num_arrivals"))
      .def(
          "arrivals",
          [](EngineHandle& e, uint64_t tag, const PeerPtr& peer) {
            const WithoutGil release;
            Engine& owner = engine_of(e, peer);
            owner.poll();
            return owner.arrivals(tag, *peer);
          },
          py::arg("tag"), py::arg("peer").none(false))
      .def("wait_arrivals", &wait_arrivals, py::arg("tag"), py::arg("peer").none(false),
           py::arg("n"), py::arg("timeout_s"))
      .def("fileno", [](const EngineHandle& e) { return e.get().fileno(); })
      .def("clear_wakeup", [](EngineHandle& e) { e.get().clear_wakeup(); })
      .def(
          "explain",
          [](const EngineHandle& e, const PeerPtr& peer) {
            const WithoutGil release;
            return engine_of(e, peer).explain(*peer);
          },
          py::arg("peer").none(false))
      .def("stats", &stats)
      .def("close", [](EngineHandle& e) {
        {
          const WithoutGil release;
          e.engine->close();
        }
        empty_graveyard();
      });
}

}  // namespace kvxfer::bindings
