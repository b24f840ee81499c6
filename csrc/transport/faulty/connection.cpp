// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/faulty/connection.hpp"

#include <algorithm>
#include <utility>

#include "common/clock.hpp"

namespace kvxfer::faulty {
namespace {

constexpr int64_t kAgainNs = 1'000'000, kReorderNs = 5'000'000;

std::shared_ptr<Truncated> first_half(const RequestPtr& whole) {
  auto half = std::make_shared<Truncated>();
  half->whole = whole;
  half->id = whole->id;
  half->op = whole->op;
  half->local = whole->local;
  half->remote = whole->remote;
  half->lease = whole->lease;
  half->deadline_ns = whole->deadline_ns;
  for (const Span& span : whole->spans) {
    const uint64_t room = whole->nbytes / 2 - half->nbytes;
    if (room == 0) break;
    half->spans.push_back(span);
    half->spans.back().nbytes = static_cast<uint32_t>(std::min<uint64_t>(span.nbytes, room));
    half->nbytes += half->spans.back().nbytes;
  }
  return half;
}

}  // namespace

FaultyConnection::FaultyConnection(Host& host, const Plan& plan, uint64_t seed,
                                   std::shared_ptr<Connection> below)
    : Connection("faulty"), host_(host), plan_(plan), below_(std::move(below)), random_(seed) {}

std::optional<std::string> FaultyConnection::refuses(const Request& request) const {
  return below_->refuses(request);
}

std::string FaultyConnection::describe() const {
  return cat("faulty (", plan_.text, ") over ", below_->describe());
}

void FaultyConnection::mirror() noexcept {
  const Counters& from = below_->counters;
  // Relaxed: statistics. The engine itself counts notifications, on this object.
  const auto copy = [](std::atomic<uint64_t>& to, const std::atomic<uint64_t>& value) {
    to.store(value.load(std::memory_order_relaxed), std::memory_order_relaxed);
  };
  copy(counters.bytes_written, from.bytes_written);
  copy(counters.bytes_read, from.bytes_read);
  copy(counters.bytes_received, from.bytes_received);
  copy(counters.bytes_served, from.bytes_served);
  copy(counters.bytes_sunk, from.bytes_sunk);
  copy(counters.requests, from.requests);
  copy(counters.requests_served, from.requests_served);
  copy(counters.refused, from.refused);
}

// ---------------------------------------------------------------- chance

bool FaultyConnection::roll(double probability) {
  return probability > 0 && std::uniform_real_distribution<double>()(random_) < probability;
}

int64_t FaultyConnection::roll(const Plan::Delay& delay) {
  if (!roll(delay.probability)) return 0;
  return std::uniform_int_distribution<int64_t>(1, std::max<int64_t>(delay.up_to_ns, 1))(random_);
}

FaultyConnection::Fate FaultyConnection::roll(Flight& flight, int64_t& delay_ns) {
  if (roll(plan_.again)) return Fate::kAgain;
  ++num_posts_;
  // Dead, and its end is on its way by the progress thread: what comes until then goes nowhere.
  if (plan_.die != 0 && num_posts_ > plan_.die) return Fate::kDrop;
  if (roll(plan_.error.probability)) {
    constexpr auto kFirst = static_cast<uint64_t>(Code::kInvalidArgument);
    Code code = plan_.error.code;
    if (code == Code::kOk)
      code = static_cast<Code>(kFirst + num_errors_++ % (uint64_t{kMaxCode} + 1 - kFirst));
    flight.completion = {.ok = false,
                         .failure = {.code = code, .text = "injected by the faulty transport"}};
    return Fate::kError;
  }
  if (roll(plan_.drop)) return Fate::kDrop;
  delay_ns = roll(plan_.delay);
  flight.end_delay_ns = roll(plan_.delay_end);
  flight.reorder = roll(plan_.reorder);
  flight.duplicate = roll(plan_.duplicate);
  flight.lose_ack = roll(plan_.lose_ack);
  flight.truncated = flight.request->nbytes > 1 && roll(plan_.truncate);
  return Fate::kNone;
}

void FaultyConnection::soon(void (FaultyConnection::*what)(uint64_t), uint64_t id,
                            int64_t when_ns) {
  auto self = std::static_pointer_cast<FaultyConnection>(shared_from_this());
  host_.reactor().at(when_ns, [self, what, id] { ((*self).*what)(id); });
}

// ---------------------------------------------------------------- down

Status FaultyConnection::post(const RequestPtr& request) noexcept {
  Flight flight;
  flight.request = flight.below = request;
  int64_t delay_ns = 0;
  Fate fate;
  bool dies;
  {
    std::lock_guard lock(mutex_);
    if (dead_) return {Code::kPeerDisconnected};
    if (flights_.size() >= kMaxInFlight) {
      room_wanted_ = true;
      return {Code::kAgain};
    }
    fate = roll(flight, delay_ns);
    if (fate == Fate::kAgain) {
      auto self = std::static_pointer_cast<FaultyConnection>(shared_from_this());
      host_.reactor().at(now_ns() + kAgainNs, [self] { self->host_.writable(*self); });
      return {Code::kAgain};
    }
    if (flight.truncated) flight.below = first_half(request);
    if (fate == Fate::kDrop) flight.stage = Stage::kLost;
    if (fate == Fate::kError) flight.stage = Stage::kEnded;
    dies = plan_.die != 0 && num_posts_ == plan_.die;
    flights_.emplace(request->id, std::move(flight));
  }
  if (fate != Fate::kNone) host_.posted(*request);
  if (fate == Fate::kError) soon(&FaultyConnection::release, request->id, now_ns());
  Status status;
  if (fate == Fate::kNone) {
    if (delay_ns > 0)
      soon(&FaultyConnection::hand_down_late, request->id, now_ns() + delay_ns);
    else
      status = hand_down(request->id);
  }
  if (dies)
    below_->close({.code = Code::kPeerDisconnected,
                   .text = cat("the faulty transport ended the connection at post ", plan_.die)});
  return status;
}

Status FaultyConnection::hand_down(uint64_t id) {
  RequestPtr below;
  {
    std::lock_guard lock(mutex_);
    auto it = flights_.find(id);
    if (it == flights_.end() || it->second.stage != Stage::kHeld) return {};
    it->second.stage = Stage::kPosting;
    below = it->second.below;
  }
  const Status status = below_->post(below);
  mirror();
  std::lock_guard lock(mutex_);
  auto it = flights_.find(id);
  if (it == flights_.end()) return status;  // ended meanwhile
  if (!status.ok())
    flights_.erase(it);
  else if (it->second.stage == Stage::kPosting)
    it->second.stage = Stage::kBelow;
  return status;
}

// As hand_down, for a request that post() has taken: nobody waits for the status. Timer or
// writable.
void FaultyConnection::hand_down_late(uint64_t id) {
  Flight flight;
  {
    std::lock_guard lock(mutex_);
    auto it = flights_.find(id);
    if (it == flights_.end() || it->second.stage != Stage::kHeld) return;
    it->second.stage = Stage::kPosting;
    flight = it->second;
  }
  const Status status = below_->post(flight.below);
  mirror();
  {
    std::lock_guard lock(mutex_);
    auto it = flights_.find(id);
    if (it == flights_.end()) return;
    Flight& now = it->second;
    if (status.ok() && !now.abandoned) {
      if (now.stage == Stage::kPosting) now.stage = Stage::kBelow;
      return;
    }
    if (status.code == Code::kAgain && !now.abandoned) {
      now.stage = Stage::kHeld;
      waiting_.push_back(id);
      return;
    }
    flight = now;
    if (!status.ok()) flights_.erase(it);
  }
  if (status.ok()) {  // cancelled while it was being posted
    const Cancelled result = below_->cancel(flight.below);
    if (result.agreement == Agreement::kEnding) return;
    {
      std::lock_guard lock(mutex_);
      flights_.erase(id);
    }
    if (result.quiesced) host_.quiesced(*flight.request);
    if (result.agreement == Agreement::kStopped) host_.unshown(*this, *flight.request);
  } else if (flight.abandoned) {
    settle(flight, false);
  } else {
    host_.ended(
        *this, flight.request,
        {.ok = false, .failure = {.code = status.code, .text = "the connection has ended"}});
  }
}

Cancelled FaultyConnection::cancel(const RequestPtr& request) noexcept {
  const uint64_t id = request->id;
  auto self = std::static_pointer_cast<FaultyConnection>(shared_from_this());
  RequestPtr below;
  bool truncated = false;
  {
    std::lock_guard lock(mutex_);
    auto it = flights_.find(id);
    if (it == flights_.end()) return {Agreement::kEnding, true};
    Flight& flight = it->second;
    switch (flight.stage) {
      case Stage::kHeld:
        flights_.erase(it);
        return {Agreement::kStopped, true};
      case Stage::kPosting:
        flight.abandoned = true;
        return {Agreement::kUnknown, false};
      case Stage::kEnded:
        if (flight.completion.ok) {
          flights_.erase(it);
          return {Agreement::kAlreadyAccepted, true};
        }
        soon(&FaultyConnection::release, id, now_ns());
        return {Agreement::kEnding, true};
      case Stage::kLost:
        // Lost on its way, not on its way back: its notification was never shown.
        if (!flight.lose_ack)
          host_.reactor().post([self, request] { self->host_.unshown(*self, *request); });
        flights_.erase(it);
        return {Agreement::kUnknown, true};
      case Stage::kBelow:
        below = flight.below;
        truncated = flight.truncated;
    }
  }
  Cancelled result = below_->cancel(below);
  std::lock_guard lock(mutex_);
  auto it = flights_.find(id);
  if (truncated) {  // whatever became of the half, the whole can never be accepted
    if (it != flights_.end() && result.agreement == Agreement::kEnding) {
      it->second.abandoned = it->second.stage == Stage::kBelow;
      result.quiesced = !it->second.abandoned;
      if (!it->second.abandoned) flights_.erase(it);
    } else if (it != flights_.end()) {
      flights_.erase(it);
    }
    return {Agreement::kStopped, result.quiesced};
  }
  if (it == flights_.end()) return result;
  if (result.agreement != Agreement::kEnding) {
    flights_.erase(it);
  } else if (it->second.stage == Stage::kLost) {  // the end came meanwhile and was lost
    flights_.erase(it);
    return {Agreement::kUnknown, true};
  } else if (it->second.stage == Stage::kEnded) {
    soon(&FaultyConnection::release, id, now_ns());
  } else {
    it->second.at_once = true;
  }
  return result;
}

// ---------------------------------------------------------------- up

// The engine ended it long ago: what it is still owed.
void FaultyConnection::settle(const Flight& flight, bool shown) {
  host_.quiesced(*flight.request);
  if (!shown) host_.unshown(*this, *flight.request);
}

void FaultyConnection::tell(Flight flight) {
  const bool twice = flight.duplicate;
  Completion again;
  if (twice) again = flight.completion;
  host_.ended(*this, flight.request, std::move(flight.completion));
  if (twice) host_.ended(*this, flight.request, std::move(again));
}

void FaultyConnection::release(uint64_t id) {
  Flight flight;
  bool room;
  {
    std::lock_guard lock(mutex_);
    auto it = flights_.find(id);
    if (it == flights_.end() || it->second.stage != Stage::kEnded) return;
    flight = std::move(it->second);
    flights_.erase(it);
    if (reordered_ == id) reordered_.reset();
    room = std::exchange(room_wanted_, false);
  }
  tell(std::move(flight));
  if (room) host_.writable(*this);
}

void FaultyConnection::on_ended(uint64_t id, Completion completion) {
  mirror();
  std::optional<Flight> now, abandoned;
  std::optional<uint64_t> overtaken;
  bool breaks = false;
  {
    std::lock_guard lock(mutex_);
    auto it = flights_.find(id);
    if (it == flights_.end()) return;
    Flight& flight = it->second;
    flight.completion = std::move(completion);
    const bool half = flight.truncated && flight.completion.ok;
    if (flight.abandoned) {
      abandoned = std::move(flight);
      flights_.erase(it);
      breaks = half;
    } else if (half) {
      flight.stage = Stage::kLost;
      breaks = true;
    } else if (flight.lose_ack && flight.completion.ok && !flight.at_once) {
      flight.stage = Stage::kLost;
    } else if (!flight.at_once && flight.end_delay_ns > 0) {
      flight.stage = Stage::kEnded;
      soon(&FaultyConnection::release, id, now_ns() + flight.end_delay_ns);
    } else if (!flight.at_once && flight.reorder && !reordered_) {
      flight.stage = Stage::kEnded;
      reordered_ = id;
      soon(&FaultyConnection::release, id, now_ns() + kReorderNs);
    } else {
      flight.stage = Stage::kEnded;
      now = std::move(flight);
      flights_.erase(it);
      overtaken = reordered_;
    }
  }
  if (abandoned) settle(*abandoned, abandoned->completion.ok && !abandoned->truncated);
  if (breaks)
    below_->close({.code = Code::kTransport, .text = "the faulty transport broke the connection"});
  if (!now) return;
  tell(std::move(*now));
  if (overtaken) release(*overtaken);
  bool room;
  {
    std::lock_guard lock(mutex_);
    room = std::exchange(room_wanted_, false);
  }
  if (room) host_.writable(*this);
}

void FaultyConnection::on_writable() {
  std::deque<uint64_t> waiting;
  {
    std::lock_guard lock(mutex_);
    waiting.swap(waiting_);
  }
  for (const uint64_t id : waiting) hand_down_late(id);
  host_.writable(*this);
}

void FaultyConnection::on_lost(const Failure& cause) {
  std::vector<Flight> left;
  {
    std::lock_guard lock(mutex_);
    dead_ = true;
    for (auto& [id, flight] : flights_)
      if (flight.stage != Stage::kPosting) left.push_back(std::move(flight));
    std::erase_if(flights_, [](auto& entry) { return entry.second.stage != Stage::kPosting; });
    waiting_.clear();
  }
  for (Flight& flight : left) {
    if (flight.abandoned) {
      settle(flight, true);
      continue;
    }
    if (flight.stage != Stage::kEnded) {
      const bool agreed = flight.stage == Stage::kHeld;
      flight.completion = {.ok = false, .failure = cause, .agreed = agreed};
    }
    tell(std::move(flight));
  }
  host_.lost(*this, cause);
}

}  // namespace kvxfer::faulty
