// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Queue pairs of bulk come and go while the connection stays.
//
//   source side                                        pulling side
//   ERR, destroy: nothing is read any more             (its READs fail: kPullBroken, or before
//   that) kNewSource epoch+1  ──────────────────────────►    ERR, flush, destroy; chains are kept
//   connect             ◄──────────────────────────    kNewPuller
//   kSourceReady        ──────────────────────────►    chains are posted again
//
// An abort of ours that was sent before kNewSource is acted on before any chain is posted again, so
// a source that was taken away is never read on behalf of what was cancelled.
#include <algorithm>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "transport/verbs/connection.hpp"

namespace kvxfer::verbs {
namespace {
// How long a cancelled write waits for the owner's word before its source is taken away.
constexpr int64_t kAnswerNs = 200'000'000;
// How long a revocation waits for READs under way before the queue pair is stopped.
constexpr int64_t kGateNs = 250'000'000;
constexpr uint32_t kMaxBreaks = 4;  // without anything that came through in between
}  // namespace

// What was in flight is kept by its request, to be posted again.
void VerbsConnection::stop_pulls() {
  if (!pulls_.is_open()) return;
  pulls_broken_.store(true, std::memory_order_relaxed);
  stopping_pulls_ = true;
  if (pulls_.stop()) drain({pulls_.marker()}, kFlushNs);
  close_pulls();
}

// Destroyed, the queue pair touches nothing any more; only now are gates left.
void VerbsConnection::close_pulls() {
  std::deque<ChunkPtr> rest = pulls_.close();
  for (auto& [chunk, status] : std::exchange(parked_, {})) deliver(std::move(chunk), status);
  for (ChunkPtr& chunk : rest) deliver(std::move(chunk), IBV_WC_WR_FLUSH_ERR);
  stopping_pulls_ = pull_failed_ = false;
}

// `counts`: because it failed; else because we want what is in flight back.
void VerbsConnection::break_pulls(bool counts) {
  if (!pulls_.is_open()) return;
  const ibv_wc_status status = pulls_.first_error();
  stop_pulls();
  if (counts && ++num_breaks_ > kMaxBreaks)
    return die({.code = status == IBV_WC_RETRY_EXC_ERR ? Code::kPeerDisconnected : Code::kTransport,
                .text = cat(
                    "RDMA READs on ", device_->name(), " have failed ", num_breaks_,
                    " times in a row, at last: ",
                    status == IBV_WC_SUCCESS ? last_error_.c_str() : api().wc_status_str(status))});
  channel_.message(Type::kPullBroken,
                   {view_of(QpHead{peer_epoch_, 0, 0, static_cast<uint32_t>(status)})});
}

void VerbsConnection::replace_source() {
  if (source_) (void)stop_qp(source_.get());
  source_.reset();
  serving_ = false;
  source_gone_.store(true, std::memory_order_relaxed);
  ++source_epoch_;
  num_replaced_.fetch_add(1, std::memory_order_relaxed);
  try {
    QpShape shape;
    source_ = make_qp(*device_, completions_.get(), shape, IBV_ACCESS_REMOTE_READ);
    source_psn_ = random_psn();
  } catch (const Error& error) {
    return die({.code = error.code, .err = error.err, .text = error.what()});
  }
  outgoing_.source_gone();
  channel_.message(Type::kNewSource,
                   {view_of(QpHead{source_epoch_, source_->qp_num, source_psn_, 0})});
}

void VerbsConnection::on_queue_pairs(Type type, ByteView body) {
  Reader reader(body);
  const auto head = reader.get<QpHead>();
  if (!reader.finished()) return broken("a malformed message about queue pairs");
  try {
    switch (type) {
      case Type::kPullBroken:
        // One that was sent before our kNewSource arrived is answered by that.
        if (head.epoch == source_epoch_ && serving_) replace_source();
        return;
      case Type::kNewSource: {
        if (head.epoch != peer_epoch_ + 1) return broken("a source out of order");
        peer_epoch_ = head.epoch;
        stop_pulls();
        if (is_dead()) return;
        const QpEnd end = pulls_.open();
        pulls_.connect(route_, {head.number, head.psn}, issued_);
        channel_.message(Type::kNewPuller, {view_of(QpHead{head.epoch, end.number, end.psn, 0})});
        return;
      }
      case Type::kNewPuller:
        if (head.epoch != source_epoch_ || serving_) return;  // another one replaced it meanwhile
        connect_qp(*device_, source_.get(), route_, {head.number, head.psn}, source_psn_, served_,
                   0);
        serving_ = true;
        source_gone_.store(false, std::memory_order_relaxed);
        outgoing_.source_there();
        channel_.message(Type::kSourceReady, {view_of(QpHead{head.epoch, 0, 0, 0})});
        return;
      default:
        if (head.epoch != peer_epoch_ || !pulls_.is_open()) return;
        pulls_.start();
        pulls_broken_.store(false, std::memory_order_relaxed);
        return;
    }
  } catch (const Error& error) {
    die({.code = error.code, .err = error.err, .text = error.what()});
  }
}

bool VerbsConnection::on_queue_pair_event(uint32_t number, const char* event) {
  if (is_dead()) return false;
  if (number == channel_.end().number) {
    die({.code = Code::kTransport,
         .text = cat("the control queue pair on ", device_->name(), " reported: ", event)});
  } else if (pulls_.is_mine(number)) {
    last_error_ = event;
    break_pulls(true);
    host_.reactor().attend(self());  // for what was held while it flushed
  } else if (source_ && source_->qp_num == number) {
    if (serving_) replace_source();
  } else {
    return false;
  }
  return true;
}

std::string VerbsConnection::condition() const {
  std::string out;
  if (pulls_broken_.load(std::memory_order_relaxed))
    out = "our RDMA READs wait for the peer to connect a fresh queue pair";
  if (source_gone_.load(std::memory_order_relaxed))
    out += cat(out.empty() ? "" : "; ",
               "the peer's RDMA READs wait until it has answered about a fresh queue pair");
  return out;
}

// ---------------------------------------------------------------- what must not wait for ever

// Any thread, when answers_watched_ has just become true, or is.
void VerbsConnection::watch_answers(int64_t when_ns) {
  host_.reactor().at(when_ns + kAnswerNs, [weak = weak_from_this()] {
    if (auto self = std::static_pointer_cast<VerbsConnection>(weak.lock())) self->check_answers();
  });
}

void VerbsConnection::check_answers() noexcept {
  // First the flag: who cancels from here on watches anew.
  answers_watched_.store(false, std::memory_order_relaxed);
  if (is_dead()) return;
  const int64_t since_ns = outgoing_.unanswered_since();
  if (since_ns == kNever) return;
  if (now_ns() - since_ns >= kAnswerNs) return replace_source();
  if (!answers_watched_.exchange(true, std::memory_order_relaxed)) watch_answers(since_ns);
}

void VerbsConnection::watch_gates() {
  if (std::exchange(gates_watched_, true)) return;
  gates_timer_ = host_.reactor().at(now_ns() + kGateNs, [weak = weak_from_this()] {
    if (auto self = std::static_pointer_cast<VerbsConnection>(weak.lock())) self->check_gates();
  });
}

void VerbsConnection::check_gates() {
  gates_watched_ = false;
  if (is_dead()) return;
  const int64_t before_ns = now_ns() - kGateNs;
  for (const ChunkPtr& chunk : pulls_.in_flight())
    if (Incoming::waits_for_gate(*chunk, before_ns)) {
      break_pulls(false);
      host_.reactor().attend(self());  // for what was held while it flushed
      return;
    }
  if (!pulls_.is_empty()) watch_gates();
}

}  // namespace kvxfer::verbs
