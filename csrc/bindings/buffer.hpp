// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory of Python objects, kept alive for as long as a region needs it, also by engine threads.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <vector>

#include "engine/spans.hpp"
#include "transport/region.hpp"

namespace kvxfer::bindings {

struct Buffers {
  std::vector<Piece> pieces;
  bool writable = true;
  bool is_on_gpu = false;  // by their own word; the engine asks CUDA
  std::shared_ptr<void> keep;
};
// One object or a sequence of them, C-contiguous: buffer protocol or DLPack on the CPU, or
// __cuda_array_interface__; not both kinds at once.
Buffers take_buffers(const pybind11::object& source);
// Likewise, without a GPU's.
Buffers take_host_buffers(const pybind11::object& source);

// Engine threads never touch the interpreter: what they drop last lies here until the next call
// that holds the GIL.
void empty_graveyard();

// An int or a one-dimensional C-contiguous int64 array, borrowed for the length of a call.
class Offsets {
 public:
  Offsets(const char* name, const pybind11::object& value);
  ~Offsets();
  Offsets(const Offsets&) = delete;
  Offsets& operator=(const Offsets&) = delete;
  Column column() const noexcept;
  // For bases=: shape [m, 2].
  static constexpr int kPairs = 2;
  Offsets(const char* name, const pybind11::object& value, int columns);
  size_t size() const noexcept { return size_; }
  const int64_t* data() const noexcept { return data_; }

 private:
  void take(const char* name, const pybind11::object& value, int columns);
  pybind11::object keep_;  // an array of NumPy's
  Py_buffer view_{};       // or of whatever else has it
  bool has_view_ = false, scalar_ = false;
  int64_t value_ = 0;
  const int64_t* data_ = nullptr;
  size_t size_ = 0;
};

// A one-dimensional C-contiguous int32 or int64 array, borrowed likewise.
class BlockIdArray {
 public:
  BlockIdArray(const char* name, const pybind11::object& value);
  ~BlockIdArray();
  BlockIdArray(const BlockIdArray&) = delete;
  BlockIdArray& operator=(const BlockIdArray&) = delete;
  BlockIds ids() const noexcept { return ids_; }

 private:
  pybind11::object keep_;
  Py_buffer view_{};
  BlockIds ids_;
};

}  // namespace kvxfer::bindings
