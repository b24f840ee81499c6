// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Judging and ending the peer's requests.
#include "transport/verbs/incoming.hpp"

#include <utility>

#include "common/error.hpp"

namespace kvxfer::verbs {

JobPtr Incoming::find(Ticket ticket) const {
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

// The peer hears of the end, and may use the slot and its memory again, only when our NIC is
// through with both.
void Incoming::stop(const JobPtr& job, std::optional<Failure> failure) {
  if (std::exchange(job->stopping, true)) return;
  job->failure = std::move(failure);
  num_dead_inside_ += job->num_inside;
  // What waits to be posted again is not inside anything.
  std::erase_if(again_, [&](ChunkPtr& chunk) {
    if (chunk->job != job) return false;
    --job->num_inside;
    --num_dead_inside_;
    return true;
  });
  settle(job);
}

// A chunk of the job is inside no more.
void Incoming::left(const JobPtr& job) {
  --job->num_inside;
  if (job->stopping) --num_dead_inside_;
}

void Incoming::settle(const JobPtr& job) {
  if (job->num_inside > 0) return;
  if (!job->stopping) {
    if (job->pushed && job->announced == job->nbytes && arrived_[job->ticket.slot].is_complete())
      job->done = job->nbytes;
    if (job->done == job->nbytes && !job->granted) finish(job);
    return;
  }
  if (job->failure) {
    connection_.counters.refused.fetch_add(1, std::memory_order_relaxed);
    tell(job->ticket, job->failure->code, job->done, &*job->failure);
  } else {
    tell(job->ticket, Code::kCancelled, job->done, nullptr);
  }
  jobs_[job->ticket.slot].reset();
}

void Incoming::finish(const JobPtr& job) {
  const uint64_t nbytes = job->nbytes;
  if (auto failure = host_.accept(connection_, job->landing, std::move(job->arrival))) {
    stop(job, std::move(failure));
    return;
  }
  connection_.counters.served(job->op, nbytes);
  if (job->op == Op::kNotify && host_.reactor().lent())
    accepted_late_.push_back(job->ticket);
  else
    tell(job->ticket, Code::kOk, nbytes, nullptr);
  jobs_[job->ticket.slot].reset();
}

// The next segments of a request: all of them judged before anything is done with one.
bool Incoming::take(const JobPtr& job, const std::vector<Segment>& segments,
                    const KeyRowsPtr& rows) {
  uint64_t sum = 0;  // at most some thousand x 2^32: no overflow
  const bool pulled = job->op == Op::kWrite && !job->staged && !job->pushed;
  targets_.clear();
  for (const Segment& segment : segments) {
    if (pulled && (!rows || segment.row >= rows->size())) return false;
    sum += segment.nbytes;
    targets_.push_back({segment.target, segment.nbytes});
  }
  if (sum > job->nbytes - job->announced) return false;
  if (auto failure = job->landing.check(targets_, job->num_segments)) {
    stop(job, std::move(failure));
    return true;
  }
  job->asked = false;
  job->announced += sum;
  job->num_segments += segments.size();
  if (job->granted) {
    grant(*job, segments);
    return true;
  }
  if (job->pushed) {
    ask(*job);
    settle(job);
    return true;
  }
  for (const Segment& segment : segments) job->window.push_back({segment, rows});
  ask(*job);
  if (job->nbytes == 0)
    finish(job);
  else if (!job->staged || job->op == Op::kRead)
    queue(job);
  return true;
}

// One part is under way while another is worked on; that bounds what we remember.
void Incoming::ask(Job& job) {
  if (job.asked || job.granted || job.announced == job.nbytes || job.window.size() > kMaxSegments)
    return;
  job.asked = true;
  channel_.message(Type::kMore, {view_of(PartHead{job.ticket, 0})});
}

void Incoming::queue(const JobPtr& job) {
  if (job->window.empty() || std::exchange(job->queued, true)) return;
  (job->op == Op::kRead ? serving_ : pulling_).push_back(job);
}

bool Incoming::on_request(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<RequestHead>();
  if (!reader.ok() || head.ticket.slot >= kNumSlots ||
      head.op > static_cast<uint32_t>(Op::kNotify) || head.notify_nbytes > kMaxNotificationBytes ||
      jobs_[head.ticket.slot])
    return false;
  // A notification is admitted by its lease alone, so it must bring nothing that would land.
  if (head.op == static_cast<uint32_t>(Op::kNotify) && (head.nbytes != 0 || head.num_segments != 0))
    return false;
  const ByteView notify = reader.take(head.notify_nbytes);
  KeyRowsPtr rows;
  if (!reader.ok() || !read_rows(reader, head.num_rows, rails_.size(), rows) ||
      !read_list(reader, head.num_segments, segments_))
    return false;
  auto job = std::make_shared<Job>();
  job->ticket = head.ticket;
  job->op = static_cast<Op>(head.op);
  job->nbytes = head.nbytes;
  job->staged = (head.flags & kStaged) != 0;
  job->pushed = (head.flags & kPushed) != 0;
  if (job->pushed && (job->op != Op::kWrite || job->staged || job->nbytes == 0 ||
                      head.lease.id == 0 || !rails_[0].push))
    return false;
  job->arrival.has_notify = (head.flags & kHasNotify) != 0;
  job->arrival.has_arrival = (head.flags & kHasArrival) != 0;
  job->arrival.notify.assign(notify.begin(), notify.end());
  job->arrival.arrival = head.arrival;
  job->arrival.nbytes = head.nbytes;
  jobs_[head.ticket.slot] = job;
  // Its first chains may have come before it.
  const uint32_t generation = head.ticket.generation % Immediate::kGenerations;
  if (arrived_[head.ticket.slot].generation != generation)
    arrived_[head.ticket.slot].begin(generation);
  if (job->op != Op::kNotify || head.lease.id != 0) {
    const Access access{job->op, head.region, head.lease, job->arrival.number()};
    if (auto failure = host_.admit(connection_, access, job->landing)) {
      stop(job, std::move(failure));
      return true;
    }
  }
  if (job->pushed) {
    if (windows_.is_open(head.lease.id)) return take(job, segments_, rows);
    stop(job, Failure{.code = Code::kTransport,
                      .text = "its lease has no window that it could be pushed through"});
    return true;
  }
  if (job->nbytes > 0) job->memory = memory_.find(job->landing.region->id);
  if (job->op == Op::kWrite && job->nbytes > 0 && !job->staged && !job->memory) {
    // The NIC cannot store there (its registration failed, and the engine has said so).
    job->staged = true;
  }
  if (job->op == Op::kRead && job->nbytes > 0 && !job->staged) {
    const Landing& landing = job->landing;
    job->granted = job->memory && job->memory->readable() && job->memory->words() != nullptr &&
                   landing.region->gate.word() && (!landing.lease || landing.lease->gate.word());
  }
  if (job->op == Op::kRead) job->staged = !job->granted;
  if (job->staged && job->nbytes > 0) {
    // In messages the CPU copies, on both sides.
    const bool theirs = (head.flags & kOnGpu) != 0;
    const Region& region = *job->landing.region;
    if (theirs || region.is_on_gpu()) {
      stop(job, Failure{.code = Code::kUnavailable,
                        .text = cat("the memory of a GPU (", theirs ? "the initiator's" : "ours",
                                    ") cannot go in messages, and region '", region.name,
                                    "', or what is to go with it, is not registered with the "
                                    "RDMA devices of both sides")});
      return true;
    }
    if (job->op == Op::kWrite && (head.flags & kStaged) == 0)
      channel_.message(Type::kUseMessages, {view_of(PartHead{job->ticket, 0})});
  }
  return take(job, segments_, rows);
}

bool Incoming::on_part(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<ListHead>();
  KeyRowsPtr rows;
  if (!reader.ok() || !read_rows(reader, head.num_rows, rails_.size(), rows) ||
      !read_list(reader, head.num_segments, segments_) || segments_.empty())
    return false;
  const JobPtr job = find(head.ticket);
  if (!job) return head.ticket.slot < kNumSlots;  // ended meanwhile
  if (job->op == Op::kNotify || (!job->granted && !job->asked)) return false;
  return take(job, segments_, rows);
}

bool Incoming::on_abort(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<PartHead>();
  if (!reader.finished()) return false;
  if (const JobPtr job = find(head.ticket)) stop(job, {});
  return true;
}

void Incoming::clear() {
  again_.clear();
  jobs_.assign(kNumSlots, nullptr);
  arrived_.assign(kNumSlots, {});
  pulling_.clear();
  serving_.clear();
  accepted_late_.clear();
  num_dead_inside_ = 0;
}

}  // namespace kvxfer::verbs
