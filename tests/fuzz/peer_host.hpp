// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The engine as one connection sees it, with regions, leases and requests that a hostile peer may
// name; and the oracle: what must still hold after whatever the peer did. With what a transport
// adds it is shm_host.hpp, verbs_host.hpp and tcp_host.hpp.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "fuzz.hpp"
#include "transport/shm/segment.hpp"
#include "transport/tcp/connection.hpp"

namespace kvxfer::fuzz {

inline constexpr uint64_t kRegionBytes = 16 * 1024, kGuardBytes = 4096;
inline constexpr uint64_t kSlotBytes = 512, kNumOurs = 16;  // of the requests of ours
inline constexpr uint64_t kSlotSpans = 16;  // in its slot: where what a request may move begins
inline constexpr uint64_t kNumArrivals = 16;
inline constexpr Key kKey{std::byte{1}, std::byte{2}};

// Memory with guards around it. `shown`: the peer can map it.
class Area {
 public:
  explicit Area(bool shown) : nbytes_(kRegionBytes + 2 * kGuardBytes) {
    if (shown)
      segment_ = shm::make_owned("kvxfer-fuzz", nbytes_);
    else
      plain_.resize(nbytes_);
  }
  std::byte* at(uint64_t offset) noexcept { return base() + kGuardBytes + offset; }
  int fd() const noexcept { return segment_.fd.get(); }
  void fill() noexcept { std::memset(base(), static_cast<int>(kUntouched), nbytes_); }
  // Whether nobody has written between the two, which count from the first guard on.
  bool untouched(uint64_t begin, uint64_t end) noexcept {
    const std::byte* from = base() + begin;
    return begin == end ||
           (*from == kUntouched && std::memcmp(from, from + 1, end - begin - 1) == 0);
  }
  uint64_t nbytes() const noexcept { return nbytes_; }

 private:
  std::byte* base() noexcept { return plain_.empty() ? segment_.mapping->data() : plain_.data(); }
  const uint64_t nbytes_;
  shm::Segment segment_;
  Bytes plain_;
};

class PeerHost : public tcp::SessionHost {
 public:
  // The peer's: a region in two pieces, one that it may read by itself, one that is read-only.
  static constexpr uint64_t kSplit = 1, kShown = 2, kReadOnly = 3;
  // Ours, in one slot a request: registered, allocated.
  static constexpr uint64_t kStagedSource = 9, kMappedSource = 10;

