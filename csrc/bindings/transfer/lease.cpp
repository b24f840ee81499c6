// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A lease, as its owner in Python sees it.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

uint64_t check_index(const Lease& lease, int64_t index) {
  if (index < 0 || static_cast<uint64_t>(index) >= lease.num_arrivals)
    fail(Code::kInvalidArgument, "arrival index ", index,
         " is not below the lease's num_arrivals=", lease.num_arrivals);
  return static_cast<uint64_t>(index);
}

void wait_arrived(LeaseHandle& self, const py::object& indices, const Timeout& timeout_s) {
  self.engine->check_here();
  Offsets wanted("indices", indices);
  const Column column = wanted.column();
  std::vector<uint64_t> missing;
  for (size_t i = 0; i < column.size; ++i) missing.push_back(check_index(*self.lease, column[i]));
  const int64_t deadline_ns = deadline_of(timeout_s);
  Lease& lease = *self.lease;
  bool closed = false;
  const Woken why = blocking(deadline_ns, [&](int64_t until_ns) {
    self.engine->rest();
    for (;;) {
      const uint32_t seen = lease.arrival_word.read();
      closed = lease.gate.closed();
      std::erase_if(missing, [&](uint64_t index) { return lease.arrived(index); });
      if (missing.empty() || closed) return Woken::kNotified;
      if (Woken woken = lease.arrival_word.wait(seen, until_ns); woken != Woken::kNotified)
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
  Woken why = blocking(deadline_ns, [&](int64_t until_ns) {
    self.get().rest();
    self.get().begin_revoke(self.lease);
    return self.lease->gate.wait_quiet(until_ns);
  });
  if (why == Woken::kTimedOut && !self.lease->gate.quiet())
    raise(Code::kTimeout, cat("the lease on region '", self.lease->region->name,
                              "' is not quiet after ", *timeout_s,
                              " s: what had begun under it may still land; its spans stay "
                              "quarantined until lease.quiet is true"));
}

// Before a look at what may come: who looks again and again brings it in by looking.
void poll(const LeaseHandle& self) {
  if (!self.engine->here()) return;
  const WithoutGil release;
  self.engine->poll();
}

py::list arrived(const LeaseHandle& self) {
  poll(self);
  py::list out;
  for (uint64_t i = 0; i < self.lease->num_arrivals; ++i)
    if (self.lease->arrived(i)) out.append(i);
  return out;
}

}  // namespace

void register_leases(py::module_& m) {
  py::class_<LeaseHandle>(
      m, "Lease",
      "The native half of kvxfer.transfer.Lease: a peer's right to some spans, for a time.\n\n"
      "To drop the object does not revoke it: it ends by revoke(), begin_revoke(), its time to\n"
      "live, engine.deregister() of its region, or engine.close().")
      .def_property_readonly(
          "token", [](const LeaseHandle& l) { return to_bytes(l.lease->token); },
          "What its holder passes as lease=: bytes, unguessable.")
      .def_property_readonly(
          "num_arrivals", [](const LeaseHandle& l) { return l.lease->num_arrivals; },
          "Arrival indices are 0 to num_arrivals - 1.")
      .def_property_readonly(
          "num_arrived",
          [](const LeaseHandle& l) {
            poll(l);
            return l.lease->num_arrived.load(std::memory_order_acquire);
          },
          "How many different indices have arrived.")
      .def("arrived_indices", &arrived, "The indices that have arrived, sorted: list[int].")
      .def("wait_arrived", &wait_arrived, py::arg("indices"), py::arg("timeout_s"),
           "Returns when all `indices` (int64, or one int) have arrived; timeout_s=None: for "
           "ever.\n\n"
           "Raises:\n"
           "    InvalidArgumentError: an index out of range.\n"
           "    TransferTimeoutError: not within `timeout_s` seconds.\n"
           "    LeaseError: the lease ended first.")
      .def(
          "extend",
          [](LeaseHandle& l, double ttl_s) {
            const WithoutGil release;
            l.get().extend(l.lease, ttl_s);
          },
          py::arg("ttl_s"),
          "The time to live is `ttl_s` seconds from now. LeaseError: it has ended already.")
      .def_property_readonly(
          "expired", [](const LeaseHandle& l) { return l.lease->expired.load(); },
          "True when its time to live ended it, and no revoke.")
      .def_property_readonly(
          "closed", [](const LeaseHandle& l) { return l.lease->gate.closed(); },
          "True: nothing new is taken; revoked or expired.")
      .def_property_readonly(
          "quiet", [](const LeaseHandle& l) { return l.lease->gate.quiet(); },
          "True: nothing can land under it any more, whatever its holder does.")
      .def(
          "begin_revoke",
          [](LeaseHandle& l) {
            const WithoutGil release;
            l.get().begin_revoke(l.lease);
          },
          "Closes it and returns at once; `quiet` follows.")
      .def("revoke", &revoke, py::arg("timeout_s"),
           "Closes it and returns when it is quiet.\n\n"
           "Raises:\n"
           "    TransferTimeoutError: not within `timeout_s` seconds; it is closed all the same, "
           "and\n"
           "        its spans stay quarantined until `quiet`.");
}

}  // namespace kvxfer::bindings
