// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A connection of another transport on which things go wrong on purpose, within what the contract
// of transport.hpp allows any transport to do.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/faulty/plan.hpp"
#include "transport/transport.hpp"

namespace kvxfer::faulty {

// The first half of a write or read. Its id is that of the whole, which it stands for.
struct Truncated final : Request {
  RequestPtr whole;
};

class FaultyConnection final : public Connection {
 public:
  FaultyConnection(Host& host, const Plan& plan, uint64_t seed, std::shared_ptr<Connection> below);

  std::optional<std::string> refuses(const Request& request) const override;
  bool reaches_gpus() const noexcept override { return below_->reaches_gpus(); }
  Status post(const RequestPtr& request) noexcept override;
  Cancelled cancel(const RequestPtr& request) noexcept override;
  void close(const Failure& cause) noexcept override { below_->close(cause); }
  void join() noexcept override { below_->join(); }
  std::string describe() const override;

  // What the connection below told its host.
  void on_ended(uint64_t id, Completion completion);
  void on_writable();
  void on_lost(const Failure& cause);
  void mirror() noexcept;  // its counters are ours

 private:
  enum class Stage : uint8_t {
    kHeld,     // with us, on its way down
    kPosting,  // a thread of ours is inside the post below
    kBelow,    // the connection below has it
    kEnded,    // ended below; the end is held back
    kLost,     // nobody will ever end it: dropped, or its end was lost
  };
  struct Flight {
    RequestPtr request;
    RequestPtr below;  // the same, or its first half
    Stage stage = Stage::kHeld;
    Completion completion;
    int64_t end_delay_ns = 0;
    bool truncated = false, lose_ack = false, reorder = false, duplicate = false;
    bool at_once = false;    // a cancel waits for the end: no delay any more
    bool abandoned = false;  // the engine has ended it: only Host::quiesced is still due
  };
  enum class Fate : uint8_t { kNone, kAgain, kDrop, kError };

  bool roll(double probability);  // mutex_ held
  int64_t roll(const Plan::Delay& delay);
  Fate roll(Flight& flight, int64_t& delay_ns);
  Status hand_down(uint64_t id);
  void hand_down_late(uint64_t id);
  void tell(Flight flight);
  void tell_at(uint64_t id, int64_t when_ns);
  void release(uint64_t id);  // tells a held end
  void settle(const Flight& flight, bool shown);
  void soon(void (FaultyConnection::*what)(uint64_t), uint64_t id, int64_t when_ns);

  Host& host_;
  const Plan plan_;
  const std::shared_ptr<Connection> below_;

  mutable std::mutex mutex_;  // over all below; held across no call into below_ or host_
  std::mt19937_64 random_;
  std::unordered_map<uint64_t, Flight> flights_;
  std::deque<uint64_t> waiting_;  // kHeld, met back-pressure below
  std::optional<uint64_t> reordered_;
  uint64_t num_posts_ = 0, num_errors_ = 0;
  bool room_wanted_ = false, dead_ = false;
};

}  // namespace kvxfer::faulty
