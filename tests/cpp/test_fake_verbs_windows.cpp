// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory windows of the software NICs: what they cover, for whom, and until when.
#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

namespace {

// A window over the first 4 KiB of an end's memory.
struct Window {
  explicit Window(End& end, ibv_mw_type type = IBV_MW_TYPE_2)
      : of(end), mw(ibv_alloc_mw(end.pd, type)) {
    REQUIRE(mw);
  }
  ~Window() { CHECK(ibv_dealloc_mw(mw) == 0); }

  ibv_send_wr bind_wr(uint32_t rkey, unsigned access = IBV_ACCESS_REMOTE_WRITE) const {
    ibv_send_wr wr{};
    wr.wr_id = 1000;
    wr.opcode = IBV_WR_BIND_MW;
    wr.send_flags = IBV_SEND_SIGNALED;
    wr.bind_mw.mw = mw;
    wr.bind_mw.rkey = rkey;
    wr.bind_mw.bind_info = {of.mr, reinterpret_cast<uintptr_t>(of.memory.data()), 4096, access};
    return wr;
  }
  ibv_wc_status bind(unsigned access = IBV_ACCESS_REMOTE_WRITE) const {
    ibv_send_wr wr = bind_wr(ibv_inc_rkey(mw->rkey), access);
    REQUIRE(of.post(wr) == 0);
    const ibv_wc wc = of.await();
    if (wc.status == IBV_WC_SUCCESS) {
      CHECK(wc.opcode == IBV_WC_BIND_MW);
      mw->rkey = wr.bind_mw.rkey;
    }
    return wc.status;
  }
  ibv_wc_status invalidate(uint32_t rkey) const {
    ibv_send_wr wr{};
    wr.opcode = IBV_WR_LOCAL_INV;
    wr.send_flags = IBV_SEND_SIGNALED;
    wr.invalidate_rkey = rkey;
    REQUIRE(of.post(wr) == 0);
    const ibv_wc wc = of.await();
    if (wc.status == IBV_WC_SUCCESS) CHECK(wc.opcode == IBV_WC_LOCAL_INV);
    return wc.status;
  }
  End& of;
  ibv_mw* mw;
};

ibv_wc_status write(Pair& p, uint32_t rkey, size_t n = 4096) {
  ibv_send_wr wr = p.a.write(p.b, n);
  wr.wr.rdma.rkey = rkey;
  REQUIRE(p.a.post(wr) == 0);
  return p.a.await().status;
}

}  // namespace

TEST_CASE("a window lets in what lies within it, until it is invalidated") {
  Pair p;
  Window w(p.b);
  p.a.fill(4);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  CHECK(write(p, w.mw->rkey) == IBV_WC_SUCCESS);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 4096) == 0);
  SUBCASE("one byte more is refused") {
    CHECK(write(p, w.mw->rkey, 4097) == IBV_WC_REM_ACCESS_ERR);
  }
  SUBCASE("reading was not granted") {
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.opcode = IBV_WR_RDMA_READ;
    wr.wr.rdma.rkey = w.mw->rkey;
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == IBV_WC_REM_ACCESS_ERR);
  }
  SUBCASE("invalidated") {
    REQUIRE(w.invalidate(w.mw->rkey) == IBV_WC_SUCCESS);
    p.a.fill(5);
    CHECK(write(p, w.mw->rkey) == IBV_WC_REM_ACCESS_ERR);
    CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 4096) != 0);
  }
  SUBCASE("invalidated by the peer's send") {
    REQUIRE(p.b.receive(3, p.b.sge(5000, 10)) == 0);
    ibv_send_wr wr = p.a.write(p.b, 10);
    wr.opcode = IBV_WR_SEND_WITH_INV;
    wr.invalidate_rkey = w.mw->rkey;
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == IBV_WC_SUCCESS);
    const ibv_wc wc = p.b.await();
    CHECK((wc.wc_flags & IBV_WC_WITH_INV) != 0);
    CHECK(wc.invalidated_rkey == w.mw->rkey);
    CHECK(write(p, w.mw->rkey) == IBV_WC_REM_ACCESS_ERR);
  }
}

