// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The peer's writes: spans, chunks, and who copies them.
#include <algorithm>
#include <utility>

#include "common/hooks.hpp"
#include "transport/shm/incoming.hpp"

namespace kvxfer::shm {

namespace {
constexpr size_t kMaxIdleChunks = 16;
}

// Whether a copier is, or may yet come, inside a request that its initiator has cancelled. The
// cancel happened before whatever the initiator posted after it, so who reads up a retry sees it.
bool Incoming::held_back() noexcept {
  for (const Chunk* chunk : inside_)
    if (!posted(*chunk->job)) return true;
  return false;
}

bool Incoming::on_check(ByteView body) {
  PartHead head;
  std::vector<SpanRecord> spans;
  if (!read_part(body, head, spans)) return false;
  const JobPtr job = find(head.ticket);
  if (!job) return true;
  const uint64_t sum = total_bytes(spans);
  if (job->op != Op::kWrite || sum > job->nbytes - job->checked) return false;
  job->checked += sum;
  if (auto failure = judge(*job, spans)) stop(job, std::move(failure));
  return true;
}

bool Incoming::on_spans(ByteView body, bool& finished) {
  finished = true;
  PartHead head;
  std::vector<SpanRecord> spans;
  if (!read_part(body, head, spans)) return false;
  const JobPtr job = find(head.ticket);
  if (!job) return true;
  const uint64_t sum = total_bytes(spans);
  // All must have been judged before; an engine that then sends others breaks the protocol, and
  // they are judged all the same.
  if (job->op != Op::kWrite || job->checked != job->nbytes || sum > job->nbytes - job->announced)
    return false;
  // A record waits in the ring until the spans before it are cut: that bounds what we remember.
  if (job->next < job->window.size()) {
    finished = job->source == nullptr;  // staged bytes come behind their spans
    return job->source != nullptr;
  }
  if (auto failure = judge(*job, spans)) {
    stop(job, std::move(failure));
    return true;
  }
  job->announced += sum;
  job->window = std::move(spans);
  job->next = 0;
  if (job->source && !job->window.empty()) copying_.push_back(job);
  return true;
}

Incoming::ChunkPtr Incoming::new_chunk(const JobPtr& job) {
  ChunkPtr chunk;
  if (idle_.empty()) {
    chunk = std::make_unique<Chunk>();
  } else {
    chunk = std::move(idle_.back());
    idle_.pop_back();
  }
  chunk->job = job;
  chunk->slot = &channel_.peer_slot(job->ticket.slot);
  return chunk;
}

// The next of the job's spans, as far as a chunk may go. Staged bytes stand one behind the other.
void Incoming::cut(Job& job, Chunk& chunk, ChunkLimit limit) {
  uint64_t left = limit.nbytes;
  const Region& region = *job.landing.region;
  const bool whole = region.pieces.size() == 1 && !chunk.staged;
  // Most spans: one piece, and all of it fits.
  while (whole && job.next_offset == 0 && chunk.pulls.size() < limit.num_pulls &&
         job.next < job.window.size() && job.window[job.next].nbytes <= left) {
    const SpanRecord& span = job.window[job.next++];
    chunk.pulls.push_back(
        {region.pieces[0].base + span.target, span.source, span.nbytes, span.index});
    chunk.nbytes += span.nbytes;
    left -= span.nbytes;
  }
  while (left > 0 && chunk.pulls.size() < limit.num_pulls && job.next < job.window.size()) {
    const SpanRecord& span = job.window[job.next];
    const uint64_t begin = chunk.staged ? chunk.nbytes : span.source + job.next_offset;
    uint64_t from = begin;
    // Pieces that do not fit any more are left to the next chunk.
    region.resolve(span.target + job.next_offset, std::min(left, span.nbytes - job.next_offset),
                   [&](std::byte* to, size_t size) {
                     if (chunk.pulls.size() == limit.num_pulls) return;
                     chunk.pulls.push_back({to, from, size, span.index});
                     from += size;
                   });
    left -= from - begin;
    chunk.nbytes += from - begin;
    job.next_offset += from - begin;
    if (job.next_offset == span.nbytes) ++job.next, job.next_offset = 0;
  }
}

// Any copier.
void Incoming::Chunk::run() noexcept {
  failure.reset();
  if (slot->load(std::memory_order_acquire) != slot_word(job->ticket.generation, Slot::kPosted)) {
    result = Result::kCancelled;
    return;
  }
  result = Result::kFailed;
  if (!job->landing.enter()) {
    failure = job->landing.closed();
    return;
  }
  hooks::reached(hooks::Point::kInsideChunk);
  if (staged != nullptr)
    copy_pulls(staged, pulls);
  else
    failure = job->source->pull(pulls, {});
  job->landing.leave();
  if (!failure) result = Result::kCopied;
}

void Incoming::start(ChunkPtr chunk) {
  Job& job = *chunk->job;
  ++job.num_inside;
  job.begun = true;
  // While the last chunk is copied, who waits for the outcome wakes up.
  const bool last = job.announced == job.nbytes && job.next == job.window.size();
  if (last && host_.reactor().spins()) channel_.ring_early();
  if (copiers_) {
    inside_.push_back(chunk.get());
    copiers_->submit(std::move(chunk));
    return;
  }
  chunk->run();
  land(std::move(chunk));
}

void Incoming::land(ChunkPtr chunk) {
  const JobPtr job = std::move(chunk->job);
  if (chunk->stage) channel_.return_stage(*chunk->stage);
  --job->num_inside;
  if (chunk->result == Chunk::Result::kCopied)
    job->done += chunk->nbytes;
  else if (!job->stopping)
    stop(job, std::move(chunk->failure));
  // A job that was stopped before its last copier left ends here, unless stop() has just done so.
  if (jobs_[job->ticket.slot] == job) settle(job);
  chunk->pulls.clear();
  chunk->staged = nullptr;
  chunk->stage.reset();
  chunk->nbytes = 0;
  if (idle_.size() < kMaxIdleChunks) idle_.push_back(std::move(chunk));
}

bool Incoming::collect() {
  if (!copiers_) return false;
  bool some = false;
  while (CopyTaskPtr task = copiers_->collect()) {
    ChunkPtr chunk(static_cast<Chunk*>(task.release()));
    std::erase(inside_, chunk.get());
    land(std::move(chunk));
    some = true;
  }
  return some;
}

void Incoming::clear() {
  if (copiers_) {
    copiers_->leave();
    while (copiers_->collect()) {
    }
  }
  inside_.clear();
  jobs_.assign(kNumSlots, nullptr);
  accepted_late_.clear();
  copying_.clear();
  serving_.clear();
}

bool Incoming::on_staged(ByteView body, bool& finished) {
  finished = true;
  Reader reader(body);
  const auto head = reader.get<StageHead>();
  if (!reader.finished() || head.stage_slot >= kNumStageSlots || head.nbytes > kStageSlotBytes)
    return false;
  const JobPtr job = find(head.ticket);
  if (full() || (job && !job->begun && held_back())) {  // collect() comes before the next look
    finished = false;
    return true;
  }
  const auto stage = channel_.take_stage();
  if (!stage) return false;
  if (!job || !wanted(job)) {
    connection_.counters.bytes_sunk.fetch_add(head.nbytes, std::memory_order_relaxed);
    channel_.return_stage(*stage);
    return true;
  }
  if (job->op != Op::kWrite || job->source) return false;
  ChunkPtr chunk = new_chunk(job);
  chunk->stage = stage;
  chunk->staged = channel_.peer_stage(head.stage_slot);
  cut(*job, *chunk, {.nbytes = head.nbytes, .num_pulls = ~size_t{0}});
  if (chunk->nbytes != head.nbytes) return false;  // bytes without their spans
  start(std::move(chunk));
  return true;
}

bool Incoming::copy_one() {
  if (copying_.empty() || full()) return false;
  const JobPtr job = copying_.front();
  if (!job->begun && held_back()) {  // collect() comes before the next look
    if (!wanted(job)) copying_.pop_front();
    return false;
  }
  copying_.pop_front();
  if (!wanted(job)) return true;
  ChunkPtr chunk = new_chunk(job);
  cut(*job, *chunk, job->source->limit());
  if (job->next < job->window.size()) copying_.push_back(job);
  start(std::move(chunk));
  return true;
}

}  // namespace kvxfer::shm
