// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The peer's reads: pulled by itself under a grant, or served through our staging slots.
#include <algorithm>
#include <cstring>

#include "transport/shm/incoming.hpp"

namespace kvxfer::shm {

bool Incoming::on_read_part(ByteView body) {
  PartHead head;
  std::vector<SpanRecord> spans;
  if (!read_part(body, head, spans) || spans.empty()) return false;
  const JobPtr job = find(head.ticket);
  if (!job) return head.ticket.slot < kNumSlots;  // ended meanwhile
  const uint64_t sum = total_bytes(spans);
  if (job->op != Op::kRead || sum > job->nbytes - job->announced) return false;
  if (auto failure = judge(*job, spans)) {
    stop(job, std::move(failure));
    return true;
  }
  job->announced += sum;
  job->num_spans += spans.size();
  if (job->granted) {
    grant(*job);
    return true;
  }
  if (job->spans->size() + spans.size() > kMaxReadSpans) return false;
  const bool idle = job->spans->empty();
  job->spans->insert(job->spans->end(), spans.begin(), spans.end());
  if (idle) serving_.push_back(job);
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
  connection_.counters.served(Op::kRead, job->nbytes);
  jobs_[job->ticket.slot].reset();
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
    stop(job, job->landing.closed());
    return true;
  }
  uint32_t filled = 0;
  uint64_t offset = job->offset;
  size_t used = 0;
  for (; used < job->spans->size() && filled < kStageSlotBytes;) {
    const SpanRecord& span = (*job->spans)[used];
    const uint64_t n = std::min<uint64_t>(kStageSlotBytes - filled, span.nbytes - offset);
    job->landing.region->resolve(span.target + offset, n, [&](const std::byte* from, size_t size) {
      std::memcpy(stage + filled, from, size);
      filled += static_cast<uint32_t>(size);
    });
    offset += n;
    if (offset == span.nbytes) ++used, offset = 0;
  }
  job->landing.leave();
  const StageHead head{job->ticket, channel_.stage_slot(), filled};
  if (!channel_.bulk(Type::kReadData, {view_of(head)})) {  // no room for the record: again later
    serving_.push_front(job);
    return false;
  }
  channel_.stage_used();
  job->spans->erase(job->spans->begin(), job->spans->begin() + static_cast<ptrdiff_t>(used));
  job->offset = offset;
  job->done += filled;
  if (job->done == job->nbytes)
    finish(job);
  else if (!job->spans->empty())
    serving_.push_back(job);
  return true;
}

}  // namespace kvxfer::shm
