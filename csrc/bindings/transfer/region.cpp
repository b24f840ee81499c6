// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The owner's region, as Python sees it.
#include "bindings/transfer/handles.hpp"

namespace py = pybind11;

namespace kvxfer::bindings {

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
          "What allocated memory is made of, and which transports cannot reach the region, in "
          "words.")
      .def_property_readonly(
          "piece_offsets",
          [](const RegionHandle& r) {
            std::vector<uint64_t> out;
            for (auto& piece : r.region->pieces) out.push_back(piece.offset);
            return out;
          },
          "Where each registered buffer begins, in bytes from the region's start.")
      .def_buffer([](RegionHandle& r) {
        if (r.region->pieces.size() != 1)
          raise(Code::kInvalidArgument,
                cat("region '", r.region->name, "' has ", r.region->pieces.size(),
                    " pieces and no single array; use the buffers it was made of"));
        return py::buffer_info(reinterpret_cast<uint8_t*>(r.region->pieces[0].base),
                               static_cast<py::ssize_t>(r.region->nbytes), !r.region->writable);
      });
}

}  // namespace kvxfer::bindings
