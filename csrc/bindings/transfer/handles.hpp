// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the files of this module share: Python's handles, and arguments that several calls take.
// The GIL is released around everything that may block, destructors included.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>

#include "bindings/buffer.hpp"
#include "bindings/errors.hpp"
#include "bindings/gil.hpp"
#include "engine/engine.hpp"

// Nothing is derived from a Transfer: its type need not be found out for each that is returned.
template <>
struct pybind11::polymorphic_type_hook<kvxfer::Transfer> {
  static const void* get(const kvxfer::Transfer* transfer, const std::type_info*& type) {
    type = &typeid(kvxfer::Transfer);
    return transfer;
  }
};

namespace kvxfer::bindings {

// Python's view of a region keeps the memory, not the engine, alive.
struct RegionHandle {
  RegionPtr region;
  explicit RegionHandle(RegionPtr r) : region(std::move(r)) {}
  RegionHandle(const RegionHandle&) = default;
  RegionHandle& operator=(const RegionHandle&) = default;
  // If it was the last to know the region, the buffer is free at once, not at the next call.
  ~RegionHandle() {
    region.reset();
    if (PyGILState_Check() != 0) empty_graveyard();
  }
};

struct EngineHandle {
  std::shared_ptr<Engine> engine;
  explicit EngineHandle(std::shared_ptr<Engine> e) : engine(std::move(e)) {}
  // Throws in a forked child, where a lock of the engine may be held for ever.
  Engine& get() const {
    engine->check_here();
    return *engine;
  }
  ~EngineHandle();
};

struct LeaseHandle {
  LeasePtr lease;
  std::shared_ptr<Engine> engine;
  Engine& get() const {
    engine->check_here();
    return *engine;
  }
};

// Throws in a process that was forked from the one that made the thing.
void check_process(const Birth& birth);

// Seconds, or None.
struct Timeout : std::optional<double> {
  using std::optional<double>::optional;
};
int64_t deadline_of(const Timeout& timeout_s, const char* name = "timeout_s");

pybind11::bytes to_bytes(ByteView bytes);
Bytes from_bytes(const char* name, const pybind11::object& value);

// A signal that comes just before a wait, and not inside it, wakes nobody: Ctrl-C would be lost
// until the deadline. So a wait is a row of short ones.
inline constexpr int64_t kLookForSignalsNs = 200'000'000;

// Runs `wait(until_ns)` without the GIL until it says something else than "a signal came", or the
// deadline has passed; Python's signal handlers run in between, so Ctrl-C works.
template <typename Wait>
Woken blocking(int64_t deadline_ns, Wait&& wait) {
  for (;;) {
    Woken why;
    const int64_t until_ns = std::min(deadline_ns, now_ns() + kLookForSignalsNs);
    {
      const WithoutGil release;
      why = wait(until_ns);
    }
    if (why == Woken::kNotified) return why;
    if (why == Woken::kTimedOut && until_ns == deadline_ns) return why;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  }
}

pybind11::dict stats(EngineHandle& self);

void register_requests(pybind11::module_& m);
void define_submits(pybind11::class_<EngineHandle>& engine);
void register_regions(pybind11::module_& m);
void register_peers(pybind11::module_& m);
void register_transfers(pybind11::module_& m);
void register_leases(pybind11::module_& m);
void register_engine(pybind11::module_& m);
void register_bounds(pybind11::module_& m);  // of bench/

}  // namespace kvxfer::bindings

template <>
struct pybind11::detail::type_caster<kvxfer::bindings::Timeout> {
  PYBIND11_TYPE_CASTER(kvxfer::bindings::Timeout, const_name("float | None"));
  bool load(handle source, bool) {
    value.reset();
    if (source.is_none()) return true;
    value.emplace(PyFloat_AsDouble(source.ptr()));
    if (*value == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      kvxfer::fail(kvxfer::Code::kInvalidArgument,
                   "a time must be a number of seconds or None, not ",
                   Py_TYPE(source.ptr())->tp_name);
    }
    return true;
  }
};
