// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The software NICs judge keys, bounds and states when a packet arrives, and a refusal ends both
// queue pairs.
#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

namespace {

// The write that is posted fails with `status`, nothing of it has landed, and both sides are ERR.
void check_refused(Pair& p, ibv_send_wr wr, ibv_wc_status status,
                   ibv_event_type event = IBV_EVENT_QP_ACCESS_ERR) {
  p.a.fill(1);
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == status);
  CHECK(p.a.state(p.a.qp) == IBV_QPS_ERR);
  CHECK(p.b.state(p.b.qp) == IBV_QPS_ERR);
  CHECK(p.b.await_event() == event);
  for (const std::byte byte : p.b.memory) REQUIRE(byte == std::byte{0});
}

}  // namespace

TEST_CASE("what a key does not cover is a remote access error") {
  SUBCASE("one byte beyond the region") {
    Pair p;
    ibv_send_wr wr = p.a.write(p.b, 5000);
    wr.wr.rdma.remote_addr += p.b.memory.size() - 4999;
    check_refused(p, wr, IBV_WC_REM_ACCESS_ERR);
  }
  SUBCASE("an address that wraps around") {
    Pair p;
    ibv_send_wr wr = p.a.write(p.b, 5000);
    wr.wr.rdma.remote_addr = ~uint64_t{0} - 10;
    check_refused(p, wr, IBV_WC_REM_ACCESS_ERR);
  }
  SUBCASE("a key that nobody gave out") {
    Pair p;
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.wr.rdma.rkey ^= 0x100;
    check_refused(p, wr, IBV_WC_REM_ACCESS_ERR);
  }
  SUBCASE("the right index with another variant") {
    Pair p;
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.wr.rdma.rkey = ibv_inc_rkey(wr.wr.rdma.rkey);
    check_refused(p, wr, IBV_WC_REM_ACCESS_ERR);
  }
  SUBCASE("the local key") {
    Pair p;
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.wr.rdma.rkey = p.b.mr->lkey;
    check_refused(p, wr, IBV_WC_REM_ACCESS_ERR);
  }
  SUBCASE("a region of another protection domain") {
    Pair p;
    ibv_pd* other = ibv_alloc_pd(p.b.context);
    ibv_mr* mr = ibv_reg_mr(other, p.b.memory.data(), p.b.memory.size(),
                            IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    REQUIRE(mr);
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.wr.rdma.rkey = mr->rkey;
    check_refused(p, wr, IBV_WC_REM_ACCESS_ERR);
    CHECK(ibv_dereg_mr(mr) == 0);
    CHECK(ibv_dealloc_pd(other) == 0);
  }
  SUBCASE("a region that grants reads only") {
    Pair p;
    ibv_mr* mr = ibv_reg_mr(p.b.pd, p.b.memory.data(), p.b.memory.size(), IBV_ACCESS_REMOTE_READ);
    REQUIRE(mr);
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.wr.rdma.rkey = mr->rkey;
    check_refused(p, wr, IBV_WC_REM_ACCESS_ERR);
    CHECK(ibv_dereg_mr(mr) == 0);
  }
  SUBCASE("a queue pair that grants no writes") {
    Setup reads;
    reads.access = IBV_ACCESS_REMOTE_READ;
    Pair p({}, reads);
    check_refused(p, p.a.write(p.b, 10), IBV_WC_REM_INV_REQ_ERR, IBV_EVENT_QP_REQ_ERR);
  }
}

TEST_CASE("a region that went while the packet was under way is not written") {
  Pair p;
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr wr = p.a.write(p.b, 3000);
  p.a.fill(1);
  REQUIRE(p.a.post(wr) == 0);
  REQUIRE(ibv_dereg_mr(p.b.mr) == 0);
  p.b.mr = nullptr;
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_REM_ACCESS_ERR);
  for (const std::byte byte : p.b.memory) REQUIRE(byte == std::byte{0});
}

TEST_CASE("a region that was narrow when the packet left and is there when it comes is written") {
  Pair p;
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr wr = p.a.write(p.b, 100);
  wr.wr.rdma.rkey = p.b.mr->rkey + 0x100;  // the next index: not given out yet
  p.a.fill(1);
  REQUIRE(p.a.post(wr) == 0);
  pause_ms(2);
  ibv_mr* mr =
      ibv_reg_mr(p.b.pd, p.b.memory.data(), 100, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
  REQUIRE(mr->rkey == wr.wr.rdma.rkey);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 100) == 0);
  CHECK(ibv_dereg_mr(mr) == 0);
}

