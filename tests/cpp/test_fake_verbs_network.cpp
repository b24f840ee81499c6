// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A reliable connection of the software NICs hides what the network does, as long as its retries
// last; and what it cannot hide ends it.
#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

namespace {

// Writes, reads, sends and atomics of many sizes; everything has to be right at the end.
void exchange(Pair& p, int rounds) {
  uint64_t sum = 0;
  for (int round = 0; round < rounds; ++round) {
    p.a.fill(static_cast<uint8_t>(round));
    const size_t n = static_cast<size_t>(1 + round * 977 % 9000);
    REQUIRE(p.b.receive(1, p.b.sge(40'000, 10'000)) == 0);
    ibv_send_wr write = p.a.write(p.b, n, 1), send = p.a.write(p.b, n, 2),
                read = p.a.write(p.b, 1, 3), add = p.a.write(p.b, 1, 4);
    send.opcode = IBV_WR_SEND;
    ibv_sge back = p.a.sge(20'000, n), old = p.a.sge(30'000, 8);
    read.opcode = IBV_WR_RDMA_READ;
    read.sg_list = &back;
    add.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
    add.sg_list = &old;
    add.wr.atomic.remote_addr = reinterpret_cast<uintptr_t>(p.b.memory.data() + 60'000);
    add.wr.atomic.rkey = p.b.mr->rkey;
    add.wr.atomic.compare_add = static_cast<uint64_t>(round);
    write.next = &send;
    send.next = &read;
    read.next = &add;
    REQUIRE(p.a.post(write) == 0);
    for (uint64_t i = 1; i <= 4; ++i) {
      const ibv_wc wc = p.a.await();
      REQUIRE(wc.status == IBV_WC_SUCCESS);
      REQUIRE(wc.wr_id == i);
    }
    const ibv_wc wc = p.b.await();
    REQUIRE(wc.status == IBV_WC_SUCCESS);
    REQUIRE(wc.byte_len == n);
    REQUIRE(std::memcmp(p.a.memory.data(), p.b.memory.data(), n) == 0);
    REQUIRE(std::memcmp(p.a.memory.data(), p.b.memory.data() + 40'000, n) == 0);
    REQUIRE(std::memcmp(p.a.memory.data() + 20'000, p.b.memory.data(), n) == 0);
    uint64_t seen = 0;
    std::memcpy(&seen, p.a.memory.data() + 30'000, 8);
    REQUIRE(seen == sum);  // once each, whatever was sent again
    sum += static_cast<uint64_t>(round);
  }
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));
  CHECK_FALSE(p.b.poll(wc));
}

Setup under(const std::string& plan) {
  Setup out;
  out.plan = plan;
  out.timeout = 11;  // 8 ms
  return out;
}

}  // namespace

TEST_CASE("loss, delay and duplicates are hidden") {
  const auto grew = [](const char* name, const std::string& plan) {
    const int64_t before = fake_verbs_count(name);
    {
      Pair p(under(plan));
      exchange(p, 60);
    }
    return fake_verbs_count(name) - before;
  };
  SUBCASE("loss") { CHECK(grew("dropped", "seed=1 drop=0.03") > 0); }
  SUBCASE("retransmission") { CHECK(grew("retransmissions", "seed=2 drop=0.03") > 0); }
  SUBCASE("lost acknowledgements") { CHECK(grew("acks_lost", "seed=3 lose_ack=0.1") > 0); }
  SUBCASE("delay") { CHECK(grew("delayed", "seed=4 delay=0.1:3ms") > 0); }
  SUBCASE("duplicates, some of them late") {
    CHECK(grew("duplicated", "seed=5 duplicate=0.3:5ms") > 0);
  }
  SUBCASE("all of it") {
    CHECK(grew("dropped", "seed=6 drop=0.02 lose_ack=0.02 duplicate=0.2:3ms delay=0.1:2ms") > 0);
  }
}

TEST_CASE("two queue pairs overtake each other, one does not overtake itself") {
  Setup late;
  late.plan = "seed=1 delay=0.5:10ms";
  late.sq_sig_all = 1;
  Pair p(late);
  ibv_qp* a2 = p.a.make_qp(p.a.setup);
  ibv_qp* b2 = p.b.make_qp(p.b.setup);
  connect(p.a, a2, p.b, b2);
  bool overtaken = false;
  for (uint64_t round = 0; round < 20; ++round) {
    ibv_send_wr first = p.a.write(p.b, 10, round * 3), same = p.a.write(p.b, 10, round * 3 + 1),
                other = p.a.write(p.b, 10, round * 3 + 2);
    first.next = &same;
    REQUIRE(p.a.post(first) == 0);
    REQUIRE(p.a.post(other, a2) == 0);
    uint64_t order[3];
    for (uint64_t& wr_id : order) wr_id = p.a.await().wr_id;
    const auto at = [&](uint64_t wr_id) { return std::find(order, order + 3, wr_id) - order; };
    REQUIRE(at(round * 3) < at(round * 3 + 1));
    overtaken |= at(round * 3 + 2) == 0;
  }
  CHECK(overtaken);
  CHECK(ibv_destroy_qp(a2) == 0);
  CHECK(ibv_destroy_qp(b2) == 0);
}

TEST_CASE("bytes may have landed although their acknowledgement never comes") {
  Setup deaf;
  deaf.timeout = 8;
  deaf.retry_cnt = 2;
  Pair p(deaf);
  p.a.fill(3);
  REQUIRE(fake_verbs_plan("lose_ack=1") == 0);
  ibv_send_wr wr = p.a.write(p.b, 5000);
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_RETRY_EXC_ERR);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 5000) == 0);
  CHECK(p.b.state(p.b.qp) == IBV_QPS_RTS);  // the other side does not know
}

TEST_CASE("a delayed copy is not written over what came later") {
  Pair p(under("seed=3 duplicate=1:20ms"));
  p.a.fill(1);
  ibv_send_wr wr = p.a.write(p.b, 1000);
  REQUIRE(p.a.post(wr) == 0);
  REQUIRE(p.a.await().status == IBV_WC_SUCCESS);
  p.b.fill(200);
  const std::vector<std::byte> mine = p.b.memory;
  pause_ms(40);  // the copies are in by now
  CHECK(p.b.memory == mine);
}

TEST_CASE("a receiver that is not ready is asked again, so many times") {
  SUBCASE("for ever") {
    Pair p;
    const int64_t before = fake_verbs_count("rnr_naks");
    ibv_send_wr wr = p.a.write(p.b, 3000, 9);
    wr.opcode = IBV_WR_SEND;
    REQUIRE(p.a.post(wr) == 0);
    REQUIRE(eventually([&] { return fake_verbs_count("rnr_naks") > before + 10; }));
    REQUIRE(p.b.receive(1, p.b.sge(0, 4000)) == 0);
    CHECK(p.a.await().status == IBV_WC_SUCCESS);
    CHECK(p.b.await().byte_len == 3000);
  }
  SUBCASE("three times") {
    Setup few;
    few.rnr_retry = 3;
    Pair p(few);
    const int64_t before = fake_verbs_count("rnr_naks");
    ibv_send_wr wr = p.a.write(p.b, 100);
    wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == IBV_WC_RNR_RETRY_EXC_ERR);
    CHECK(fake_verbs_count("rnr_naks") == before + 4);
    CHECK(p.a.state(p.a.qp) == IBV_QPS_ERR);
  }
}

TEST_CASE("what comes from elsewhere than the address says is not heard") {
  Setup left, right;
  left.timeout = 8;
  left.retry_cnt = 1;
  const auto ends = [&] {
    Pair p(left, right);
    ibv_send_wr wr = p.a.write(p.b, 10);
    REQUIRE(p.a.post(wr) == 0);
    return p.a.await().status;
  };
  CHECK(ends() == IBV_WC_SUCCESS);
  // Another subnet needs another device: test_fake_verbs_processes.cpp.
  SUBCASE("an IPv4 address to a link-local one") { right.sgid_index = 1; }
  SUBCASE("RoCE v2 to RoCE v1") { right.sgid_index = 2; }
  CHECK(ends() == IBV_WC_RETRY_EXC_ERR);
}
