// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How far a transport is with a region that it has to register, which takes it long. The region can
// be used meanwhile; what the transport does with it until then is the transport's to say.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "common/fork.hpp"
#include "common/wait_word.hpp"

namespace kvxfer {

class Exposure {
 public:
  enum class State : uint8_t { kRunning, kDone, kFailed, kDropped };

  Exposure(std::string_view transport, uint64_t nbytes) : transport(transport), nbytes(nbytes) {}

  const Birth birth;
  const std::string transport;
  const uint64_t nbytes;  // to be registered: the region's, once for each device
  // Written by whoever registers, read for reports; relaxed.
  std::atomic<uint64_t> nbytes_done{0};
  // The user named the transports, so none of them goes without the region in silence. Written by
  // the engine before it shows the region to anybody.
  bool required = false;

  State state() const noexcept { return state_.load(std::memory_order_acquire); }
  // What there is to say; once it has ended. Of a failure the reason.
  const std::string& text() const noexcept { return text_; }
  int err() const noexcept { return err_; }

  // Once, by whoever registers. The release publishes the text, and what a request finds by then.
  void end(State how, std::string text = {}, int err = 0) noexcept {
    text_ = std::move(text);
    err_ = err;
    state_.store(how, std::memory_order_release);
    changed_.notify_all();
  }
  // Until it has ended.
  Woken wait(int64_t deadline_ns) noexcept {
    for (;;) {
      const uint32_t seen = changed_.read();
      if (state() != State::kRunning) return Woken::kNotified;
      if (const Woken why = changed_.wait(seen, deadline_ns); why != Woken::kNotified) return why;
    }
  }

 private:
  std::atomic<State> state_{State::kRunning};
  std::string text_;
  int err_ = 0;
  WaitWord changed_;
};
using ExposurePtr = std::shared_ptr<Exposure>;

}  // namespace kvxfer
