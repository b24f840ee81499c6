// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/rail.hpp"

#include <algorithm>

#include "transport/verbs/push_window.hpp"

namespace kvxfer::verbs {
namespace {

constexpr uint8_t kMaxReads = 16;  // in flight; more than any link's round trip asks for
constexpr size_t kMaxIdle = 16;    // chunks
constexpr int64_t kLongestPauseNs = 5'000'000'000;

uint8_t reads_of(int limit) { return static_cast<uint8_t>(std::clamp(limit, 1, int{kMaxReads})); }

}  // namespace

Rail::Rail(const std::shared_ptr<Device>& of, size_t nth, uint32_t more_entries, bool with_push)
    : number(nth),
      device(of),
      completions(of, Rails::num_entries(*of, more_entries, with_push)),
      pulls(of, completions.get(), nth),
      served(reads_of(of->limits().max_qp_rd_atom)),
      issued(reads_of(of->limits().max_qp_init_rd_atom)) {
  if (with_push) push = std::make_unique<PushEnds>(of, completions.get(), nth);
  make_source();
  end.pull = pulls.open();
  puller.store(end.pull.number, std::memory_order_relaxed);
  end.source = {source->qp_num, source_psn};
  end.served = served;
  end.issued = issued;
}

Rail::~Rail() { drop_source(); }

void Rail::connect(const Route& to, const RailEnd& there) {
  route = to;
  remote = there;
  issued = std::min(issued, there.served);
  served = std::max<uint8_t>(std::min(served, there.issued), 1);
  connect_qp(*device, source.get(), route, there.pull, source_psn, served, 0);
  pulls.connect(route, there.source, issued);
}

void Rail::drop_source() noexcept {
  if (source) (void)stop_qp(source.get());
  source.reset();
  serving = false;
}

void Rail::make_source() {
  QpShape shape;
  source = make_qp(*device, completions.get(), shape, IBV_ACCESS_REMOTE_READ);
  source_psn = random_psn();
}

bool Rail::is_left() const noexcept {
  return pulls.is_ready() || (!down && !absent && num_breaks <= Rails::kMaxBreaks);
}

int64_t Rail::pause_ns() const noexcept {
  if (num_breaks <= 1) return 0;  // tried again at once
  const uint32_t doublings = std::min(num_breaks - 2, 16u);
  return std::min(Rails::kFirstPauseNs << doublings, kLongestPauseNs);
}

uint32_t Rails::num_entries(const Device& device, uint32_t more_entries, bool push) noexcept {
  return ChainQueue::num_entries(ChainQueue::depth(device)) + more_entries +
         (push ? PushEnds::num_entries(device) : 0);
}

Rails::Rails(const Devices& devices, bool by_nearness, uint32_t more_entries, bool push)
    : by_nearness_(by_nearness) {
  for (const auto& device : devices) {
    rails_.push_back(std::make_unique<Rail>(device, rails_.size(), more_entries, push));
    const uint32_t sge = rails_.back()->pulls.max_sge();
    max_sge_ = rails_.size() == 1 ? sge : std::min(max_sge_, sge);
  }
}

std::vector<ibv_cq*> Rails::queues() const {
  std::vector<ibv_cq*> out;
  for (const auto& rail : rails_) out.push_back(rail->completions.get());
  return out;
}

// `usable`, `has_room`: of a rail; `chains`: its queue that they would go through.
template <typename Usable, typename HasRoom, typename Chains>
Rail* Rails::least_busy(const Preference& nearest, Usable usable, HasRoom has_room,
                        Chains chains) const noexcept {
  const auto rank_of = [&](const Rail& rail) {
    return by_nearness_ ? nearest.rank(*rail.device) : 0;
  };
  int rank = 0;
  for (const auto& rail : rails_)
    if (usable(*rail)) rank = std::max<int>(rank, rank_of(*rail));
  Rail* best = nullptr;
  for (const auto& rail : rails_) {
    if (!usable(*rail) || !has_room(*rail) || rank_of(*rail) < rank) continue;
    if (best == nullptr || chains(*rail).nbytes_in_flight() < chains(*best).nbytes_in_flight())
      best = rail.get();
  }
  return best;
}

Rail* Rails::pick(const Preference& nearest) const noexcept {
  return least_busy(
      nearest, [](const Rail& rail) { return rail.pulls.is_ready(); },
      [](const Rail& rail) { return rail.pulls.has_room(); },
      [](const Rail& rail) -> const ChainQueue& { return rail.pulls; });
}

Rail* Rails::pick_push(const Preference& nearest, const PushWindow& window) const noexcept {
  return least_busy(
      nearest,
      [&](const Rail& rail) { return rail.push->writes.is_ready() && window.has_key[rail.number]; },
      [](const Rail& rail) { return rail.push->has_room(); },
      [](const Rail& rail) -> const ChainQueue& { return rail.push->writes; });
}

bool Rails::any_room() const noexcept {
  return std::ranges::any_of(rails_, [](const auto& rail) { return rail->pulls.has_room(); });
}

bool Rails::any_left() const noexcept {
  return std::ranges::any_of(rails_, [](const auto& rail) { return rail->is_left(); });
}

Keys Rails::row_of(const Registration& registration) const noexcept {
  Keys row{};
  for (const auto& rail : rails_) row[rail->number] = registration.rkeys()[rail->device->index()];
  return row;
}

ChunkPtr Rails::new_chunk() {
  if (idle_.empty()) return std::make_unique<Chunk>();
  ChunkPtr chunk = std::move(idle_.back());
  idle_.pop_back();
  return chunk;
}

void Rails::recycle(ChunkPtr chunk) {
  chunk->clear();
  if (idle_.size() < kMaxIdle) idle_.push_back(std::move(chunk));
}

}  // namespace kvxfer::verbs
