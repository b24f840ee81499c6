// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The bytes of the peer's requests: pulled by our NIC, granted to the peer's, or, for memory that
// no peer may read, carried in messages.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/hooks.hpp"
#include "transport/verbs/incoming.hpp"

namespace kvxfer::verbs {

// ---------------------------------------------------------------- writes, pulled

// The next of the job's segments, as far as a chain may go.
void Incoming::cut(Job& job, Chunk& chunk) {
  while (!job.window.empty()) {
    const Job::Known& segment = job.window.front();
    const RegionMemory::Run run =
        job.memory->at(segment.target + job.offset, segment.nbytes - job.offset);
    const uint32_t n = chunk.add(segment.address + job.offset, (*segment.rows)[segment.row],
                                 run.base, run.registration->lkeys(), run.nbytes, rails_.max_sge());
    job.offset += n;
    if (job.offset == segment.nbytes) {
      job.window.pop_front();
      job.offset = 0;
    }
    if (n < run.nbytes) return;
  }
}

// Inside the gates until the NIC is through. When one was closed, the job is stopped instead.
void Incoming::start(ChunkPtr chunk, Rail& rail) {
  const JobPtr job = chunk->job;
  if (!job->landing.enter()) {
    left(job);
    stop(job, job->landing.closed());
    return;
  }
  hooks::reached(hooks::Point::kInsideChunk);
  rail.pulls.post(std::move(chunk), false);
}

bool Incoming::pull_again() {
  for (auto it = again_.begin(); it != again_.end(); ++it) {
    Rail* const rail = rails_.pick((*it)->job->memory->preference());
    if (rail == nullptr) continue;
    ChunkPtr chunk = std::move(*it);
    again_.erase(it);
    start(std::move(chunk), *rail);
    return true;
  }
  return false;
}

// What one rail has no room for does not keep others from theirs.
bool Incoming::pull_one() {
  if (!again_.empty() && pull_again()) return true;
  for (auto it = pulling_.begin(); it != pulling_.end(); ++it) {
    const Job& next = **it;
    const bool stopped = find(next.ticket) != *it;  // since it was queued
    // A retry is not overtaken by its dead predecessor: as long as a READ of a request that was
    // stopped may still store, on whatever rail, no other begins. The abort came before the retry.
    if (!stopped && !next.begun && held_back()) continue;
    Rail* const rail = stopped ? nullptr : rails_.pick(next.memory->preference());
    if (!stopped && rail == nullptr) continue;
    const JobPtr job = *it;
    pulling_.erase(it);
    job->queued = false;
    if (stopped) return true;
    job->begun = true;
    ChunkPtr chunk = rails_.new_chunk();
    chunk->job = job;
    cut(*job, *chunk);
    ++job->num_inside;
    ask(*job);
    queue(job);  // its next turn comes after the others'
    start(std::move(chunk), *rail);
    return true;
  }
  return false;
}

void Incoming::on_landed(ChunkPtr chunk, std::optional<Failure> failure) {
  const JobPtr job = chunk->job;
  job->landing.leave();
  left(job);
  const uint64_t nbytes = chunk->nbytes();
  rails_.recycle(std::move(chunk));
  if (failure)
    stop(job, std::move(failure));
  else
    job->done += nbytes;
  if (jobs_[job->ticket.slot] == job) settle(job);
}

void Incoming::on_flushed(ChunkPtr chunk) {
  const JobPtr job = chunk->job;
  job->landing.leave();
  if (!job->stopping) {
    again_.push_back(std::move(chunk));  // still counted in num_inside
    return;
  }
  left(job);
  rails_.recycle(std::move(chunk));
  settle(job);
}

bool Incoming::waits_for_gate(const Chunk& chunk, int64_t ns) noexcept {
  if (!chunk.job || chunk.posted_ns > ns) return false;
  const Landing& landing = chunk.job->landing;
  return landing.region->gate.closed() || (landing.lease && landing.lease->gate.closed());
}

// ---------------------------------------------------------------- reads, granted

bool Incoming::on_read_done(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<PartHead>();
  const JobPtr job = find(head.ticket);
  if (!reader.finished() || !job || !job->granted || job->announced != job->nbytes) return false;
  connection_.counters.served(Op::kRead, job->nbytes);
  jobs_[job->ticket.slot].reset();
  return true;
}

void Incoming::grant(Job& job, std::span<const Segment> segments) {
  const WordMemory& words = *job.memory->words();
  const auto spot = [&](const Gate& gate) {
    const WordRef& ref = gate.word().ref();
    return WordSpot{words.address(ref), ref.value, 1};
  };
  GrantHead head{job.ticket, 0, 0, spot(job.landing.region->gate), {}};
  if (job.landing.lease) head.lease = spot(job.landing.lease->gate);
  const auto begin = [&] {
    sources_.clear();
    rows_.clear();
    rows_.row_of(words.registration());  // the first
  };
  const auto send = [&] {
    head.num_sources = static_cast<uint32_t>(sources_.size());
    head.num_rows = rows_.num();
    channel_.message(Type::kGranted,
                     {view_of(head), rows_.bytes(), view_of(std::span<const Source>(sources_))});
    begin();
  };
  begin();
  for (const Segment& segment : segments)
    for (uint64_t offset = 0; offset < segment.nbytes;) {
      const RegionMemory::Run run =
          job.memory->at(segment.target + offset, segment.nbytes - offset);
      sources_.push_back(
          {reinterpret_cast<uint64_t>(run.base), run.nbytes, rows_.row_of(*run.registration)});
      offset += run.nbytes;
      if (sources_.size() == kMaxSegments || rows_.full()) send();
    }
  if (!sources_.empty()) send();
}

// ---------------------------------------------------------------- bytes in messages

bool Incoming::on_write_data(ByteView body) {
  Reader reader(body);
  const auto head = reader.get<DataHead>();
  const ByteView data = reader.take(reader.remaining());
  if (!reader.ok() || data.empty() || data.size() != head.nbytes || data.size() > kMaxDataBytes)
    return false;
  const JobPtr job = find(head.ticket);
  if (!job) {
    connection_.counters.bytes_sunk.fetch_add(data.size(), std::memory_order_relaxed);
    return head.ticket.slot < kNumSlots;
  }
  if (job->op != Op::kWrite || !job->staged || data.size() > job->announced - job->done)
    return false;
  if (!job->landing.enter()) {
    stop(job, job->landing.closed());
    return true;
  }
  hooks::reached(hooks::Point::kInsideChunk);
  const std::byte* from = data.data();
  for (size_t left = data.size(); left > 0;) {
    const Segment& segment = job->window.front();
    const uint64_t n = std::min<uint64_t>(left, segment.nbytes - job->offset);
    job->landing.region->resolve(segment.target + job->offset, n, [&](std::byte* to, size_t size) {
      std::memcpy(to, from, size);
      from += size;
    });
    left -= n;
    job->offset += n;
    if (job->offset == segment.nbytes) {
      job->window.pop_front();
      job->offset = 0;
    }
  }
  job->landing.leave();
  job->done += data.size();
  ask(*job);
  settle(job);
  return true;
}

bool Incoming::serve_one() {
  if (serving_.empty() || !channel_.is_wide()) return false;
  const JobPtr job = serving_.front();
  serving_.pop_front();
  job->queued = false;
  if (find(job->ticket) != job) return true;
  if (!job->landing.enter()) {
    stop(job, job->landing.closed());
    return true;
  }
  bytes_.resize(kMaxDataBytes);
  uint32_t filled = 0;
  while (filled < kMaxDataBytes && !job->window.empty()) {
    const Segment& segment = job->window.front();
    const uint64_t n = std::min<uint64_t>(kMaxDataBytes - filled, segment.nbytes - job->offset);
    job->landing.region->resolve(segment.target + job->offset, n,
                                 [&](const std::byte* from, size_t size) {
                                   std::memcpy(bytes_.data() + filled, from, size);
                                   filled += static_cast<uint32_t>(size);
                                 });
    job->offset += n;
    if (job->offset == segment.nbytes) {
      job->window.pop_front();
      job->offset = 0;
    }
  }
  job->landing.leave();
  channel_.message(Type::kReadData,
                   {view_of(DataHead{job->ticket, filled, 0}), ByteView(bytes_).first(filled)});
  job->done += filled;
  ask(*job);
  queue(job);
  settle(job);
  return true;
}

}  // namespace kvxfer::verbs