TEST_CASE("a write that is under way when its window goes does not land") {
  Pair p;
  Window w(p.b);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  p.a.fill(4);
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr wr = p.a.write(p.b, 4096);
  wr.wr.rdma.rkey = w.mw->rkey;
  REQUIRE(p.a.post(wr) == 0);
  pause_ms(2);
  // An acknowledgement for the invalidation is not needed: it is a local act.
  REQUIRE(w.invalidate(w.mw->rkey) == IBV_WC_SUCCESS);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_REM_ACCESS_ERR);
  for (const std::byte byte : p.b.memory) REQUIRE(byte == std::byte{0});
}

TEST_CASE("a write loses its window between two packets and ends there") {
  Pair p;
  Window w(p.b);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  p.a.fill(4);
  fake_verbs_hold(p.b.qp->qp_num);
  const int64_t sent = fake_verbs_count("packets"), placed = fake_verbs_count("bytes_placed");
  ibv_send_wr wr = p.a.write(p.b, 4096);  // four packets
  wr.wr.rdma.rkey = w.mw->rkey;
  REQUIRE(p.a.post(wr) == 0);
  REQUIRE(eventually([&] { return fake_verbs_count("packets") == sent + 4; }));
  fake_verbs_pass(p.b.qp->qp_num, 2);
  REQUIRE(eventually([&] { return fake_verbs_count("bytes_placed") == placed + 2048; }));
  REQUIRE(w.invalidate(w.mw->rkey) == IBV_WC_SUCCESS);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_REM_ACCESS_ERR);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 2048) == 0);
  for (size_t i = 2048; i < 4096; ++i) REQUIRE(p.b.memory[i] == std::byte{0});
}

TEST_CASE("a read ends where its window went") {
  Pair p;
  Window w(p.b);
  REQUIRE(w.bind(IBV_ACCESS_REMOTE_READ) == IBV_WC_SUCCESS);
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr wr = p.a.write(p.b, 4096);
  wr.opcode = IBV_WR_RDMA_READ;
  wr.wr.rdma.rkey = w.mw->rkey;
  REQUIRE(p.a.post(wr) == 0);
  pause_ms(2);
  REQUIRE(w.invalidate(w.mw->rkey) == IBV_WC_SUCCESS);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_REM_ACCESS_ERR);
}

TEST_CASE("a window of type 2B works on the queue pair that bound it and on no other") {
  Pair p;
  ibv_qp* a2 = p.a.make_qp(p.a.setup);
  ibv_qp* b2 = p.b.make_qp(p.b.setup);
  connect(p.a, a2, p.b, b2);
  Window w(p.b);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  CHECK(write(p, w.mw->rkey) == IBV_WC_SUCCESS);
  ibv_send_wr wr = p.a.write(p.b, 100);
  wr.wr.rdma.rkey = w.mw->rkey;
  REQUIRE(p.a.post(wr, a2) == 0);
  CHECK(p.a.await().status == IBV_WC_REM_ACCESS_ERR);
  CHECK(write(p, w.mw->rkey) == IBV_WC_SUCCESS);  // the other pair lives on
  // Nor may the other one take it away.
  ibv_qp* b3 = p.b.make_qp(p.b.setup);
  ibv_qp* a3 = p.a.make_qp(p.a.setup);
  connect(p.a, a3, p.b, b3);
  ibv_send_wr inv{};
  inv.opcode = IBV_WR_LOCAL_INV;
  inv.invalidate_rkey = w.mw->rkey;
  REQUIRE(p.b.post(inv, b3) == 0);
  ibv_wc wc{};
  REQUIRE(eventually([&] { return p.b.poll(wc) && wc.status == IBV_WC_LOC_QP_OP_ERR; }));
  CHECK(p.b.state(b3) == IBV_QPS_ERR);
  for (ibv_qp* qp : {a2, a3}) CHECK(ibv_destroy_qp(qp) == 0);
  for (ibv_qp* qp : {b2, b3}) CHECK(ibv_destroy_qp(qp) == 0);
}

