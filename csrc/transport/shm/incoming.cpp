// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/incoming.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/error.hpp"
#include "common/hooks.hpp"

namespace kvxfer::shm {

namespace {
uint64_t total(const std::vector<SpanRecord>& spans) {
  uint64_t sum = 0;  // at most 512 x 2^32: no overflow
  for (const SpanRecord& span : spans) sum += span.nbytes;
  return sum;
}
}  // namespace

Incoming::JobPtr Incoming::find(Ticket ticket) const {
  const auto found = jobs_.find(ticket.slot);
  return found != jobs_.end() && found->second->ticket.generation == ticket.generation
             ? found->second
             : nullptr;
}

void Incoming::tell(Ticket ticket, Code code, uint64_t nbytes, const Failure* failure) {
  OutcomeHead head{ticket, static_cast<uint32_t>(code), 0, nbytes, kNoSpan, 0, 0};
  std::string text;
  if (failure != nullptr) {
    head.err = failure->err;
    head.span = failure->span;
    head.expected = failure->expected;
    head.given = failure->given;
    text = failure->text.substr(0, 256);
  }
  channel_.message(Type::kOutcome, {view_of(head), as_bytes_view(text)});
}

void Incoming::refuse(const JobPtr& job, Failure failure) {
  uint64_t posted = slot_word(job->ticket.generation, Slot::kPosted);
  channel_.peer_slot(job->ticket.slot)
      .compare_exchange_strong(posted, slot_word(job->ticket.generation, Slot::kRefused),
                               std::memory_order_acq_rel);
  connection_.counters.refused.fetch_add(1, std::memory_order_relaxed);
  tell(job->ticket, failure.code, job->done, &failure);
  jobs_.erase(job->ticket.slot);
}

void Incoming::drop(const JobPtr& job) {
  tell(job->ticket, Code::kCancelled, job->done, nullptr);
  jobs_.erase(job->ticket.slot);
}

bool Incoming::wanted(const JobPtr& job) {
  if (find(job->ticket) != job) return false;  // ended since it was queued
  if (channel_.peer_slot(job->ticket.slot).load(std::memory_order_acquire) ==
      slot_word(job->ticket.generation, Slot::kPosted))
    return true;
  drop(job);
  return false;
}

void Incoming::finish(const JobPtr& job) {
  std::atomic<uint64_t>& slot = channel_.peer_slot(job->ticket.slot);
  bool committed = false;
  // Inside the gates, after the bytes and before anything is counted or shown: the one moment at
  // which the initiator's cancel and our acceptance exclude each other.
  job->arrival.commit = [&]() noexcept {
    uint64_t posted = slot_word(job->ticket.generation, Slot::kPosted);
    committed = slot.compare_exchange_strong(
        posted, slot_word(job->ticket.generation, Slot::kAccepted), std::memory_order_acq_rel);
    return committed;
  };
  const uint64_t nbytes = job->nbytes;
  std::optional<Failure> failure = host_.accept(connection_, job->landing, std::move(job->arrival));
  if (committed) {
    Counters& counters = connection_.counters;
    counters.requests_served.fetch_add(1, std::memory_order_relaxed);
    (job->op == Op::kRead ? counters.bytes_served : counters.bytes_received)
        .fetch_add(nbytes, std::memory_order_relaxed);
    tell(job->ticket, Code::kOk, nbytes, nullptr);
    jobs_.erase(job->ticket.slot);
  } else if (failure && failure->code != Code::kCancelled) {
    refuse(job, std::move(*failure));
  } else {
    drop(job);
  }
}

// Judges spans that are to be copied; refuses the job when one is bad. `sane` false: not a mistake
// of the peer's user but of its engine, which checks all this before it posts.
bool Incoming::check(Job& job, const std::vector<SpanRecord>& spans, bool& sane) {
  const uint64_t sum = total(spans);
  sane = sum <= job.nbytes - job.announced;
  if (!sane) return false;
  job.announced += sum;
  job.num_spans += spans.size();
  std::vector<Target> targets;
  targets.reserve(spans.size());
  for (const SpanRecord& span : spans) targets.push_back({span.target, span.nbytes});
  std::optional<Failure> failure = job.landing.check(targets, 0);
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
  if (!failure) return true;
  if (failure->span < spans.size()) failure->span = spans[failure->span].ordinal;
  refuse(find(job.ticket), std::move(*failure));
  return false;
}

bool Incoming::on_request(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<RequestHead>();
  if (!reader.ok() || head.ticket.slot >= kNumSlots ||
      head.op > static_cast<uint32_t>(Op::kNotify) || head.notify_nbytes > kMaxNotificationBytes ||
      jobs_.contains(head.ticket.slot))
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
  jobs_.emplace(head.ticket.slot, job);

  if (job->op != Op::kNotify || head.lease.id != 0) {
    if (auto failure = host_.admit(connection_, {job->op, head.region, head.lease}, job->landing)) {
      refuse(job, std::move(*failure));
      return true;
    }
  }
  if ((head.flags & kMapped) != 0 && job->op == Op::kRead) {
    job->granted = can_grant(job->landing);
  } else if ((head.flags & kMapped) != 0) {
    job->source = source_(context_, head.source);
    if (!job->source) {
      refuse(job, {.code = Code::kRemoteAccess,
                   .text = cat("the source region ", head.source,
                               " was not announced or not mappable")});
      return true;
    }
  }
  bool sane = true;
  if (!check(*job, spans, sane)) return sane;
  if (job->granted) {
    grant(*job);
    return true;
  }
  job->spans.assign(spans.begin(), spans.end());
  if (job->nbytes == 0)
    finish(job);
  else if (job->op == Op::kRead)
    serving_.push_back(job);
  else if (job->source && !job->spans.empty())
    copying_.push_back(job);
  return true;
}

bool Incoming::on_read_part(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<PartHead>();
  std::vector<SpanRecord> spans;
  if (!reader.ok() || !read_spans(reader, head.num_spans, spans)) return false;
  const JobPtr job = find(head.ticket);
  if (!job) return head.ticket.slot < kNumSlots;  // ended meanwhile
  bool sane = job->op == Op::kRead;
  if (!sane || !check(*job, spans, sane)) return sane;
  if (job->granted) {
    grant(*job);
    return true;
  }
  const bool idle = job->spans.empty();
  job->spans.insert(job->spans.end(), spans.begin(), spans.end());
  if (idle) serving_.push_back(job);
  return true;
}

bool Incoming::on_abort(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<PartHead>();
  if (!reader.finished()) return false;
  if (const JobPtr job = find(head.ticket)) drop(job);
  return true;
}

// Both gates have words that the peer can look at, and it has what it needs to do so.
bool Incoming::can_grant(const Landing& landing) {
  return landing.region->gate.word() && (!landing.lease || landing.lease->gate.word()) &&
         show_(context_, *landing.region);
}

void Incoming::grant(const Job& job) {
  GrantHead head{
      job.ticket, job.landing.region->id, job.num_spans, job.landing.region->gate.word().ref(), {}};
  if (job.landing.lease) head.lease_word = job.landing.lease->gate.word().ref();
  channel_.message(Type::kGranted, {view_of(head)});
}

bool Incoming::on_read_done(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<PartHead>();
  const JobPtr job = find(head.ticket);
  if (!reader.finished() || !job || !job->granted || job->announced != job->nbytes) return false;
  connection_.counters.requests_served.fetch_add(1, std::memory_order_relaxed);
  connection_.counters.bytes_served.fetch_add(job->nbytes, std::memory_order_relaxed);
  jobs_.erase(job->ticket.slot);
  return true;
}

bool Incoming::on_spans(ByteView body, bool& finished) {
  finished = true;
  Reader reader(body);
  const auto head = reader.get<PartHead>();
  std::vector<SpanRecord> spans;
  if (!reader.ok() || !read_spans(reader, head.num_spans, spans)) return false;
  const JobPtr job = find(head.ticket);
  if (!job) return true;
  bool sane = job->op == Op::kWrite && job->source != nullptr;
  if (!sane) return false;
  // A record waits in the ring until the spans before it are copied: that bounds what we remember.
  if (!job->spans.empty()) {
    finished = false;
    return true;
  }
  if (!check(*job, spans, sane)) return sane;
  job->spans.assign(spans.begin(), spans.end());
  copying_.push_back(job);
  return true;
}

bool Incoming::on_staged(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<StageHead>();
  std::vector<SpanRecord> spans;
  if (!reader.ok() || head.stage_slot >= kNumStageSlots || head.nbytes > kStageSlotBytes ||
      !read_spans(reader, head.num_spans, spans) || total(spans) != head.nbytes)
    return false;
  const JobPtr job = find(head.ticket);
  if (!job || !wanted(job)) {
    connection_.counters.bytes_sunk.fetch_add(head.nbytes, std::memory_order_relaxed);
    return true;
  }
  bool sane = job->op == Op::kWrite && !job->source;
  if (!sane || !check(*job, spans, sane)) return sane;
  if (!job->landing.enter()) {
    refuse(job, job->landing.closed());
    return true;
  }
  hooks::reached(hooks::Point::kInsideChunk);
  const std::byte* from = channel_.peer_stage(head.stage_slot);
  for (const SpanRecord& span : spans)
    job->landing.region->resolve(span.target, span.nbytes, [&from](std::byte* to, size_t size) {
      std::memcpy(to, from, size);
      from += size;
    });
  job->landing.leave();
  job->done += head.nbytes;
  if (job->done == job->nbytes) finish(job);
  return true;
}

bool Incoming::copy_chunk(const JobPtr& job) {
  if (!job->landing.enter()) {
    refuse(job, job->landing.closed());
    return false;
  }
  hooks::reached(hooks::Point::kInsideChunk);
  const ChunkLimit limit = job->source->limit();
  uint64_t left = limit.nbytes;
  pulls_.clear();
  while (left > 0 && pulls_.size() < limit.num_pulls && !job->spans.empty()) {
    const SpanRecord& span = job->spans.front();
    uint64_t n = std::min(left, span.nbytes - job->offset);
    uint64_t from = span.source + job->offset;
    // Pieces that do not fit any more are left to the next chunk.
    const uint64_t begin = from;
    job->landing.region->resolve(span.target + job->offset, n, [&](std::byte* to, size_t size) {
      if (pulls_.size() == limit.num_pulls) return;
      pulls_.push_back({to, from, size, span.ordinal});
      from += size;
    });
    n = from - begin;
    left -= n;
    job->offset += n;
    if (job->offset == span.nbytes) {
      job->spans.pop_front();
      job->offset = 0;
    }
  }
  std::optional<Failure> failure = job->source->pull(pulls_, {});
  job->landing.leave();
  if (failure) {
    refuse(job, std::move(*failure));
    return false;
  }
  job->done += limit.nbytes - left;
  return true;
}

bool Incoming::copy_one() {
  if (copying_.empty()) return false;
  const JobPtr job = copying_.front();
  copying_.pop_front();
  if (!wanted(job) || !copy_chunk(job)) return true;
  if (!job->spans.empty())
    copying_.push_back(job);
  else if (job->done == job->nbytes)
    finish(job);
  return true;
}

bool Incoming::serve_one() {
  if (serving_.empty()) return false;
  const JobPtr job = serving_.front();
  if (!wanted(job)) {
    serving_.pop_front();
    return true;
  }
  std::byte* stage = channel_.stage();
  if (stage == nullptr) return false;
  serving_.pop_front();
  if (!job->landing.enter()) {
    refuse(job, job->landing.closed());
    return true;
  }
  uint32_t filled = 0;
  uint64_t offset = job->offset;
  size_t used = 0;
  for (; used < job->spans.size() && filled < kStageSlotBytes;) {
    const SpanRecord& span = job->spans[used];
    const uint64_t n = std::min<uint64_t>(kStageSlotBytes - filled, span.nbytes - offset);
    job->landing.region->resolve(span.target + offset, n, [&](const std::byte* from, size_t size) {
      std::memcpy(stage + filled, from, size);
      filled += static_cast<uint32_t>(size);
    });
    offset += n;
    if (offset == span.nbytes) ++used, offset = 0;
  }
  job->landing.leave();
  const StageHead head{job->ticket, channel_.stage_slot(), filled, 0};
  if (!channel_.bulk(Type::kReadData, {view_of(head)})) {  // no room for the record: again later
    serving_.push_front(job);
    return false;
  }
  channel_.stage_used();
  job->spans.erase(job->spans.begin(), job->spans.begin() + static_cast<ptrdiff_t>(used));
  job->offset = offset;
  job->done += filled;
  if (job->done == job->nbytes)
    finish(job);
  else if (!job->spans.empty())
    serving_.push_back(job);
  return true;
}

}  // namespace kvxfer::shm
