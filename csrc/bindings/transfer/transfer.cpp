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

}  // namespace

void register_transfers(py::module_& m) {
  py::class_<Watch, std::shared_ptr<Watch>>(m, "Watch")
      .def(py::init<>())
      .def("fileno", &Watch::fileno)
      .def("take", &Watch::take);

  py::class_<Transfer, TransferPtr>(m, "Transfer")
      .def_readonly("id", &Transfer::id)
      .def_readonly("nbytes", &Transfer::nbytes)
      .def_property_readonly("state",
                             [](const Transfer& t) {
                               ask(t);
                               return to_string(t.state.load());
                             })
      .def_property_readonly("done", &ask)
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
            check_process(t->birth);
            const int64_t deadline_ns = deadline_of(timeout_s);
            end_of_wait(t,
                        blocking(deadline_ns, [&](int64_t until_ns) { return t->wait(until_ns); }),
                        timeout_s);
          },
          py::arg("timeout_s") = py::none())
      .def("cancel",
           [](const TransferPtr& t) {
             check_process(t->birth);
             const WithoutGil release;
             if (auto engine = t->engine.lock()) engine->cancel(t);
           })
      .def(
          "watch",
          [](Transfer& t, const std::shared_ptr<Watch>& watch) {
            check_process(t.birth);
            return t.watch(watch);
          },
          py::arg("watch"))
      .def("__await__",
           [](py::object self) {
             return py::module_::import("kvxfer.transfer.waiting")
                 .attr("wait_async")(self)
                 .attr("__await__")();
           })
      .def("__repr__", [](const Transfer& t) {
        return cat("<Transfer ", t.id, " ", to_string(t.state.load()), ", ", t.nbytes, " bytes>");
      });
}

}  // namespace kvxfer::bindings
