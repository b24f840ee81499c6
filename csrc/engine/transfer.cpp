// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "engine/transfer.hpp"

#include <sys/eventfd.h>

#include <cerrno>

#include "engine/engine.hpp"
#include "engine/span_pool.hpp"

namespace kvxfer {

Watch::Watch() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!event_) fail_errno(Code::kUnavailable, errno, "eventfd failed");
}

void Watch::add(uint64_t id) {
  std::lock_guard lock(mutex_);
  ended_.push_back(id);
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
}

std::vector<uint64_t> Watch::take() {
  std::lock_guard lock(mutex_);
  uint64_t count;
  [[maybe_unused]] const ssize_t n = ::read(event_.get(), &count, sizeof count);
  return std::exchange(ended_, {});
}

Transfer::~Transfer() { SpanPool::shared().give(std::move(spans)); }

Woken Transfer::wait(int64_t deadline_ns) noexcept {
  // First a short look on this very thread, which spares the wake-ups of two.
  if (!terminal() && stage.load(std::memory_order_acquire) == Stage::kOn)
    if (const auto owner = engine.lock())
      if (const auto what = connection->pollable())
        owner->reactor().spin_for(what, deadline_ns, [this] { return terminal(); });
  if (!terminal())
    if (const auto owner = engine.lock()) owner->rest();
  for (;;) {
    const uint32_t seen = changed.read();
    if (terminal()) return Woken::kNotified;
    if (Woken why = changed.wait(seen, deadline_ns); why != Woken::kNotified)
      return terminal() ? Woken::kNotified : why;
  }
}

bool Transfer::watch(const std::shared_ptr<Watch>& who) {
  if (const auto owner = engine.lock()) owner->rest();
  std::lock_guard lock(mutex);
  if (terminal()) return true;
  watchers.push_back(who);
  return false;
}

LatchPtr Transfer::latch() {
  std::lock_guard lock(mutex);
  if (!ended) {
    ended = std::make_shared<Latch>();
    if (terminal()) state.load() == State::kDone ? ended->open() : ended->fail(message);
  }
  return ended;
}

const char* to_string(State state) noexcept {
  switch (state) {
    case State::kHeld:
      return "held";
    case State::kQueued:
      return "queued";
    case State::kPosted:
      return "posted";
    case State::kDone:
      return "done";
    case State::kFailed:
      return "failed";
    case State::kTimedOut:
      return "timed_out";
    case State::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

}  // namespace kvxfer
