// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Device memory of the tests: NaN until written, and a page that faults on either side.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace shim {

// count elements that end at a page which may not be touched; aligned to 16 bytes.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) : count_(count) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t nbytes = (count * sizeof(T) + 15) / 16 * 16;
    mapped_ = (nbytes + page - 1) / page * page + 2 * page;
    void* all =
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) abort();
    map_ = static_cast<char*>(all);
    if (mprotect(map_ + page, mapped_ - 2 * page, PROT_READ | PROT_WRITE) != 0) abort();
    data_ = reinterpret_cast<T*>(map_ + mapped_ - page - nbytes);
    // Poison also what alignment leaves in front and behind.
    if (mapped_ < (size_t{1} << 30)) std::memset(map_ + page, 0xff, mapped_ - 2 * page);
  }
  explicit Guarded(const std::vector<T>& values) : Guarded(values.size()) {
    std::memcpy(data_, values.data(), values.size() * sizeof(T));
  }
  ~Guarded() { munmap(map_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }
  std::vector<T> values() const { return {data_, data_ + count_}; }

 private:
  size_t count_, mapped_;
  char* map_;
  T* data_;
};

}  // namespace shim
