// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>

#include "common/error.hpp"

#ifndef F_SEAL_FUTURE_WRITE  // Linux 5.1; headers of older distributions lack the name
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace kvxfer::shm {

namespace {

constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::shared_ptr<Mapping> map(int fd, size_t nbytes, int protection, std::string& reason) {
  void* base = ::mmap(nullptr, nbytes, protection, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) {
    reason = "mmap of " + std::to_string(nbytes) + " bytes failed: " + errno_text(errno);
    return nullptr;
  }
  // A forked child must not hold a second writer's view of the rings.
  ::madvise(base, nbytes, MADV_DONTFORK);
  return std::make_shared<Mapping>(static_cast<std::byte*>(base), nbytes);
}

Segment make(const char* name, size_t nbytes, int seals) {
  Segment result;
  result.fd = Fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  std::string reason;
  if (!result.fd) {
    reason = "memfd_create failed: " + errno_text(errno);
  } else if (::ftruncate(result.fd.get(), static_cast<off_t>(nbytes)) != 0) {
    reason = "ftruncate failed: " + errno_text(errno);
  } else if (result.mapping = map(result.fd.get(), nbytes, PROT_READ | PROT_WRITE, reason);
             result.mapping && ::fcntl(result.fd.get(), F_ADD_SEALS, seals) != 0) {
    reason = "sealing it failed: " + errno_text(errno);
    result.mapping.reset();
  }
  if (!result.mapping) {
    fail(Code::kRegistration, "shared memory segment '", name, "' of ", nbytes, " bytes: ", reason);
  }
  return result;
}

std::shared_ptr<Mapping> map_peer(int fd, size_t nbytes, int seals, int protection,
                                  std::string& reason) {
  const int have = ::fcntl(fd, F_GET_SEALS);
  if (have < 0) {
    reason = "the peer's segment cannot be sealed (not a memfd): " + errno_text(errno);
    return nullptr;
  }
  if ((have & seals) != seals) {
    reason = "the peer's segment lacks seals: has " + std::to_string(have) + ", needs " +
             std::to_string(seals);
    return nullptr;
  }
  struct stat info{};
  if (::fstat(fd, &info) != 0 || info.st_size < 0 || static_cast<size_t>(info.st_size) < nbytes) {
    reason = "the peer's segment is smaller than announced: " + std::to_string(info.st_size) +
             " bytes, announced " + std::to_string(nbytes);
    return nullptr;
  }
  // The whole file: a mapping of huge pages can only be unmapped in their size.
  return map(fd, static_cast<size_t>(info.st_size), protection, reason);
}

}  // namespace

Mapping::~Mapping() { ::munmap(base_, nbytes_); }

Segment make_owned(const char* name, size_t nbytes) {
  return make(name, nbytes, kSizeSeals | F_SEAL_FUTURE_WRITE);
}
Segment make_shared(const char* name, size_t nbytes) { return make(name, nbytes, kSizeSeals); }

std::shared_ptr<Mapping> map_peer_readonly(int fd, size_t nbytes, std::string& reason) {
  return map_peer(fd, nbytes, F_SEAL_SHRINK | F_SEAL_GROW, PROT_READ, reason);
}
std::shared_ptr<Mapping> map_peer_shared(int fd, size_t nbytes, std::string& reason) {
  return map_peer(fd, nbytes, F_SEAL_SHRINK | F_SEAL_GROW, PROT_READ | PROT_WRITE, reason);
}

}  // namespace kvxfer::shm
