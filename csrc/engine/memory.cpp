// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/clock.hpp"
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

struct Filled {
  int err = 0;
  size_t num_threads = 1;
  double seconds = 0;
};

// Every page is present before the segment is shown to anyone: a page fault that cannot be served
// would be a SIGBUS in the reader.
Filled populate(std::byte* base, size_t nbytes, size_t page) {
  const size_t part_nbytes = std::max(size_t{64} << 20, page);
  const size_t num_parts = (nbytes + part_nbytes - 1) / part_nbytes;
  Filled out;
  out.num_threads =
      std::min<size_t>(num_parts, std::clamp(std::thread::hardware_concurrency() / 2, 1u, 16u));
  const int64_t began = now_ns();
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  auto work = [&] {
    for (size_t part; (part = next.fetch_add(1)) < num_parts && error == 0;) {
      const size_t begin = part * part_nbytes, size = std::min(part_nbytes, nbytes - begin);
      if (::madvise(base + begin, size, MADV_POPULATE_WRITE) != 0) {
        if (errno != EINVAL) {
          error = errno;
          return;
        }
        // Before Linux 5.14: touch each page.
        for (size_t at = begin; at < begin + size; at += page)
          *reinterpret_cast<volatile std::byte*>(base + at) = std::byte{0};
      }
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < out.num_threads; ++i) threads.emplace_back(work);
  work();
  for (auto& thread : threads) thread.join();
  out.seconds = static_cast<double>(std::max<int64_t>(now_ns() - began, 1)) * 1e-9;
  out.err = error;
  return out;
}

struct Problem {
  int err = 0;
  std::string what;
};

// Makes, maps, fills and seals. `flags` choose the kind of pages, of `page` bytes each.
std::optional<Problem> make_segment(size_t nbytes, size_t page, unsigned flags,
                                    const std::string& name, Segment& out) {
  const size_t size = (nbytes + page - 1) / page * page;
  const auto failed = [](auto&&... what) { return Problem{errno, cat(what...)}; };
  out.memfd = Fd(::memfd_create(("kvxfer:" + name.substr(0, 200)).c_str(),
                                MFD_CLOEXEC | MFD_ALLOW_SEALING | flags));
  if (!out.memfd) return failed("memfd_create");
  if (::ftruncate(out.memfd.get(), static_cast<off_t>(size)) != 0)
    return failed("ftruncate(", size, ")");
  void* base = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, out.memfd.get(), 0);
  if (base == MAP_FAILED) return failed("mmap(", size, ")");
  out.mapping = std::shared_ptr<void>(base, [size](void* p) { ::munmap(p, size); });
  out.base = static_cast<std::byte*>(base);
  const Filled filled = populate(out.base, size, page);
  if (filled.err != 0) return Problem{filled.err, cat("filling ", size, " bytes")};
  // After our own writable mapping exists: from here on nobody can make another, nor truncate.
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
  if (::fcntl(out.memfd.get(), F_ADD_SEALS, seals) != 0) return failed("sealing");
  // Kernels before 5.13 take the seal for huge pages and do not keep it.
  void* other = ::mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_SHARED, out.memfd.get(), 0);
  if (other != MAP_FAILED) {
    ::munmap(other, page);
    return Problem{EOPNOTSUPP, "the seal against other writers is not kept"};
  }
  out.backing.page_nbytes = page;
  out.backing.gb_per_s = static_cast<double>(size) * 1e-9 / filled.seconds;
  out.backing.text =
      cat(page / 1024, " KiB pages, filled at ", std::round(out.backing.gb_per_s * 10) / 10,
          " GB/s by ", filled.num_threads, " thread(s)");
  return {};
}

uint64_t number_in(const std::string& path) {
  std::ifstream in(path);
  uint64_t value = 0;
  in >> value;
  return value;
}

// Of the size that mmap takes by default; 0 where the kernel has none.
size_t huge_page_nbytes() {
  std::ifstream in("/proc/meminfo");
  std::string key;
  uint64_t kib = 0;
  while (in >> key) {
    if (key == "Hugepagesize:" && in >> kib) return kib * 1024;
    in.ignore(256, '\n');
  }
  return 0;
}

// Empty when `out` was made of huge pages; else the reason.
std::string make_huge(size_t nbytes, const std::string& name, Segment& out) {
  const size_t page = huge_page_nbytes();
  if (page == 0) return "this kernel has none";
  if (nbytes < page) return "smaller than one of them";
  const std::string pool = cat("/sys/kernel/mm/hugepages/hugepages-", page / 1024, "kB/");
  const uint64_t free = number_in(pool + "free_hugepages"),
                 reserved = number_in(pool + "resv_hugepages"), needed = (nbytes + page - 1) / page;
  if (free < reserved + needed)
    return cat(needed, " of ", page / 1024, " KiB needed, ", free - std::min(free, reserved),
               " free in the pool (vm.nr_hugepages)");
  if (auto problem = make_segment(nbytes, page, MFD_HUGETLB, name, out)) {
    out = {};
    return cat(problem->what, ": ", errno_text(problem->err));
  }
  return {};
}

}  // namespace

Segment allocate_segment(size_t nbytes, const std::string& name) {
  Segment out;
  const std::string why_not = make_huge(nbytes, name, out);
  if (why_not.empty()) return out;
  if (const uint64_t available = available_bytes(); nbytes > available)
    fail(Code::kRegistration, "cannot allocate ", nbytes, " bytes for region '", name, "': only ",
         available, " bytes of memory are available (MemAvailable); make the pool smaller");
  if (auto problem =
          make_segment(nbytes, static_cast<size_t>(::sysconf(_SC_PAGESIZE)), 0, name, out))
    fail_errno(Code::kRegistration, problem->err, "allocating ", nbytes, " bytes for region '",
               name, "': ", problem->what, " failed");
  out.backing.text += "; no huge pages: " + why_not;
  return out;
}

}  // namespace kvxfer
