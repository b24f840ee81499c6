// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A transfer as its initiator sees it: a request, the one end it comes to, and who waits for that.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/fork.hpp"
#include "common/wait_word.hpp"
#include "engine/latch.hpp"
#include "transport/transport.hpp"

namespace kvxfer {

class Engine;
struct Peer;
struct RemoteRegion;

// Lets an event loop sleep until any of the transfers it watches has ended: its own eventfd, so
// that it does not steal the wake-ups of Engine::fileno().
class Watch {
 public:
  Watch();
  int fileno() const noexcept { return event_.get(); }
  std::vector<uint64_t> take();  // ids that ended since; clears the eventfd
  void add(uint64_t id);

 private:
  Fd event_;
  std::mutex mutex_;
  std::vector<uint64_t> ended_;
};

struct Transfer final : Request, Alarm {
  ~Transfer() override;
  void ring(const std::shared_ptr<Alarm>& self) noexcept override;  // its deadline has passed

  // Written by the thread that ends it, before `state`; read by whoever has seen a terminal state.
  Failure failure;
  std::string message;
  bool agreed = false;

  std::atomic<State> state{State::kQueued};
  std::atomic<bool> claimed{false};   // the one compare-and-swap that decides who ends it
  std::atomic<bool> quiesced{false};  // release: the last touch of local memory came before
  std::atomic<uint64_t> nbytes_done{0};
  WaitWord changed;  // ended or quiesced

  // Where it is on its way to a connection: with the engine, inside post(), or
  // on `connection`.
  enum class Stage : uint8_t { kBacklog, kPosting, kOn, kGone };
  std::atomic<Stage> stage{Stage::kBacklog};
  // A cancel that met kPosting leaves its wish here for the poster (kQueued:
  // none).
  std::atomic<State> cancel_wanted{State::kQueued};
  std::atomic<bool> cancelling{false};
  std::shared_ptr<Connection> connection;       // set before kOn
  std::atomic<const char*> transport{nullptr};  // of the connection; null before it has one

  std::weak_ptr<Engine> engine;
  std::shared_ptr<Peer> peer;
  std::shared_ptr<RemoteRegion> target;  // null for kNotify
  LatchPtr after;                        // what it waits for while it is held
  Birth birth;
  Reactor::TimerId timer = Reactor::kNoTimer;
  bool is_counted = false;  // in Peer::num_pending, with so many spans
  uint64_t num_spans_counted = 0;
  bool holds_credit = false;  // of the peer's notification window; under the peer's mutex

  // A read that also notifies: the notification is a transfer of its own, sent when the bytes are
  // here, and this one ends as that one does.
  std::shared_ptr<Transfer> follow_up, parent;
  std::mutex mutex;  // over timer, following, ended, watchers
  bool following = false;
  LatchPtr ended;  // made for those that are to follow this one
  std::vector<std::shared_ptr<Watch>> watchers;

  bool terminal() const noexcept { return state.load(std::memory_order_acquire) >= State::kDone; }
  // kNotified: it has ended.
  Woken wait(int64_t deadline_ns) noexcept;
  // Opens when this one is done, fails when it ends otherwise.
  LatchPtr latch();
  // True when it has ended already (and nothing will be added to the watch).
  bool watch(const std::shared_ptr<Watch>& who);
};
using TransferPtr = std::shared_ptr<Transfer>;

const char* to_string(State state) noexcept;

}  // namespace kvxfer