TEST_CASE("a refusal ends the request, and all behind it is flushed in order") {
  Pair p;
  REQUIRE(p.b.receive(100, p.b.sge(0, 10)) == 0);
  REQUIRE(p.b.receive(101, p.b.sge(0, 10)) == 0);
  REQUIRE(p.a.receive(200, p.a.sge(0, 10)) == 0);
  ibv_send_wr good = p.a.write(p.b, 2000, 1), bad = p.a.write(p.b, 2000, 2),
              quiet = p.a.write(p.b, 10, 3), last = p.a.write(p.b, 10, 4);
  bad.wr.rdma.rkey ^= 0x100;
  quiet.send_flags = 0;  // a flush tells of unsignalled ones too
  good.next = &bad;
  bad.next = &quiet;
  quiet.next = &last;
  REQUIRE(p.a.post(good) == 0);
  const std::pair<uint64_t, ibv_wc_status> expected[] = {{1, IBV_WC_SUCCESS},
                                                         {2, IBV_WC_REM_ACCESS_ERR},
                                                         {3, IBV_WC_WR_FLUSH_ERR},
                                                         {4, IBV_WC_WR_FLUSH_ERR},
                                                         {200, IBV_WC_WR_FLUSH_ERR}};
  for (const auto& [wr_id, status] : expected) {
    const ibv_wc wc = p.a.await();
    CHECK(wc.wr_id == wr_id);
    CHECK(wc.status == status);
    // Nobody may look at the opcode of what failed.
    if (status != IBV_WC_SUCCESS) CHECK(wc.opcode == IBV_WC_DRIVER3);
  }
  CHECK(p.b.await().wr_id == 100);
  CHECK(p.b.await().wr_id == 101);
  // What is posted from now on is flushed too.
  ibv_send_wr late = p.a.write(p.b, 10, 5);
  REQUIRE(p.a.post(late) == 0);
  CHECK(p.a.await().status == IBV_WC_WR_FLUSH_ERR);
  REQUIRE(p.a.receive(6, p.a.sge(0, 10)) == 0);
  CHECK(p.a.await().wr_id == 6);
}

TEST_CASE("the sender's own keys are checked when its turn comes") {
  SUBCASE("a wrong key") {
    Pair p;
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.sg_list->lkey ^= 0x100;
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == IBV_WC_LOC_PROT_ERR);
    CHECK(p.a.state(p.a.qp) == IBV_QPS_ERR);
  }
  SUBCASE("beyond the region") {
    Pair p;
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.sg_list->addr += p.a.memory.size() - 9;
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == IBV_WC_LOC_PROT_ERR);
  }
  SUBCASE("a read into memory that may not be written") {
    Pair p;
    ibv_mr* mr = ibv_reg_mr(p.a.pd, p.a.memory.data(), 100, 0);
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.opcode = IBV_WR_RDMA_READ;
    wr.sg_list->lkey = mr->lkey;
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == IBV_WC_LOC_PROT_ERR);
    CHECK(ibv_dereg_mr(mr) == 0);
  }
  SUBCASE("those before it complete first, with success") {
    Pair p;
    ibv_send_wr good = p.a.write(p.b, 60'000, 1), bad = p.a.write(p.b, 10, 2);
    bad.sg_list->lkey ^= 0x100;
    good.next = &bad;
    REQUIRE(p.a.post(good) == 0);
    CHECK(p.a.await().status == IBV_WC_SUCCESS);
    CHECK(p.a.await().status == IBV_WC_LOC_PROT_ERR);
  }
}

TEST_CASE("a receive that is too short fails on both sides") {
  Pair p;
  REQUIRE(p.b.receive(1, p.b.sge(0, 1999)) == 0);
  ibv_send_wr wr = p.a.write(p.b, 2000);
  wr.opcode = IBV_WR_SEND;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.b.await().status == IBV_WC_LOC_LEN_ERR);
  CHECK(p.a.await().status == IBV_WC_REM_INV_REQ_ERR);
  CHECK(p.b.state(p.b.qp) == IBV_QPS_ERR);
}

TEST_CASE("a receive with a wrong key is the receiver's fault") {
  Pair p;
  ibv_sge sge = p.b.sge(0, 2000);
  sge.lkey = p.b.mr->rkey;
  REQUIRE(p.b.receive(1, sge) == 0);
  ibv_send_wr wr = p.a.write(p.b, 2000);
  wr.opcode = IBV_WR_SEND;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.b.await().status == IBV_WC_LOC_PROT_ERR);
  CHECK(p.a.await().status == IBV_WC_REM_OP_ERR);
}

TEST_CASE("an atomic has to be aligned") {
  Pair p;
  ibv_sge into = p.a.sge(0, 8);
  ibv_send_wr wr{};
  wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
  wr.send_flags = IBV_SEND_SIGNALED;
  wr.sg_list = &into;
  wr.num_sge = 1;
  wr.wr.atomic.remote_addr = reinterpret_cast<uintptr_t>(p.b.memory.data()) + 4;
  wr.wr.atomic.rkey = p.b.mr->rkey;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_REM_INV_REQ_ERR);
}

TEST_CASE("keys do not come back soon") {
  Pair p;
  uint32_t last = p.b.mr->rkey;
  for (int i = 0; i < 1000; ++i) {
    ibv_mr* mr = ibv_reg_mr(p.b.pd, p.b.memory.data(), 100, 0);
    REQUIRE((mr->rkey >> 8) > (last >> 8));
    CHECK(mr->rkey != mr->lkey);
    last = mr->rkey;
    REQUIRE(ibv_dereg_mr(mr) == 0);
  }
}
