// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Depths, limits and partial posts of the software NICs' queues; RESET, fences, overruns.
#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

TEST_CASE("a send queue's slots come back when a completion behind them is polled") {
  Setup small;
  small.max_send_wr = 4;
  Pair p(small);
  const int64_t before = fake_verbs_count("completions");
  for (uint64_t i = 0; i < 4; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    if (i < 3) wr.send_flags = 0;
    REQUIRE(p.a.post(wr) == 0);
  }
  ibv_send_wr wr = p.a.write(p.b, 10, 9);
  REQUIRE(eventually([&] { return fake_verbs_count("completions") == before + 1; }));
  CHECK(p.a.post(wr) == ENOMEM);  // all four are done, and none has been polled
  CHECK(p.a.await().wr_id == 3);
  for (int i = 0; i < 4; ++i) CHECK(p.a.post(wr) == 0);
  CHECK(p.a.post(wr) == ENOMEM);
}

TEST_CASE("requests that are never signalled fill the queue for ever") {
  Setup small;
  small.max_send_wr = 8;
  Pair p(small);
  ibv_send_wr wr = p.a.write(p.b, 10);
  wr.send_flags = 0;
  for (int i = 0; i < 8; ++i) REQUIRE(p.a.post(wr) == 0);
  pause_ms(20);
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));
  CHECK(p.a.post(wr) == ENOMEM);
}

TEST_CASE("a chain that does not fit is posted up to the first that does not") {
  Setup small;
  small.max_send_wr = 2;
  small.sq_sig_all = 1;
  Pair p(small);
  ibv_send_wr wrs[4];
  for (uint64_t i = 0; i < 4; ++i) {
    wrs[i] = p.a.write(p.b, 10, i);
    wrs[i].send_flags = 0;  // sq_sig_all signals them
    if (i > 0) wrs[i - 1].next = &wrs[i];
  }
  const int64_t doorbells = fake_verbs_count("doorbells");
  ibv_send_wr* bad = nullptr;
  CHECK(ibv_post_send(p.a.qp, wrs, &bad) == ENOMEM);
  CHECK(bad == &wrs[2]);
  CHECK(fake_verbs_count("doorbells") == doorbells + 1);
  CHECK(p.a.await().wr_id == 0);
  CHECK(p.a.await().wr_id == 1);
}

TEST_CASE("posts that cannot be are refused at once") {
  Pair p;
  ibv_send_wr wr = p.a.write(p.b, 10);
  SUBCASE("more elements than asked for") {
    ibv_sge list[5] = {};
    wr.sg_list = list;
    wr.num_sge = 5;
    CHECK(p.a.post(wr) == EINVAL);
  }
  SUBCASE("more inline bytes than asked for") {
    wr = p.a.write(p.b, 65);
    wr.send_flags |= IBV_SEND_INLINE;
    CHECK(p.a.post(wr) == EINVAL);
  }
  SUBCASE("an inline read") {
    wr.opcode = IBV_WR_RDMA_READ;
    wr.send_flags |= IBV_SEND_INLINE;
    CHECK(p.a.post(wr) == EINVAL);
  }
  SUBCASE("an unknown opcode") {
    wr.opcode = IBV_WR_DRIVER1;
    CHECK(p.a.post(wr) == EINVAL);
  }
  SUBCASE("a receive queue that is full") {
    for (uint32_t i = 0; i < p.a.setup.max_recv_wr; ++i)
      REQUIRE(p.a.receive(i, p.a.sge(0, 10)) == 0);
    CHECK(p.a.receive(99, p.a.sge(0, 10)) == ENOMEM);
  }
  SUBCASE("before the queue pair can send") {
    ibv_qp* fresh = p.a.make_qp(p.a.setup);
    CHECK(p.a.post(wr, fresh) == EINVAL);
    CHECK(p.a.receive(1, p.a.sge(0, 10), fresh) == EINVAL);
    REQUIRE(p.a.to_init(fresh) == 0);
    CHECK(p.a.post(wr, fresh) == EINVAL);
    CHECK(p.a.receive(1, p.a.sge(0, 10), fresh) == 0);
    CHECK(ibv_destroy_qp(fresh) == 0);
  }
}

TEST_CASE("RESET takes all work away without a word") {
  Pair p;
  REQUIRE(p.a.receive(1, p.a.sge(0, 10)) == 0);
  ibv_send_wr done = p.a.write(p.b, 10, 2);
  const int64_t before = fake_verbs_count("completions");
  REQUIRE(p.a.post(done) == 0);
  REQUIRE(eventually([&] { return fake_verbs_count("completions") == before + 1; }));
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr open = p.a.write(p.b, 10, 3);
  REQUIRE(p.a.post(open) == 0);
  REQUIRE(p.a.to(p.a.qp, IBV_QPS_RESET) == 0);
  fake_verbs_release(p.b.qp->qp_num);
  pause_ms(20);
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));  // not even what was complete and not polled
  // And the pair can be used anew, with all of its depth.
  REQUIRE(p.b.to(p.b.qp, IBV_QPS_RESET) == 0);
  connect(p.a, p.a.qp, p.b, p.b.qp);
  for (uint32_t i = 0; i < p.a.setup.max_send_wr; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    REQUIRE(p.a.post(wr) == 0);
  }
  for (uint32_t i = 0; i < p.a.setup.max_send_wr; ++i) CHECK(p.a.await().wr_id == i);
}

