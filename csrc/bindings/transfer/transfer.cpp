// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A transfer, and what an event loop watches it with, as Python sees them.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {
namespace {

// A program that asks whether it is done, and does nothing else, makes it so by asking.
bool ask(const Transfer& t) {
  if (t.terminal()) return true;
  if (t.birth.here()) {
    const WithoutGil release;
    if (const auto engine = t.engine.lock()) engine->poll();
  }
  return t.terminal();
}

py::object error_of(const Transfer& t) {
  if (!t.terminal() || t.state.load() == State::kDone) return py::none();
  const char* transport = t.transport.load();
  py::object out = make_exception(t.failure.code, t.message, t.failure.err,
                                  transport ? transport : "", t.peer->identity.name);
  if (t.failure.span != kNoSpan) out.attr("span") = t.failure.span;
  out.attr("nbytes_done") = t.nbytes_done.load();
  return out;
}

void end_of_wait(const TransferPtr& t, Woken why, const Timeout& timeout_s) {
  if (why == Woken::kTimedOut)
    raise(make_exception(Code::kTimeout,
                         cat("the transfer is still ", to_string(t->state.load()), " after ",
                             *timeout_s, " s of waiting; it goes on until its own deadline"),
                         0, {}, t->peer->identity.name));
  if (t->state.load() != State::kDone) raise(error_of(*t));
}

constexpr char kTransferDoc[] =
    "A write, a read or a notification on its way, and how it ended.\n\n"
    "`state` is first \"held\" (`after=` has not happened yet), \"queued\" (no transport has it\n"
    "yet) or \"posted\" (one has), and in the end, once and for good:\n\n"
    "    \"done\"       a write has landed at the peer, a read here; the peer has taken a\n"
    "                 notification\n"
    "    \"failed\"     refused, no transport carries it, or the peer was lost\n"
    "    \"timed_out\"  its deadline_s passed\n"
    "    \"cancelled\"  by cancel() or engine.close(), or what it waited for failed\n\n"
    "wait() and `await` return when it is done and raise `error` if it ended otherwise. To cancel\n"
    "an asyncio task that awaits it does not cancel it: call cancel(). To drop the object does\n"
    "not either. When its local memory may be used again, `quiesced` says.";

}  // namespace

