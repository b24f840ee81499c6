// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Unix sockets that carry file descriptors: how two processes of one user give each other memory.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/fd.hpp"
#include "common/wire.hpp"

namespace kvxfer::shm {

// Abstract names: nothing in the file system, gone with the process, private to a network
// namespace. SOCK_SEQPACKET keeps messages whole and says EOF when the other side is gone.
Fd listen_abstract(const std::string& name);                      // throws Error
Fd connect_abstract(const std::string& name, int& err) noexcept;  // invalid Fd and err on failure
std::optional<uint32_t> peer_uid(int fd) noexcept;
// As our pid namespace knows it; 0 when it does not.
int peer_pid(int fd) noexcept;

enum class Received : uint8_t { kMessage, kAgain, kClosed, kBroken };

// One message with its descriptors. kBroken: truncated, or more descriptors than `max_fds` (all
// that came are closed). Never blocks when the socket does not.
Received receive(int fd, Bytes& message, std::vector<Fd>& fds, size_t max_fds) noexcept;
// False and errno when it could not be sent whole.
bool send(int fd, ByteView message, std::span<const int> fds) noexcept;

}  // namespace kvxfer::shm
