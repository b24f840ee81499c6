// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A shm connection and, at its other end, a peer that the input moves: it may follow the protocol,
// break it, or write whatever it likes into everything that both share.
#pragma once

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <memory>
#include <utility>
#include <vector>

#include "shm_host.hpp"
#include "transport/shm/connection.hpp"

namespace kvxfer::fuzz {

// Private memory that is all zeros again at the price of one system call.
inline std::shared_ptr<shm::Mapping> make_scratch(size_t nbytes) {
  void* base = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  FUZZ_CHECK(base != MAP_FAILED);
  return std::make_shared<shm::Mapping>(static_cast<std::byte*>(base), nbytes);
}

class ShmPeer {
 public:
  explicit ShmPeer(ShmHost& host, std::shared_ptr<shm::Mapping> control = nullptr,
                   std::unique_ptr<shm::Reach> reach = shm::make_mapped_reach())
      : host_(host) {
    static const auto scratch = make_scratch(sizeof(shm::Control));
    static const auto staging = make_scratch(shm::kStageBytes);
    static const auto theirs = [] {
      auto mapping = make_scratch(shm::kStageBytes);
      std::memset(mapping->data(), static_cast<int>(kTheirs), mapping->size());
      return mapping;
    }();
    if (!control) {
      ::madvise(scratch->data(), scratch->size(), MADV_DONTNEED);
      control = scratch;
    }
    control_ = reinterpret_cast<shm::Control*>(control->data());
    int ends[2];
    FUZZ_CHECK(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    socket_ = Fd(ends[1]);
    shm::ShmConnection::Parts parts;
    parts.control = control;
    parts.staging.mapping = staging;
    parts.peer_staging = theirs;
    parts.my_bell = Fd(::eventfd(0, EFD_NONBLOCK));
    parts.peer_bell = Fd(::eventfd(0, EFD_NONBLOCK));
    parts.socket = Fd(ends[0]);
    parts.reach = std::move(reach);
    connection_ = std::make_shared<shm::ShmConnection>(host, std::move(parts));
    shm::Side& mine = control_->side[1];
    messages_.attach(&mine.messages, mine.message_data, shm::kMessageRingBytes);
    bulk_.attach(&mine.bulk, mine.bulk_data, shm::kBulkRingBytes);
    heard_.attach(&ours().messages, ours().message_data, shm::kMessageRingBytes);
    heard_bulk_.attach(&ours().bulk, ours().bulk_data, shm::kBulkRingBytes);
  }

  shm::ShmConnection& connection() noexcept { return *connection_; }
  shm::Side& side(int i) noexcept { return control_->side[i & 1]; }

  void message(shm::Type type, std::initializer_list<ByteView> parts) {
    messages_.push(static_cast<uint32_t>(type), {parts.begin(), parts.size()});
  }
  void bulk(shm::Type type, std::initializer_list<ByteView> parts) {
    bulk_.push(static_cast<uint32_t>(type), {parts.begin(), parts.size()});
  }
  // Takes what the engine says, so that there is room again.
  void hear() {
    uint32_t type = 0;
    Bytes body;
    for (int i = 0; i < 64 && heard_.peek(type, body) == shm::Pop::kRecord; ++i) heard_.release();
    for (int i = 0; i < 64 && heard_bulk_.peek(type, body) == shm::Pop::kRecord; ++i) {
      heard_bulk_.release();
      if (type == static_cast<uint32_t>(shm::Type::kReadData)) ours().stage_head.fetch_add(1);
    }
    std::vector<Fd> fds;
    for (int i = 0; i < 8 && shm::receive(socket_.get(), body, fds, 1) == shm::Received::kMessage;)
      ++i;
  }
  void announce(uint32_t type, uint64_t region, uint64_t nbytes, ByteView rest,
                std::span<const int> fds) {
    Bytes bytes;
    Writer writer(bytes);
    writer.u32(type), writer.u32(0), writer.u64(region), writer.u64(nbytes), writer.raw(rest);
    send_raw(bytes, fds);
  }
  void send_raw(ByteView bytes, std::span<const int> fds) {
    if (socket_) shm::send(socket_.get(), bytes, fds);
  }
  // A request that names a region never announced: the connection looks at its socket first.
  void make_it_read_the_socket() {
    if (host_.is_lost()) return;
    const shm::RequestHead head{.ticket = {shm::kNumSlots - 1, 1},
                                .flags = shm::kMapped | shm::kInline,
                                .region = {ShmHost::kShown, kKey},
                                .lease = {ShmHost::kShown, kKey},
                                .source = 999'999};
    message(shm::Type::kRequest, {view_of(head)});
    connection_->poll();
  }
  // The end: the peer's process is gone, or else our engine closes.
  void leave() {
    socket_.reset();
    make_it_read_the_socket();
    if (!host_.is_lost()) {
      connection_->close({.code = Code::kCancelled, .text = "the engine closes"});
      host_.reactor().start();
      host_.reactor().stop();
    }
    FUZZ_CHECK(host_.is_lost());
  }

 private:
  shm::Side& ours() noexcept { return control_->side[0]; }

  ShmHost& host_;
  shm::Control* control_ = nullptr;
  Fd socket_;
  std::shared_ptr<shm::ShmConnection> connection_;
  shm::RingProducer messages_, bulk_;
  shm::RingConsumer heard_, heard_bulk_;
};

}  // namespace kvxfer::fuzz