  PeerHost() {
    static const auto words = std::make_shared<ExportedWords>();
    for (Area* area : areas()) area->fill();
    for (uint64_t id : {kSplit, kShown, kReadOnly}) {
      auto region = make(id, area(id));
      region->writable = id != kReadOnly;
      region->gate.export_word(words->take());
      if (id == kSplit) {
        constexpr uint64_t kFirst = 6 * 1024;  // the second piece leaves a gap behind it
        region->pieces = {{area(id).at(0), 0, kFirst},
                          {area(id).at(kFirst + 1024), kFirst, kRegionBytes - 1024 - kFirst}};
        region->nbytes = kRegionBytes - 1024;
      }
      auto lease = std::make_shared<Lease>();
      lease->id = id;
      lease->key = kKey;
      lease->region = region;
      lease->extents = {{0, 4096}, {5000, 12'000}};
      lease->arrivals = std::vector<std::atomic<uint64_t>>(1);
      lease->num_arrivals = kNumArrivals;
      lease->gate.export_word(words->take());
      regions_[id] = std::move(region);
      leases_[id] = std::move(lease);
    }
    for (uint64_t id : {kStagedSource, kMappedSource})
      sources_[id - kStagedSource] = make(id, area(id));
  }

  // ---- the engine
  Reactor& reactor() noexcept override { return reactor_; }  // never started but for close()
  const std::shared_ptr<CopyPool>& copy_pool() const noexcept override { return pool_; }
  const PeerIdentity& self() const noexcept override { return who; }
  PeerIdentity who;
  void posted(Request&) noexcept override {}
  void writable(Connection&) noexcept override {}
  void unshown(Connection&, const Request& request) noexcept override {
    FUZZ_CHECK(ours_[request.id].cancelled && !std::exchange(ours_[request.id].unshown, true));
  }
  std::optional<Session> session(const Key&) noexcept override { return {}; }
  void adopt(const Key&, std::shared_ptr<Connection>) override {}
  // Of a session itself, which only tcp carries.
  bool opened(const std::shared_ptr<tcp::TcpConnection>&) noexcept override { return false; }
  bool control(tcp::TcpConnection&, ByteView) noexcept override { return false; }
  void ready(tcp::TcpConnection&) noexcept override {}
  Bytes offers() override { return {}; }
  void turned_away(const std::string&, const std::string&) noexcept override {}
  void quiesced(Request& request) noexcept override {
    Ours& mine = ours_[request.id];
    FUZZ_CHECK(mine.request.get() == &request && std::exchange(mine.unquiet, false));
    keep(mine);
  }

  void ended(Connection&, const RequestPtr& request, Completion completion) noexcept override {
    Ours& mine = ours_[request->id];
    FUZZ_CHECK(mine.request == request && !mine.ended);
    FUZZ_CHECK(completion.nbytes <= request->nbytes);
    FUZZ_CHECK(!completion.ok || completion.nbytes == request->nbytes ||
               request->op == Op::kNotify);
    FUZZ_CHECK(completion.ok || completion.failure.code != Code::kOk);
    mine.ended = true;
    keep(mine);
  }

  std::optional<Failure> admit(Connection&, const Access& access, Landing& out) noexcept override {
    const auto no = [](Code code) { return Failure{.code = code, .text = "refused"}; };
    if (access.lease.id != 0) {
      const auto& lease = leases_[access.lease.id % leases_.size()];
      if (!lease || lease->id != access.lease.id || lease->key != access.lease.key ||
          lease->gate.closed())
        return no(Code::kLease);
      if (access.arrival && *access.arrival >= kNumArrivals) return no(Code::kLease);
      out.lease = lease;
      out.region = lease->region;
    }
    if (access.op == Op::kNotify) return {};
    const auto& region = regions_[access.region.id % regions_.size()];
    if (!region || region->id != access.region.id || region->key != access.region.key)
      return no(Code::kRemoteAccess);
    // Every region requires a lease, so that all bytes outside of the leases are witnesses.
    if (!out.lease || out.lease->region != region) return no(Code::kLease);
    if (access.op == Op::kWrite && !region->writable) return no(Code::kRemoteAccess);
    return {};
  }

  std::optional<Failure> accept(Connection&, Landing& landing, Arrival arrival) noexcept override {
    FUZZ_CHECK(!lost_);
    if (!landing.enter()) return landing.closed();
    FUZZ_CHECK(arrival.notify.size() <= kMaxNotificationBytes);
    const bool bad = arrival.has_arrival && landing.lease && arrival.arrival >= kNumArrivals;
    const bool committed = !bad && (!arrival.commit || arrival.commit());
    if (committed && arrival.has_arrival && landing.lease) landing.lease->arrive(arrival.arrival);
    landing.leave();
    if (bad) return Failure{.code = Code::kLease, .text = "no such arrival"};
    if (!committed) return Failure{.code = Code::kCancelled, .text = "cancelled"};
    return {};
  }

  void lost(Connection&, const Failure&) noexcept override {
    FUZZ_CHECK(!std::exchange(lost_, true));
    for (uint64_t id = 0; id < num_ours_; ++id) FUZZ_CHECK(is_quiet(id));
  }

  // ---- what the target does in the application's stead
  bool is_lost() const noexcept { return lost_; }
  void revoke(uint64_t id) noexcept {
    if (const auto& lease = leases_[id % leases_.size()]) lease->gate.close();
  }
  void deregister(uint64_t id) noexcept {
    if (const auto& region = regions_[id % regions_.size()]) region->gate.close();
  }

  // A request of ours with its slot of local memory; null when all were used.
  // Its spans follow each other there, and here with a gap between them as long as there is room.
  RequestPtr next(Op op, bool mapped, size_t num_spans, uint32_t nbytes, uint64_t remote,
                  uint64_t gap = 0) {
    if (num_ours_ == kNumOurs) return nullptr;
    auto request = std::make_shared<Request>();
    request->id = num_ours_;
    request->op = op;
    request->remote = {kShown, kKey};
    if (op != Op::kNotify) {
      request->local = sources_[mapped ? 1 : 0];
      constexpr uint64_t kRoom = kSlotBytes - 2 * kSlotSpans;
      for (size_t i = 0; i < num_spans; ++i) {
        const uint64_t skip = i * (nbytes + gap) % (kRoom - nbytes);
        request->spans.push_back({num_ours_ * kSlotBytes + kSlotSpans + skip, remote + i * nbytes,
                                  nbytes, static_cast<uint32_t>(i)});
        request->nbytes += nbytes;
      }
      request->spans.shrink_to_fit();  // so that a look behind the last one is seen
    }
    ours_[num_ours_].request = request;
    return request;
  }
  // The one that next() gave.
  bool post(Connection& connection, const RequestPtr& request) {
    if (!connection.post(request).ok()) return false;
    ++num_ours_;
    return true;
  }
  bool post(Connection& connection, const RequestPtr& request, bool with_notification) {
    request->has_notify = with_notification;
    if (with_notification) request->notify.resize(64);
    return post(connection, request);
  }
  void cancel(Connection& connection, uint64_t id) {
    if (id >= num_ours_ || ours_[id].ended) return;
    Ours& mine = ours_[id];
    const Cancelled cancelled = connection.cancel(mine.request);
    FUZZ_CHECK(cancelled.agreement != Agreement::kEnding);
    mine.ended = mine.cancelled = true;
    mine.unquiet = !cancelled.quiesced;
    if (cancelled.quiesced) keep(mine);
  }
  uint64_t num_ours() const noexcept { return num_ours_; }
  bool is_quiet(uint64_t id) const noexcept { return ours_[id].ended && !ours_[id].unquiet; }
  // What a lease is called quiet with is final.
  void look() {
    for (const auto& lease : leases_)
      if (lease && lease->gate.quiet() && last_[lease->id].empty()) {
        Area& memory = area(lease->id);
        last_[lease->id].assign(memory.at(0), memory.at(kRegionBytes));
      }
  }

  // After everything: each request has one end, and no byte changed that nobody may write.
  // `hull`: the peer may write anywhere from a lease's first span to its last (docs/verbs.md).
  void check(bool hull = false) {
    for (uint64_t i = 0; i < num_ours_; ++i) {
      Ours& mine = ours_[i];
      FUZZ_CHECK(mine.ended && !mine.unquiet);
      if (!mine.request->local) continue;
      Area& memory = area(mine.request->local->id);
      FUZZ_CHECK(std::memcmp(memory.at(i * kSlotBytes), mine.last.data(), kSlotBytes) == 0);
      const uint64_t begin = kGuardBytes + i * kSlotBytes;
      if (mine.request->op != Op::kRead) {
        FUZZ_CHECK(memory.untouched(begin, begin + kSlotBytes));
        continue;
      }
      std::array<bool, kSlotBytes> asked{};
      for (const Span& span : mine.request->spans)
        std::fill_n(asked.begin() + (span.local - i * kSlotBytes), span.nbytes, true);
      for (uint64_t at = 0; at < kSlotBytes; ++at)
        FUZZ_CHECK(asked[at] || memory.untouched(begin + at, begin + at + 1));
    }
    for (uint64_t id = 1; id < last_.size(); ++id)
      FUZZ_CHECK(last_[id].empty() ||
                 std::memcmp(last_[id].data(), area(id).at(0), kRegionBytes) == 0);
    for (uint64_t id : {kStagedSource, kMappedSource}) {
      FUZZ_CHECK(area(id).untouched(0, kGuardBytes));
      FUZZ_CHECK(area(id).untouched(kGuardBytes + kNumOurs * kSlotBytes, area(id).nbytes()));
    }
    FUZZ_CHECK(area(kReadOnly).untouched(0, area(kReadOnly).nbytes()));
    for (uint64_t id : {kSplit, kShown}) {  // outside the leases; kSplit has a gap of 1024 at 6144
      const uint64_t gap = id == kSplit ? 1024 : 0;
      FUZZ_CHECK(area(id).untouched(0, kGuardBytes));
      if (!hull || id != kShown)
        FUZZ_CHECK(area(id).untouched(kGuardBytes + 4096, kGuardBytes + 5000));
      FUZZ_CHECK(area(id).untouched(kGuardBytes + 6144, kGuardBytes + 6144 + gap));
      FUZZ_CHECK(area(id).untouched(kGuardBytes + 12'000 + gap, area(id).nbytes()));
    }
  }

 protected:
  struct Ours {
    RequestPtr request;
    bool ended = false;
    bool cancelled = false, unquiet = false;  // unquiet: quiesced() is due
    bool unshown = false;
    std::array<std::byte, kSlotBytes> last{};  // its slot when it was quiet: final from then on
  };
  static void keep(Ours& mine) noexcept {
    if (mine.request->local)
      std::memcpy(mine.last.data(), area(mine.request->local->id).at(mine.request->id * kSlotBytes),
                  kSlotBytes);
  }
  static std::array<Area*, 5> areas() {
    static Area split(false), shown(true), read_only(false), staged(false), mapped(true);
    return {&split, &shown, &read_only, &staged, &mapped};
  }
  static Area& area(uint64_t id) noexcept {
    return *areas()[id >= kStagedSource ? id - kStagedSource + 3 : id - 1];
  }
  static std::shared_ptr<Region> make(uint64_t id, Area& memory) {
    auto region = std::make_shared<Region>();
    region->id = id;
    region->key = kKey;
    region->nbytes = kRegionBytes;
    region->pieces = {{memory.at(0), 0, kRegionBytes}};
    if (memory.fd() >= 0) region->memfd = Fd(::dup(memory.fd()));
    return region;
  }

  Reactor reactor_;

 private:
  const std::shared_ptr<CopyPool> pool_;

 protected:
  std::array<std::shared_ptr<Region>, 4> regions_;  // by id
  std::array<std::shared_ptr<Lease>, 4> leases_;
  std::array<std::shared_ptr<Region>, 2> sources_;
  std::array<Ours, kNumOurs> ours_;
  std::array<Bytes, 4> last_;  // of a lease that is quiet: all of its region
  uint64_t num_ours_ = 0;
  bool lost_ = false;
};

}  // namespace kvxfer::fuzz
