// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine as a tcp connection sees it that one thread drives. Memory of a write of ours is
// overwritten the moment that it is the caller's again: nothing of it may leave after that.
#pragma once

#include <string>

#include "common/hooks.hpp"
#include "engine/control.hpp"
#include "peer_host.hpp"

namespace kvxfer::fuzz {

inline constexpr std::byte kReused{0x77};

class TcpHost final : public PeerHost {
 public:
  bool control(tcp::TcpConnection&, ByteView payload) noexcept override {
    return decode_control(payload).has_value();
  }
  void ended(Connection& from, const RequestPtr& request, Completion completion) noexcept override {
    PeerHost::ended(from, request, std::move(completion));
    reuse(request->id);
  }
  void quiesced(Request& request) noexcept override {
    PeerHost::quiesced(request);
    reuse(request.id);
  }
  void cancel(Connection& connection, uint64_t id) {
    PeerHost::cancel(connection, id);
    if (id < num_ours_ && is_quiet(id)) reuse(id);
  }
  void lost(Connection& from, const Failure& failure) noexcept override {
    cause = failure.text;
    PeerHost::lost(from, failure);
  }
  void pass_time(int64_t ns) noexcept {
    hooks::skipped_ns.fetch_add(ns, std::memory_order_relaxed);
  }
  // Instead of PeerHost's: sources are as their owner left them.
  void check() {
    for (uint64_t id = 0; id < num_ours_; ++id) {
      if (!is_source(id)) continue;
      std::byte* slot = slot_of(id);
      for (uint64_t at = 0; at < kSlotBytes; ++at) FUZZ_CHECK(slot[at] == kReused);
      std::memset(slot, static_cast<int>(kUntouched), kSlotBytes);
      ours_[id].last.fill(kUntouched);
    }
    PeerHost::check();
  }
  std::string cause;  // of the connection's end

 private:
  bool is_source(uint64_t id) const noexcept {
    return ours_[id].request->op == Op::kWrite && ours_[id].request->local;
  }
  std::byte* slot_of(uint64_t id) noexcept {
    return area(ours_[id].request->local->id).at(id * kSlotBytes);
  }
  void reuse(uint64_t id) noexcept {
    if (!is_source(id)) return;
    std::byte* slot = slot_of(id);
    for (uint64_t at = 0; at < kSlotBytes; ++at)
      FUZZ_CHECK(slot[at] == kUntouched || slot[at] == kReused);
    std::memset(slot, static_cast<int>(kReused), kSlotBytes);
  }
};

}  // namespace kvxfer::fuzz
