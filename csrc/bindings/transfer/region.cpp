// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's region, as Python sees it.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {

namespace {

const char* name_of(Exposure::State state) {
  switch (state) {
    case Exposure::State::kRunning:
      return "running";
    case Exposure::State::kDone:
      return "done";
    case Exposure::State::kFailed:
      return "failed";
    case Exposure::State::kDropped:
      return "dropped";
  }
  return "unknown";
}

py::list registration(const RegionHandle& self) {
  py::list out;
  for (const ExposurePtr& each : self.region->exposures) {
    const Exposure::State state = each->state();
    const bool over = state != Exposure::State::kRunning;
    out.append(py::make_tuple(each->transport, name_of(state), each->nbytes_done.load(),
                              each->nbytes, over ? each->text() : std::string()));
  }
  return out;
}

void wait_registered(const RegionHandle& self, const Timeout& timeout_s) {
  const int64_t deadline_ns = deadline_of(timeout_s);
  const Region& region = *self.region;
  for (const ExposurePtr& each : region.exposures) {
    check_process(each->birth);
    const Woken why = blocking(deadline_ns, [&](int64_t until_ns) { return each->wait(until_ns); });
    if (why == Woken::kTimedOut)
      raise(
          make_exception(Code::kTimeout,
                         cat(each->nbytes_done.load(), " of ", each->nbytes, " bytes of region '",
                             region.name, "' are registered after ", *timeout_s, " s; it goes on"),
                         0, each->transport, {}));
    if (each->state() == Exposure::State::kDropped)
      raise(Code::kInvalidArgument,
            cat("region '", region.name, "' was deregistered before it was registered"));
  }
  check_reached(region);
}

}  // namespace

void register_regions(py::module_& m) {
  py::class_<RegionHandle>(
      m, "Region", py::buffer_protocol(),
      "The native half of kvxfer.transfer.Region: memory that peers may reach.\n\n"
      "To drop the object does not deregister it; engine.deregister() and engine.close() do.")
      .def_property_readonly(
          "name", [](const RegionHandle& r) { return r.region->name; }, "What peers call it.")
      .def_property_readonly(
          "nbytes", [](const RegionHandle& r) { return r.region->nbytes; },
          "Its size, of all pieces.")
      .def_property_readonly(
          "writable", [](const RegionHandle& r) { return r.region->writable; },
          "False for a read-only buffer.")
      .def_property_readonly(
          "device", [](const RegionHandle& r) { return device_text(r.region->device); },
          "\"cpu\", or \"cuda:N\": a GPU's memory.")
      .def_property_readonly(
          "allocated", [](const RegionHandle& r) { return bool(r.region->memfd); },
          "True: by allocate(). False: by register().")
      .def_property_readonly(
          "page_nbytes", [](const RegionHandle& r) { return r.region->backing.page_nbytes; },
          "Bytes per page of allocated memory; 0 of registered memory.")
      .def_property_readonly(
          "fill_gb_per_s", [](const RegionHandle& r) { return r.region->backing.gb_per_s; },
          "GB/s at which the pages of allocated memory were filled.")
      .def_property_readonly(
          "backing", [](const RegionHandle& r) { return r.region->backing.text; },
          "What allocated memory is made of, in words.")
      .def_property_readonly("registration", &registration,
                             "A tuple for each transport that registers memory: its name, the "
                             "state, the bytes that are registered, all of them, and in words "
                             "what there is to say once it is over.")
      .def("wait_registered", &wait_registered, py::arg("timeout_s"),
           "Returns when no transport registers the region any more.")
      .def_property_readonly(
          "piece_offsets",
          [](const RegionHandle& r) {
            std::vector<uint64_t> out;
            for (auto& piece : r.region->pieces) out.push_back(piece.offset);
            return out;
          },
          "Where each registered buffer begins, in bytes from the region's start.")
      .def_buffer([](RegionHandle& r) {
        if (r.region->is_on_gpu())
          raise(Code::kInvalidArgument,
                cat("region '", r.region->name, "' is memory of ", device_text(r.region->device),
                    ", which the CPU cannot touch; use the tensors it was made of"));
        if (r.region->pieces.size() != 1)
          raise(Code::kInvalidArgument,
                cat("region '", r.region->name, "' has ", r.region->pieces.size(),
                    " pieces and no single array; use the buffers it was made of"));
        return py::buffer_info(reinterpret_cast<uint8_t*>(r.region->pieces[0].base),
                               static_cast<py::ssize_t>(r.region->nbytes), !r.region->writable);
      });
}

}  // namespace kvxfer::bindings