TEST_CASE("ERR lets nothing of the peer's land once the verb has returned") {
  Setup impatient;
  impatient.timeout = 14;  // 67 ms
  impatient.retry_cnt = 2;
  Pair p(impatient);
  p.a.fill(4);
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr wr = p.a.write(p.b, 1000);
  REQUIRE(p.a.post(wr) == 0);
  pause_ms(2);
  REQUIRE(p.b.to(p.b.qp, IBV_QPS_ERR) == 0);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_RETRY_EXC_ERR);  // nobody answers any more
  for (const std::byte byte : p.b.memory) REQUIRE(byte == std::byte{0});
}

TEST_CASE("ERR flushes both queues, and a marker comes last") {
  Pair p;
  fake_verbs_hold(p.b.qp->qp_num);
  for (uint64_t i = 0; i < 5; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    wr.send_flags = 0;
    REQUIRE(p.a.post(wr) == 0);
  }
  REQUIRE(p.a.to(p.a.qp, IBV_QPS_ERR) == 0);
  ibv_send_wr marker = p.a.write(p.b, 10, 77);
  REQUIRE(p.a.post(marker) == 0);
  for (uint64_t i = 0; i < 5; ++i) {
    const ibv_wc wc = p.a.await();
    CHECK(wc.wr_id == i);
    CHECK(wc.status == IBV_WC_WR_FLUSH_ERR);
  }
  CHECK(p.a.await().wr_id == 77);
  fake_verbs_release(p.b.qp->qp_num);
}

TEST_CASE("flushes come when a plan lets them, and a queue pair may be destroyed before") {
  Setup withheld;
  withheld.plan = "flush=0";
  Pair p(withheld);
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr wr = p.a.write(p.b, 10, 5);
  REQUIRE(p.a.post(wr) == 0);
  ibv_qp* const other = p.a.make_qp(withheld);
  REQUIRE(p.a.to_init(other) == 0);
  REQUIRE(p.a.receive(6, p.a.sge(0, 10), other) == 0);
  for (ibv_qp* qp : {p.a.qp, other}) REQUIRE(p.a.to(qp, IBV_QPS_ERR) == 0);
  pause_ms(20);
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));
  CHECK(ibv_destroy_qp(other) == 0);
  REQUIRE(fake_verbs_plan("") == 0);
  wc = p.a.await();
  CHECK(wc.wr_id == 5);
  CHECK(wc.status == IBV_WC_WR_FLUSH_ERR);
  fake_verbs_release(p.b.qp->qp_num);
}

TEST_CASE("a fence waits for the reads before it") {
  Pair p;
  p.b.fill(8);
  // The answer to the read is held; a write behind it goes on, unless it is fenced.
  for (const bool fenced : {false, true}) {
    fake_verbs_hold(p.a.qp->qp_num);
    ibv_sge into = p.a.sge(0, 100);
    ibv_send_wr read = p.a.write(p.b, 1, 1);
    read.opcode = IBV_WR_RDMA_READ;
    read.sg_list = &into;
    ibv_send_wr wr = p.a.write(p.b, 8, 2);
    wr.wr.rdma.remote_addr += 5000;
    if (fenced) wr.send_flags |= IBV_SEND_FENCE;
    read.next = &wr;
    const int64_t placed = fake_verbs_count("bytes_placed");
    REQUIRE(p.a.post(read) == 0);
    pause_ms(10);
    CHECK(fake_verbs_count("bytes_placed") == placed + (fenced ? 0 : 8));
    fake_verbs_release(p.a.qp->qp_num);
    CHECK(p.a.await().wr_id == 1);
    CHECK(p.a.await().wr_id == 2);
    CHECK(fake_verbs_count("bytes_placed") >= placed + 108);
  }
}

TEST_CASE("no more reads are out at once than the queue pair was given") {
  Setup left;
  left.max_rd_atomic = 2;
  Pair p(left, {});
  fake_verbs_hold(p.a.qp->qp_num);
  const int64_t before = fake_verbs_count("packets");
  for (uint64_t i = 0; i < 5; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 16, i);
    wr.opcode = IBV_WR_RDMA_READ;
    REQUIRE(p.a.post(wr) == 0);
  }
  REQUIRE(eventually([&] { return fake_verbs_count("packets") == before + 4; }));
  pause_ms(5);
  CHECK(fake_verbs_count("packets") == before + 4);  // two requests, two answers
  fake_verbs_release(p.a.qp->qp_num);
  for (uint64_t i = 0; i < 5; ++i) CHECK(p.a.await().wr_id == i);
}

