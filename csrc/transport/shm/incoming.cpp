// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/incoming.hpp"

#include <utility>

#include "common/error.hpp"

namespace kvxfer::shm {

Incoming::JobPtr Incoming::find(Ticket ticket) const {
  if (ticket.slot >= kNumSlots) return nullptr;
  const JobPtr& job = jobs_[ticket.slot];
  return job && job->ticket.generation == ticket.generation && !job->stopping ? job : nullptr;
}

void Incoming::tell(Ticket ticket, Code code, uint64_t nbytes, const Failure* failure) {
  std::string text;
  const OutcomeHead head = outcome_of(ticket, code, nbytes, failure, text);
  channel_.message(Type::kOutcome, {view_of(head), as_bytes_view(text)});
}

void Incoming::tell_late() {
  for (const Ticket& ticket : accepted_late_) tell(ticket, Code::kOk, 0, nullptr);
  accepted_late_.clear();
}

void Incoming::refuse(const JobPtr& job, Failure failure) {
  uint64_t posted = slot_word(job->ticket.generation, Slot::kPosted);
  channel_.peer_slot(job->ticket.slot)
      .compare_exchange_strong(posted, slot_word(job->ticket.generation, Slot::kRefused),
                               std::memory_order_acq_rel);
  connection_.counters.refused.fetch_add(1, std::memory_order_relaxed);
  tell(job->ticket, failure.code, job->done, &failure);
  jobs_[job->ticket.slot].reset();
}

void Incoming::drop(const JobPtr& job) {
  tell(job->ticket, Code::kCancelled, job->done, nullptr);
  jobs_[job->ticket.slot].reset();
}

// The peer hears of the end, and may use the slot again, only when no copier is inside.
void Incoming::stop(const JobPtr& job, std::optional<Failure> failure) {
  if (std::exchange(job->stopping, true)) return;
  job->failure = std::move(failure);
  settle(job);
}

void Incoming::settle(const JobPtr& job) {
  if (job->num_inside > 0) return;
  if (job->stopping)
    job->failure ? refuse(job, std::move(*job->failure)) : drop(job);
  else if (job->done == job->nbytes)
    finish(job);
}

bool Incoming::posted(const Job& job) noexcept {
  return channel_.peer_slot(job.ticket.slot).load(std::memory_order_acquire) ==
         slot_word(job.ticket.generation, Slot::kPosted);
}

bool Incoming::wanted(const JobPtr& job) {
  if (find(job->ticket) != job) return false;  // ended since it was queued
  if (posted(*job)) return true;
  stop(job, {});
  return false;
}

void Incoming::finish(const JobPtr& job) {
  struct Commit {
    std::atomic<uint64_t>& slot;
    const uint32_t generation;
    bool done = false;
  } commit{channel_.peer_slot(job->ticket.slot), job->ticket.generation};
  // Inside the gates, after the bytes and before anything is counted or shown: the one moment at
  // which the initiator's cancel and our acceptance exclude each other.
  job->arrival.commit = [&commit]() noexcept {
    uint64_t posted = slot_word(commit.generation, Slot::kPosted);
    commit.done = commit.slot.compare_exchange_strong(
        posted, slot_word(commit.generation, Slot::kAccepted), std::memory_order_acq_rel);
    return commit.done;
  };
  const uint64_t nbytes = job->nbytes;
  std::optional<Failure> failure = host_.accept(connection_, job->landing, std::move(job->arrival));
  if (commit.done) {
    connection_.counters.served(job->op, nbytes);
    if (job->op == Op::kNotify && host_.reactor().lent())
      accepted_late_.push_back(job->ticket);
    else
      tell(job->ticket, Code::kOk, nbytes, nullptr);
    jobs_[job->ticket.slot].reset();
  } else if (failure && failure->code != Code::kCancelled) {
    refuse(job, std::move(*failure));
  } else {
    drop(job);
  }
}

// Why one of the spans may not be copied.
std::optional<Failure> Incoming::judge(const Job& job, std::span<const SpanRecord> spans) {
  if (job.landing.region && !job.landing.lease) {
    // One pass without a branch, since no byte moves before it is over; then, if need be, the
    // passes that can say what is wrong.
    const uint64_t here = job.landing.region->nbytes,
                   there = job.source ? job.source->nbytes() : ~uint64_t{0};
    bool bad = false;
    for (const SpanRecord& span : spans)
      bad |= (span.target > here) | (span.nbytes > here - span.target) | (span.source > there) |
             (span.nbytes > there - span.source);
    if (!bad) return {};
  }
  targets_.clear();
  for (const SpanRecord& span : spans) targets_.push_back({span.target, span.nbytes});
  std::optional<Failure> failure = job.landing.check(targets_, 0);
  for (size_t i = 0; !failure && job.source && i < spans.size(); ++i) {
    const SpanRecord& span = spans[i];
    if (span.source <= job.source->nbytes() && span.nbytes <= job.source->nbytes() - span.source)
      continue;
    failure.emplace(Failure{.code = Code::kRemoteAccess,
                            .span = i,
                            .expected = job.source->nbytes(),
                            .given = span.source + span.nbytes,
                            .text = "a span ends behind the source region"});
  }
  if (failure && failure->span < spans.size()) failure->span = spans[failure->span].index;
  return failure;
}

bool Incoming::on_request(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<RequestHead>();
  if (!reader.ok() || head.ticket.slot >= kNumSlots ||
      head.op > static_cast<uint32_t>(Op::kNotify) || head.notify_nbytes > kMaxNotificationBytes ||
      jobs_[head.ticket.slot])
    return false;
  // A notification is admitted by its lease alone, so it must bring nothing that would be copied.
  if (head.op == static_cast<uint32_t>(Op::kNotify) &&
      (head.nbytes != 0 || head.num_spans != 0 || (head.flags & kMapped) != 0))
    return false;
  auto job = std::make_shared<Job>();
  job->ticket = head.ticket;
  job->op = static_cast<Op>(head.op);
  job->nbytes = head.nbytes;
  const ByteView notify = reader.take(head.notify_nbytes);
  std::vector<SpanRecord> spans;
  if (!reader.ok() || !read_spans(reader, head.num_spans, spans)) return false;
  job->arrival.has_notify = (head.flags & kHasNotify) != 0;
  job->arrival.has_arrival = (head.flags & kHasArrival) != 0;
  job->arrival.notify.assign(notify.begin(), notify.end());
  job->arrival.arrival = head.arrival;
  job->arrival.nbytes = head.nbytes;
  jobs_[head.ticket.slot] = job;

  if (job->op == Op::kRead) job->spans.emplace();
  if (job->op != Op::kNotify || head.lease.id != 0) {
    const Access access{job->op, head.region, head.lease, job->arrival.number()};
    if (auto failure = host_.admit(connection_, access, job->landing)) {
      stop(job, std::move(failure));
      return true;
    }
  }
  if ((head.flags & kMapped) != 0 && job->op == Op::kRead) {
    job->granted = can_grant(job->landing);
  } else if ((head.flags & kMapped) != 0) {
    job->source = source_(context_, head.source);
    if (!job->source) {
      stop(job, Failure{.code = Code::kRemoteAccess,
                        .text = cat("the source region ", head.source,
                                    " was not announced or not mappable")});
      return true;
    }
  }
  const uint64_t sum = total_bytes(spans);
  const bool inlined = (head.flags & kInline) != 0;
  if (sum > job->nbytes || (inlined && sum != job->nbytes) ||
      (job->op == Op::kWrite && !inlined && sum != 0))
    return false;
  if (auto failure = judge(*job, spans)) {
    stop(job, std::move(failure));
    return true;
  }
  job->announced = sum;
  job->checked = sum;
  job->num_spans = spans.size();
  if (job->granted) {
    grant(*job);
  } else if (job->nbytes == 0) {
    finish(job);
  } else if (job->op == Op::kRead) {
    job->spans->assign(spans.begin(), spans.end());
    if (!spans.empty()) serving_.push_back(job);
  } else if (inlined) {
    job->window = std::move(spans);
    if (job->source) copying_.push_back(job);
  }
  return true;
}

bool Incoming::on_abort(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<PartHead>();
  if (!reader.finished()) return false;
  if (const JobPtr job = find(head.ticket)) stop(job, {});
  return true;
}

}  // namespace kvxfer::shm