TEST_CASE("a window of type 1 works on every queue pair of its domain") {
  Pair p;
  Window w(p.b, IBV_MW_TYPE_1);
  ibv_qp* a2 = p.a.make_qp(p.a.setup);
  ibv_qp* b2 = p.b.make_qp(p.b.setup);
  connect(p.a, a2, p.b, b2);
  ibv_mw_bind bind{};
  bind.send_flags = IBV_SEND_SIGNALED;
  bind.bind_info = {p.b.mr, reinterpret_cast<uintptr_t>(p.b.memory.data()), 4096,
                    IBV_ACCESS_REMOTE_WRITE};
  const uint32_t before = w.mw->rkey;
  REQUIRE(ibv_bind_mw(p.b.qp, w.mw, &bind) == 0);
  CHECK(w.mw->rkey != before);
  CHECK(p.b.await().opcode == IBV_WC_BIND_MW);
  ibv_send_wr wr = p.a.write(p.b, 100);
  wr.wr.rdma.rkey = w.mw->rkey;
  REQUIRE(p.a.post(wr, a2) == 0);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  // It is bound again, or to nothing, without being invalidated.
  bind.bind_info.length = 0;
  REQUIRE(ibv_bind_mw(p.b.qp, w.mw, &bind) == 0);
  CHECK(p.b.await().status == IBV_WC_SUCCESS);
  REQUIRE(p.a.post(wr, a2) == 0);
  CHECK(p.a.await().status == IBV_WC_REM_ACCESS_ERR);
  CHECK(ibv_destroy_qp(a2) == 0);
  CHECK(ibv_destroy_qp(b2) == 0);
  ibv_send_wr posted = w.bind_wr(ibv_inc_rkey(w.mw->rkey));
  CHECK(p.b.post(posted) == EINVAL);  // not by a work request
}

TEST_CASE("binds that are refused end the queue pair") {
  Pair p;
  Window w(p.b);
  SUBCASE("with the key it has") {
    ibv_send_wr wr = w.bind_wr(w.mw->rkey);
    REQUIRE(p.b.post(wr) == 0);
    CHECK(p.b.await().status == IBV_WC_MW_BIND_ERR);
  }
  SUBCASE("twice without an invalidation") {
    REQUIRE(w.bind() == IBV_WC_SUCCESS);
    CHECK(w.bind() == IBV_WC_MW_BIND_ERR);
  }
  SUBCASE("with a stale key in ibv_mw") {
    REQUIRE(w.bind() == IBV_WC_SUCCESS);
    const uint32_t bound = w.mw->rkey;
    REQUIRE(w.invalidate(bound) == IBV_WC_SUCCESS);
    w.mw->rkey = bound - 1;
    ibv_send_wr wr = w.bind_wr(bound + 1);
    REQUIRE(p.b.post(wr) == 0);
    CHECK(p.b.await().status == IBV_WC_MW_BIND_ERR);
  }
  SUBCASE("beyond the region") {
    ibv_send_wr wr = w.bind_wr(ibv_inc_rkey(w.mw->rkey));
    wr.bind_mw.bind_info.length = p.b.memory.size() + 1;
    REQUIRE(p.b.post(wr) == 0);
    CHECK(p.b.await().status == IBV_WC_MW_BIND_ERR);
  }
  SUBCASE("over a region that was registered without MW_BIND") {
    ibv_mr* mr = ibv_reg_mr(p.b.pd, p.b.memory.data(), 4096, IBV_ACCESS_LOCAL_WRITE);
    ibv_send_wr wr = w.bind_wr(ibv_inc_rkey(w.mw->rkey));
    wr.bind_mw.bind_info.mr = mr;
    REQUIRE(p.b.post(wr) == 0);
    CHECK(p.b.await().status == IBV_WC_MW_BIND_ERR);
    CHECK(ibv_dereg_mr(mr) == 0);
  }
  SUBCASE("by the plan") {
    REQUIRE(fake_verbs_plan("bind=1") == 0);
    CHECK(w.bind() == IBV_WC_MW_BIND_ERR);
  }
  CHECK(p.b.state(p.b.qp) == IBV_QPS_ERR);
}

