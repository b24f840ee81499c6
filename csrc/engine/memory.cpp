// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "common/error.hpp"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace kvxfer {
namespace {

// What the kernel thinks could be had without swapping; touching more wakes the OOM killer, which
// is no way to report an error.
uint64_t available_bytes() {
  std::ifstream in("/proc/meminfo");
  std::string key, unit;
  uint64_t kib;
  while (in >> key >> kib) {
    std::getline(in, unit);
    if (key == "MemAvailable:") return kib * 1024;
  }
  return std::numeric_limits<uint64_t>::max();
}

// Every page is present before the segment is shown to anyone: a page fault that cannot be served
// would be a SIGBUS in the reader.
int populate(std::byte* base, size_t nbytes) {
  constexpr size_t kPart = size_t{64} << 20;
  const size_t num_parts = (nbytes + kPart - 1) / kPart;
  const size_t num_threads =
      std::min<size_t>(num_parts, std::clamp(std::thread::hardware_concurrency() / 2, 1u, 16u));
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  auto work = [&] {
    for (size_t part; (part = next.fetch_add(1)) < num_parts && error == 0;) {
      const size_t begin = part * kPart, size = std::min(kPart, nbytes - begin);
      if (::madvise(base + begin, size, MADV_POPULATE_WRITE) != 0) {
        if (errno != EINVAL) {
          error = errno;
          return;
        }
        // Before Linux 5.14: touch each page.
        for (size_t at = begin; at < begin + size; at += 4096)
          *reinterpret_cast<volatile std::byte*>(base + at) = std::byte{0};
      }
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < num_threads; ++i) threads.emplace_back(work);
  work();
  for (auto& thread : threads) thread.join();
  return error;
}

}  // namespace

Segment allocate_segment(size_t nbytes, const std::string& name) {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t size = (nbytes + page - 1) / page * page;
  if (const uint64_t available = available_bytes(); size > available)
    fail(Code::kRegistration, "cannot allocate ", nbytes, " bytes for region '", name, "': only ",
         available, " bytes of memory are available (MemAvailable); make the pool smaller");
  Segment out;
  out.memfd = Fd(
      ::memfd_create(("kvxfer:" + name.substr(0, 200)).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!out.memfd)
    fail_errno(Code::kRegistration, errno, "memfd_create for region '", name, "' failed");
  if (::ftruncate(out.memfd.get(), static_cast<off_t>(size)) != 0)
    fail_errno(Code::kRegistration, errno, "ftruncate(", size, ") for region '", name, "' failed");
  void* base = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, out.memfd.get(), 0);
  if (base == MAP_FAILED)
    fail_errno(Code::kRegistration, errno, "mmap(", size, ") for region '", name, "' failed");
  out.mapping = std::shared_ptr<void>(base, [size](void* p) { ::munmap(p, size); });
  out.base = static_cast<std::byte*>(base);
  if (const int err = populate(out.base, size); err != 0)
    fail_errno(Code::kRegistration, err, "filling ", size, " bytes for region '", name, "' failed");
  // After our own writable mapping exists: from here on nobody can make another, nor truncate.
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
  if (::fcntl(out.memfd.get(), F_ADD_SEALS, seals) != 0)
    fail_errno(Code::kRegistration, errno, "sealing region '", name, "' failed");
  return out;
}

}  // namespace kvxfer
