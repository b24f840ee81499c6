// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the NICs are asked to do for scattered blocks, pulled and pushed: how many doorbells and
// completions, what goes inline, which rights memory has, and all of it on devices that have
// little.
#include <algorithm>

#include "verbs_push_world.hpp"

using namespace kvxfer;

namespace {

constexpr int64_t kBlock = 1024, kCount = 1024, kArea = 2 * kBlock * kCount;

// Blocks that are neighbours nowhere: [at, at + kArea) of both sides, which has room for as much
// again. Under a lease where there is one.
struct Scattered {
  std::vector<int64_t> local, into;
  int64_t nbytes;

  explicit Scattered(int64_t at = 0, int64_t count = kCount, int64_t n = kBlock) : nbytes(n) {
    for (int64_t i = 0; i < count; ++i) {
      local.push_back(at + 2 * kBlock * i);
      into.push_back(at + 2 * kBlock * (i * 389 % count));
    }
  }
  TransferPtr submit(const PushWorld& w, Op op, const LeasePtr& lease = nullptr) const {
    SubmitOptions options = lease ? under(lease) : SubmitOptions{};
    options.deadline_ns = deadline_after(30);
    const Column l{local.data(), local.size(), false}, r{into.data(), into.size(), false};
    return w.a->submit(op, w.ra, w.remote, SpanArguments{l, r, {&nbytes, 1, true}, {}, false},
                       options);
  }
  void fill(const PushWorld& w, Op op) const {
    for (size_t i = 0; i < local.size(); ++i) {
      std::byte* const from = op == Op::kWrite ? w.at_a(static_cast<size_t>(local[i]))
                                               : w.at_b(static_cast<size_t>(into[i]));
      for (int64_t k = 0; k < nbytes; ++k) from[k] = static_cast<std::byte>(i * 7 + i / 251 + k);
    }
  }
  bool arrived(const PushWorld& w) const {
    bool same = true;
    for (size_t i = 0; i < local.size(); ++i)
      same &= std::memcmp(w.at_a(static_cast<size_t>(local[i])),
                          w.at_b(static_cast<size_t>(into[i])), static_cast<size_t>(nbytes)) == 0;
    return same;
  }
};

struct Counts {
  int64_t work_requests = fake_verbs_count("work_requests");
  int64_t doorbells = fake_verbs_count("doorbells");
  int64_t completions = fake_verbs_count("completions");
  int64_t inlined = fake_verbs_count("inline");
};

// The number that comes behind `what` in `text`.
int number_behind(const std::string& text, const std::string& what) {
  const size_t at = text.find(what);
  INFO(text);
  REQUIRE(at != std::string::npos);
  return std::stoi(text.substr(at + what.size()));
}

}  // namespace

TEST_CASE("work: a chain has one doorbell and one completion, pulled and pushed") {
  for (const bool push : {false, true}) {
    CAPTURE(push);
    PushWorld w(1 << 24, push ? pushing() : impatient());
    const LeasePtr lease = push ? w.grant(0, kArea) : nullptr;
    const Scattered warm(0, 8), blocks;
    finish(warm.submit(w, Op::kWrite, lease));  // windows are bound, receives told of
    blocks.fill(w, Op::kWrite);
    const Counts before;
    finish(blocks.submit(w, Op::kWrite, lease));
    const Counts after;
    CHECK(blocks.arrived(w));
    if (push) CHECK(w.pulled() == 0);
    const int64_t requests = after.work_requests - before.work_requests;
    CHECK(requests >= kCount);  // nothing is gathered
    // 16 chains of 64, the message with the spans, which is one chain as well, and its answer.
    CHECK(after.doorbells - before.doorbells <= kCount / 64 + 8);
    // One of each chain, or two where the owner sees it too; the rest are fragments of messages,
    // seen by who receives them and by every 16th to who has sent them.
    CHECK(after.completions - before.completions <= 2 * kCount / 64 + 24);
    CHECK(w.alive());
  }
}