TEST_CASE("more reads than the target takes are an invalid request") {
  Setup left, right;
  left.max_rd_atomic = 4;
  right.max_dest_rd_atomic = 1;
  Pair p(left, right);
  fake_verbs_hold(p.b.qp->qp_num);
  for (uint64_t i = 0; i < 2; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 16, i);
    wr.opcode = IBV_WR_RDMA_READ;
    REQUIRE(p.a.post(wr) == 0);
  }
  pause_ms(2);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  CHECK(p.a.await().status == IBV_WC_REM_INV_REQ_ERR);
}

TEST_CASE("a completion queue that runs over is lost, and its queue pairs with it") {
  Setup small;
  small.cqe = 3;
  Pair p(small, {});
  for (uint64_t i = 0; i < 4; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    REQUIRE(p.a.post(wr) == 0);
  }
  CHECK(p.a.await_event() == IBV_EVENT_CQ_ERR);
  CHECK(p.a.await_event() == IBV_EVENT_QP_FATAL);
  CHECK(p.a.state(p.a.qp) == IBV_QPS_ERR);
  for (uint64_t i = 0; i < 3; ++i) CHECK(p.a.await().wr_id == i);
  ibv_wc wc{};
  CHECK(ibv_poll_cq(p.a.cq, 1, &wc) < 0);
}

TEST_CASE("on Soft-RoCE a completion queue that runs over loses what came, and goes on") {
  Setup small;
  small.plan = "soft_roce=1";
  Pair p(small);
  REQUIRE(fake_verbs_overrun_cq(p.a.qp->qp_num) == 0);
  ibv_send_wr wr = p.a.write(p.b, 10, 1);
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await_event() == IBV_EVENT_CQ_ERR);
  CHECK(p.a.state(p.a.qp) == IBV_QPS_RTS);
  ibv_wc wc{};
  CHECK(ibv_poll_cq(p.a.cq, 1, &wc) == 0);
}

TEST_CASE("short polls give something whenever there is something") {
  Setup all;
  all.plan = "short_poll=1";
  Pair p(all);
  const int64_t before = fake_verbs_count("completions");
  for (uint64_t i = 0; i < 40; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    REQUIRE(p.a.post(wr) == 0);
  }
  REQUIRE(eventually([&] { return fake_verbs_count("completions") == before + 40; }));
  ibv_wc wcs[64];
  int polls = 0;
  for (uint64_t got = 0; got < 40; ++polls) {
    const int n = ibv_poll_cq(p.a.cq, 64, wcs);
    REQUIRE(n > 0);
    for (int i = 0; i < n; ++i) CHECK(wcs[i].wr_id == got++);
  }
  CHECK(polls > 1);
}

TEST_CASE("a completion that is held back holds those behind it") {
  Setup all;
  all.plan = "hold_cqe=0.5:20ms seed=3";
  Pair p(all);
  for (uint64_t i = 0; i < 30; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    REQUIRE(p.a.post(wr) == 0);
  }
  for (uint64_t i = 0; i < 30; ++i) CHECK(p.a.await().wr_id == i);
}

TEST_CASE("posts fail as planned, in the middle of a chain too") {
  Setup all;
  all.plan = "post=0.5 seed=1";
  all.sq_sig_all = 1;
  Pair p(all);
  int whole = 0, partial = 0, none = 0;
  for (int round = 0; round < 40; ++round) {
    ibv_send_wr wrs[3];
    for (uint64_t i = 0; i < 3; ++i) {
      wrs[i] = p.a.write(p.b, 10, i);
      if (i > 0) wrs[i - 1].next = &wrs[i];
    }
    ibv_send_wr* bad = nullptr;
    const int err = ibv_post_send(p.a.qp, wrs, &bad);
    const auto posted = err ? static_cast<uint64_t>(bad - wrs) : 3;
    if (err) CHECK(err == ENOMEM);
    (posted == 3 ? whole : posted == 0 ? none : partial) += 1;
    for (uint64_t i = 0; i < posted; ++i) CHECK(p.a.await().wr_id == i);
  }
  CHECK(whole > 0);
  CHECK(partial > 0);
  CHECK(none > 0);
}

TEST_CASE("every status can be had, before and after the bytes have landed") {
  Setup plain;
  int landed = 0, lost = 0;
  for (int status = IBV_WC_LOC_LEN_ERR; status <= IBV_WC_GENERAL_ERR; ++status) {
    Pair p(plain);
    p.a.fill(1);
    // The seed decides; over all of them both ways occur.
    REQUIRE(fake_verbs_plan(("seed=" + std::to_string(status)).c_str()) == 0);
    fake_verbs_fail_next(p.a.qp->qp_num, static_cast<ibv_wc_status>(status));
    ibv_send_wr wr = p.a.write(p.b, 100);
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == static_cast<ibv_wc_status>(status));
    CHECK(p.a.state(p.a.qp) == IBV_QPS_ERR);
    (std::memcmp(p.a.memory.data(), p.b.memory.data(), 100) == 0 ? landed : lost) += 1;
  }
  CHECK(landed > 0);
  CHECK(lost > 0);
}
