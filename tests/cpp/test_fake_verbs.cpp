// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The software NICs move bytes as a reliable connection does.
#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

TEST_CASE("a write of many packets lands and completes once") {
  Pair p;
  p.a.fill(3);
  ibv_send_wr wr = p.a.write(p.b, 50'001, 42);
  REQUIRE(p.a.post(wr) == 0);
  const ibv_wc wc = p.a.await();
  CHECK(wc.status == IBV_WC_SUCCESS);
  CHECK(wc.wr_id == 42);
  CHECK(wc.opcode == IBV_WC_RDMA_WRITE);
  CHECK(wc.qp_num == p.a.qp->qp_num);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 50'001) == 0);
  CHECK(p.b.memory[50'001] == std::byte{0});
  ibv_wc more{};
  CHECK_FALSE(p.a.poll(more));
  CHECK_FALSE(p.b.poll(more));  // a plain write says nothing at the target
}

TEST_CASE("a send with immediate data fills the oldest receive") {
  Pair p;
  p.a.fill(9);
  REQUIRE(p.b.receive(7, p.b.sge(100, 2000)) == 0);
  REQUIRE(p.b.receive(8, p.b.sge(4000, 2000)) == 0);
  ibv_send_wr wr = p.a.write(p.b, 1500);
  wr.opcode = IBV_WR_SEND_WITH_IMM;
  wr.imm_data = 0x01020304;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  const ibv_wc wc = p.b.await();
  CHECK(wc.wr_id == 7);
  CHECK(wc.opcode == IBV_WC_RECV);
  CHECK(wc.byte_len == 1500);
  CHECK((wc.wc_flags & IBV_WC_WITH_IMM) != 0);
  CHECK(wc.imm_data == 0x01020304);
  CHECK(wc.src_qp == p.a.qp->qp_num);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data() + 100, 1500) == 0);
}

TEST_CASE("a write with immediate data takes a receive and leaves its buffer alone") {
  Pair p;
  p.a.fill(1);
  REQUIRE(p.b.receive(5, p.b.sge(8000, 16)) == 0);
  ibv_send_wr wr = p.a.write(p.b, 3000);
  wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  wr.imm_data = 77;
  REQUIRE(p.a.post(wr) == 0);
  const ibv_wc wc = p.b.await();
  CHECK(wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM);
  CHECK(wc.wr_id == 5);
  CHECK(wc.byte_len == 3000);
  CHECK(wc.imm_data == 77);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 3000) == 0);
  CHECK(p.b.memory[8000] == std::byte{0});
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
}

TEST_CASE("a read scatters what the target has") {
  Pair p;
  p.b.fill(5);
  ibv_sge list[] = {p.a.sge(0, 1000), p.a.sge(2000, 0), p.a.sge(3000, 9000)};
  ibv_send_wr wr = p.a.write(p.b, 1);
  wr.opcode = IBV_WR_RDMA_READ;
  wr.sg_list = list;
  wr.num_sge = 3;
  REQUIRE(p.a.post(wr) == 0);
  const ibv_wc wc = p.a.await();
  CHECK(wc.status == IBV_WC_SUCCESS);
  CHECK(wc.opcode == IBV_WC_RDMA_READ);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 1000) == 0);
  CHECK(std::memcmp(p.a.memory.data() + 3000, p.b.memory.data() + 1000, 9000) == 0);
  CHECK(p.a.memory[1000] == std::byte{0});
}

TEST_CASE("atomics change the target once and give the old value") {
  Pair p;
  uint64_t value = 40;
  std::memcpy(p.b.memory.data() + 8, &value, 8);
  ibv_sge into = p.a.sge(0, 8);
  ibv_send_wr wr{};
  wr.send_flags = IBV_SEND_SIGNALED;
  wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
  wr.sg_list = &into;
  wr.num_sge = 1;
  wr.wr.atomic.remote_addr = reinterpret_cast<uintptr_t>(p.b.memory.data() + 8);
  wr.wr.atomic.rkey = p.b.mr->rkey;
  wr.wr.atomic.compare_add = 2;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().opcode == IBV_WC_FETCH_ADD);
  std::memcpy(&value, p.a.memory.data(), 8);
  CHECK(value == 40);
  wr.opcode = IBV_WR_ATOMIC_CMP_AND_SWP;
  wr.wr.atomic.compare_add = 42;
  wr.wr.atomic.swap = 7;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().opcode == IBV_WC_COMP_SWAP);
  std::memcpy(&value, p.a.memory.data(), 8);
  CHECK(value == 42);
  std::memcpy(&value, p.b.memory.data() + 8, 8);
  CHECK(value == 7);
}

TEST_CASE("inline data may be overwritten as soon as the post returns") {
  Pair p;
  p.a.fill(2);
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr wr = p.a.write(p.b, 40);
  wr.send_flags |= IBV_SEND_INLINE;
  wr.sg_list->lkey = 0;  // not looked at
  const std::vector<std::byte> before(p.a.memory.begin(), p.a.memory.begin() + 40);
  REQUIRE(p.a.post(wr) == 0);
  std::memset(p.a.memory.data(), 0xee, 40);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  CHECK(std::memcmp(before.data(), p.b.memory.data(), 40) == 0);
}

TEST_CASE("unsignalled requests complete silently, in order, before the signalled one") {
  Pair p;
  for (int i = 0; i < 3; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 100, static_cast<uint64_t>(i));
    if (i < 2) wr.send_flags = 0;
    REQUIRE(p.a.post(wr) == 0);
  }
  CHECK(p.a.await().wr_id == 2);
  pause_ms(5);
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));
}