void register_transfers(py::module_& m) {
  py::class_<Watch, std::shared_ptr<Watch>>(
      m, "Watch", "An eventfd that transfers signal when they end; what `await` sleeps on.")
      .def(py::init<>())
      .def("fileno", &Watch::fileno, "The eventfd: readable when a watched transfer has ended.")
      .def("take", &Watch::take,
           "The ids of the transfers that have ended since the last call; clears the eventfd.");

  py::class_<Transfer, TransferPtr>(m, "Transfer", kTransferDoc)
      .def_readonly("id", &Transfer::id, "A number that no other transfer of this engine has.")
      .def_readonly("nbytes", &Transfer::nbytes,
                    "Bytes asked for, of all spans; 0 for a notification.")
      .def_property_readonly(
          "state",
          [](const Transfer& t) {
            ask(t);
            return to_string(t.state.load());
          },
          "A str, one of those that the class lists. To ask does some of the engine's work.")
      .def_property_readonly("done", &ask,
                             "True when it has ended, well or not: see `error`. Never blocks.")
      .def_property_readonly(
          "error", &error_of,
          "None before the end and after a good one; else what wait() raises, an error of\n"
          "kvxfer.errors with `peer`, `transport`, `nbytes_done` and, where one is to blame,\n"
          "`span`: its index.")
      .def_property_readonly(
          "agreed", [](const Transfer& t) { return t.terminal() && t.agreed; },
          "Whether both sides are sure to see the same end. False before the end.\n\n"
          "True: it is done, or the peer never takes it, so it shows no arrival and no\n"
          "notification of it (part of a write may have landed all the same). False: the\n"
          "peer may or may not have taken it; its arrivals and its lease decide.")
      .def_property_readonly(
          "quiesced", [](const Transfer& t) { return t.quiesced.load(std::memory_order_acquire); },
          "True when this engine never touches the transfer's local memory again.\n\n"
          "Only then may the source of a write be overwritten, and the destination of a read be\n"
          "used for something else. False before the end, and for a while after a cancel or a\n"
          "timeout that found a system call or a copy at work there. It says nothing about the\n"
          "memory of the peer: that is what leases are for.\n\n"
          "Nothing waits for it alone. Look at it after each wake-up of engine.fileno(), which\n"
          "also tells of this, or again and again:\n\n"
          "    while not xfer.quiesced:\n"
          "        time.sleep(0.001)")
      .def_property_readonly(
          "nbytes_done", [](const Transfer& t) { return t.nbytes_done.load(); },
          "Bytes known to have landed: all of `nbytes` when it is done, otherwise possibly fewer\n"
          "than have. Not a progress bar: 0 until the bytes have all landed or the transfer ends.")
      .def_property_readonly(
          "peer", [](const Transfer& t) { return t.peer; }, "The Peer that it goes to.")
      .def_property_readonly(
          "transport",
          [](const Transfer& t) -> py::object {
            const char* name = t.transport.load(std::memory_order_acquire);
            return name ? py::object(py::str(name)) : py::none();
          },
          "The transport that carries it, such as \"shm\"; None before one was chosen.")
      .def(
          "wait",
          [](const TransferPtr& t, Timeout timeout_s) {
            check_process(t->birth);
            const int64_t deadline_ns = deadline_of(timeout_s);
            end_of_wait(t,
                        blocking(deadline_ns, [&](int64_t until_ns) { return t->wait(until_ns); }),
                        timeout_s);
          },
          py::arg("timeout_s") = py::none(),
          "Returns when it is done.\n\n"
          "Args:\n"
          "    timeout_s: seconds; None: until it ends, which its own deadline sees to.\n"
          "Raises:\n"
          "    TransferTimeoutError: it has not ended within `timeout_s` (`done` is False, and it\n"
          "        goes on), or its deadline passed (`state` is \"timed_out\").\n"
          "    TransferCancelledError: cancel(), engine.close(), or what it waited for failed.\n"
          "    KvxferError: any other `error`; PeerDisconnectedError, RemoteAccessError,\n"
          "        LeaseError and UnavailableError are the usual ones.")
      .def(
          "cancel",
          [](const TransferPtr& t) {
            check_process(t->birth);
            const WithoutGil release;
            if (auto engine = t->engine.lock()) engine->cancel(t);
          },
          "Ends it now. No error if it has ended: its end stays what it was.\n\n"
          "When this returns, it has ended: as \"cancelled\", or as \"done\" if the peer had "
          "taken\n"
          "it already, or as whatever it was about to end. `agreed` says whether the peer may\n"
          "still take it, and `quiesced` when the local memory is free. What a write has begun to\n"
          "store at the peer is not undone.")
      .def(
          "watch",
          [](Transfer& t, const std::shared_ptr<Watch>& watch) {
            check_process(t.birth);
            return t.watch(watch);
          },
          py::arg("watch"),
          "For `await`. False: `watch` will be told of the end. True: it has ended already, and\n"
          "`watch` is told nothing.")
      .def(
          "__await__",
          [](py::object self) {
            return py::module_::import("kvxfer.transfer.waiting")
                .attr("wait_async")(self)
                .attr("__await__")();
          },
          "Returns when it is done, raises `error` otherwise. To cancel the asyncio task, or to\n"
          "let asyncio.wait_for time out, ends the waiting alone; cancel() ends the transfer.")
      .def("__repr__", [](const Transfer& t) {
        return cat("<Transfer ", t.id, " ", to_string(t.state.load()), ", ", t.nbytes, " bytes>");
      });
}

}  // namespace kvxfer::bindings
