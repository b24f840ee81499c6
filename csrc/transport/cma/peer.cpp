// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/cma/peer.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <fstream>

#include "common/error.hpp"

namespace kvxfer::cma {
namespace {

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

std::string permission_hint() {
  std::ifstream in("/proc/sys/kernel/yama/ptrace_scope");
  if (int scope = 0; in >> scope && scope > 0)
    return cat("; Yama's ptrace_scope is ", scope,
               scope == 1 ? ": set allow_ptrace=True on the peer, or give us CAP_SYS_PTRACE" : "");
  return "; a container's seccomp filter, a process that is not dumpable, or other capabilities "
         "than the peer's";
}

Failure failed(int pid, int err) {
  const std::string call = cat("process_vm_readv of pid ", pid, " failed: ", errno_text(err));
  if (err == ESRCH)
    return {.code = Code::kPeerDisconnected, .err = err, .text = cat(call, "; the peer is gone")};
  if (err == EFAULT)
    return {
        .code = Code::kRemoteAccess, .err = err, .text = cat(call, "; no memory is mapped there")};
  return {.code = Code::kTransport,
          .err = err,
          .text = cat(call, err == EPERM || err == ENOSYS ? permission_hint() : "")};
}

}  // namespace

std::optional<Failure> Peer::identify() const noexcept {
  size_t done;
  return read({}, {}, {}, done);
}

std::optional<Failure> Peer::read(std::span<iovec> local, std::span<iovec> remote,
                                  const shm::Watch& watch, size_t& done) const noexcept {
  // Elements are read in order: data, then the words that must still be open after it.
  std::array<iovec, kMaxElements> to, from;
  Incarnation incarnation{};
  uint64_t region = watch.region.value + 1, lease = watch.lease.value + 1;
  size_t num_to = 0, num_from = 0, expected = 0;
  for (const iovec& each : local) to[num_to++] = each, expected += each.iov_len;
  for (const iovec& each : remote) from[num_from++] = each;
  const size_t num_bytes = expected;
  const auto look = [&](void* into, uint64_t address, size_t size) {
    to[num_to++] = {into, size};
    from[num_from++] = {pointer(address), size};
    expected += size;
  };
  const bool watched[2] = {watch.region.index < ExportedWords::kNum,
                           watch.lease.index < ExportedWords::kNum};
  if (watched[0]) look(&region, words_ + uint64_t{watch.region.index} * sizeof(uint64_t), 8);
  if (watched[1]) look(&lease, words_ + uint64_t{watch.lease.index} * sizeof(uint64_t), 8);
  look(incarnation.data(), address_, sizeof(incarnation));

  const ssize_t n = ::process_vm_readv(pid_, to.data(), num_to, from.data(), num_from, 0);
  const int err = n < 0 ? errno : EFAULT;
  done = n < 0 ? 0 : std::min(static_cast<size_t>(n), num_bytes);
  if (n != static_cast<ssize_t>(expected)) {
    if (n < 0 && err != EFAULT) return failed(pid_, err);
    // Where even the words cannot be read, the memory is another program's.
    if (num_bytes == 0)
      return Failure{.code = Code::kPeerDisconnected,
                     .err = err,
                     .text = cat("pid ", pid_, " is not the peer's process any more")};
    // Memory that is gone because it was revoked is first of all revoked.
    size_t none;
    if (auto why = read({}, {}, watch, none)) return why;
    return failed(pid_, EFAULT);
  }
  if (incarnation != incarnation_)
    return Failure{.code = Code::kPeerDisconnected,
                   .text = cat("pid ", pid_, " has another incarnation at the address that the ",
                               "peer named: it is not the peer's process any more")};
  if (watched[1] ? lease != watch.lease.value : watch.lease.index != WordRef::kNone)
    return shm::PeerMemory::ended(true);
  if (watched[0] ? region != watch.region.value : watch.region.index != WordRef::kNone)
    return shm::PeerMemory::ended(false);
  return {};
}

}  // namespace kvxfer::cma