TEST_CASE("an invalidation that is refused ends the queue pair") {
  Pair p;
  Window w(p.b);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  SUBCASE("another key") { CHECK(w.invalidate(w.mw->rkey + 1) == IBV_WC_LOC_QP_OP_ERR); }
  SUBCASE("a region's key") { CHECK(w.invalidate(p.b.mr->rkey) == IBV_WC_LOC_QP_OP_ERR); }
  SUBCASE("twice") {
    CHECK(w.invalidate(w.mw->rkey) == IBV_WC_SUCCESS);
    CHECK(w.invalidate(w.mw->rkey) == IBV_WC_LOC_QP_OP_ERR);
  }
  SUBCASE("by the plan") {
    REQUIRE(fake_verbs_plan("invalidate=1") == 0);
    CHECK(w.invalidate(w.mw->rkey) == IBV_WC_LOC_QP_OP_ERR);
  }
  CHECK(p.b.state(p.b.qp) == IBV_QPS_ERR);
}

TEST_CASE("a region with bound windows cannot go") {
  Pair p;
  Window w(p.b);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  CHECK(ibv_dereg_mr(p.b.mr) == EBUSY);
  REQUIRE(w.invalidate(w.mw->rkey) == IBV_WC_SUCCESS);
}

TEST_CASE("after 256 binds a key that was given away is good again") {
  // Why no window may be bound again before the peer has forgotten its key: there are 256 of them.
  Setup patient;
  patient.timeout = 20;  // 4 s
  Pair p(patient);
  Window w(p.b);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  const uint32_t old = w.mw->rkey;
  fake_verbs_hold(p.b.qp->qp_num);
  p.a.fill(4);
  ibv_send_wr wr = p.a.write(p.b, 100);
  wr.wr.rdma.rkey = old;
  REQUIRE(p.a.post(wr) == 0);
  for (int i = 0; i < 256; ++i) {
    REQUIRE(w.invalidate(w.mw->rkey) == IBV_WC_SUCCESS);
    REQUIRE(w.bind() == IBV_WC_SUCCESS);
    if (i < 255) REQUIRE(w.mw->rkey != old);
  }
  REQUIRE(w.mw->rkey == old);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  CHECK(std::memcmp(p.a.memory.data(), p.b.memory.data(), 100) == 0);
}

TEST_CASE("a window dies with the queue pair it is bound to") {
  Pair p;
  Window w(p.b);
  REQUIRE(w.bind() == IBV_WC_SUCCESS);
  REQUIRE(ibv_destroy_qp(p.b.qp) == 0);
  p.b.qp = nullptr;
  CHECK(ibv_dereg_mr(p.b.mr) == 0);  // no longer bound to it
  p.b.mr = nullptr;
}

TEST_CASE("windows that the device does not have cannot be made") {
  Setup none;
  none.plan = "windows=0";
  End end(none);
  CHECK_FALSE(ibv_alloc_mw(end.pd, IBV_MW_TYPE_2));
  CHECK(errno == EOPNOTSUPP);
  ibv_device_attr attr{};
  REQUIRE(ibv_query_device(end.context, &attr) == 0);
  CHECK((attr.device_cap_flags & (IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2B)) == 0);
}