TEST_CASE("work: short messages and short pushed blocks go inline") {
  for (const bool push : {false, true}) {
    CAPTURE(push);
    PushWorld w(1 << 24, push ? pushing() : impatient());
    const LeasePtr lease = push ? w.grant(0, kArea) : nullptr;
    finish(w.move(Op::kWrite, 0, 0, 8, lease ? under(lease) : SubmitOptions{}));
    const Counts before;
    finish(w.move(Op::kWrite, 0, 0, 8, lease ? under(lease) : SubmitOptions{}));
    const Counts after;
    CHECK(after.inlined - before.inlined >= (push ? 3 : 2));  // request, answer, and the data
    if (!push) continue;
    const Scattered blocks(0, 256, 200);
    blocks.fill(w, Op::kWrite);
    finish(blocks.submit(w, Op::kWrite, lease));
    CHECK(fake_verbs_count("inline") - after.inlined >= 256);
    CHECK(blocks.arrived(w));
  }
}

TEST_CASE("work: no region is remotely writable, pulled or pushed") {
  for (const bool push : {false, true}) {
    CAPTURE(push);
    PushWorld w(1 << 24, push ? pushing() : impatient());
    CHECK(fake_verbs_count("regions") > 0);
    CHECK(fake_verbs_count("writable_regions") == 0);
    const LeasePtr lease = w.grant(0, kArea);
    const Scattered blocks;
    finish(blocks.submit(w, Op::kWrite, lease));
    CHECK((w.pushed() > 0) == push);
    CHECK((fake_verbs_count("windows") > 0) == push);  // which are all that a peer writes through
    CHECK(fake_verbs_count("writable_regions") == 0);
  }
}

TEST_CASE("work: without windows writes are pulled, and explain() says why") {
  const Plan plan("windows=0");
  PushWorld w;
  const Scattered blocks;
  blocks.fill(w, Op::kWrite);
  finish(blocks.submit(w, Op::kWrite, w.grant(0, kArea)));
  CHECK(blocks.arrived(w));
  CHECK(w.pushed() == 0);
  for (const auto& rail : w.writer()) CHECK(rail.chains_pushed == 0);
  CHECK(w.pulled() == kCount * kBlock);
  CHECK(w.explains("has no memory windows of type 2B"));
  CHECK(w.explains("the peer's are pulled: no device of ours has memory windows of type 2B"));
  CHECK(fake_verbs_count("writable_regions") == 0);
}

TEST_CASE("work: devices with short queues move scattered blocks, pulled and pushed") {
  for (const int depth : {100, 127, 200}) {
    CAPTURE(depth);
    const std::string limits =
        "max_sge=1 max_rd_atomic=1 max_qp_wr=" + std::to_string(depth) + " max_cqe=";
    const auto both_ways = [](PushWorld& w, const LeasePtr& lease) {
      const Scattered written, read(kArea);
      written.fill(w, Op::kWrite);
      read.fill(w, Op::kRead);
      const TransferPtr there = written.submit(w, Op::kWrite, lease),
                        back = read.submit(w, Op::kRead);
      finish(there);
      finish(back);
      CHECK(written.arrived(w));
      CHECK(read.arrived(w));
      CHECK(w.alive());
      for (const auto& text : {w.a->explain(*w.to_b), w.b->explain(*w.to_a)})
        CHECK_MESSAGE(text.find("1 READs in flight") != std::string::npos, text);
      CHECK(w.explains("0 queue pair(s) replaced"));
    };
    // The devices say themselves how long their completion queues have to be.
    std::string refused;
    {
      const Plan plan(limits + "64");
      try {
        PushWorld w;
      } catch (const Error& error) {
        refused = error.what();
      }
    }
    const int pulled = number_behind(refused, "a connection needs ");
    CHECK(pulled > depth);
    int pushed = 0;
    {
      const Plan plan(limits + std::to_string(pulled));
      PushWorld w;
      both_ways(w, w.grant(0, kArea));
      CHECK(w.pushed() == 0);
      CHECK(w.pulled() == kCount * kBlock);
      pushed = number_behind(w.explained(), "with pushes a connection needs ");
    }
    CHECK(pushed > pulled);
    const Plan plan(limits + std::to_string(pushed));
    PushWorld w;
    both_ways(w, w.grant(0, kArea));
    CHECK(w.pulled() == 0);
    CHECK(w.pushed() == kCount * kBlock);
    CHECK(w.explains("0 queue pair(s) of pushes replaced"));
  }
}
