// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The software NICs' queue pairs take no step with an attribute too few or too many.
#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

namespace {

constexpr int kInit = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
constexpr int kRtr = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                     IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
constexpr int kRts = IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                     IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC;

ibv_qp_attr attributes(const End& end, ibv_qp_state state) {
  ibv_qp_attr attr{};
  attr.qp_state = state;
  attr.port_num = 1;
  attr.path_mtu = IBV_MTU_1024;
  attr.dest_qp_num = 77;
  attr.timeout = 14;
  attr.ah_attr.is_global = 1;
  attr.ah_attr.port_num = 1;
  attr.ah_attr.grh.sgid_index = 3;
  attr.ah_attr.grh.dgid = end.gid;
  return attr;
}

// Without each of the bits of `mask` in turn the step is refused, with all of them it is taken.
void check_step(End& end, ibv_qp_state state, int mask) {
  ibv_qp_attr attr = attributes(end, state);
  for (int bit = 1; bit <= mask; bit <<= 1)
    if (mask & bit && bit != IBV_QP_STATE)
      CHECK(ibv_modify_qp(end.qp, &attr, mask & ~bit) == EINVAL);
  CHECK(ibv_modify_qp(end.qp, &attr, mask | IBV_QP_QKEY) == EINVAL);
  CHECK(ibv_modify_qp(end.qp, &attr, mask) == 0);
  CHECK(end.state(end.qp) == state);
}

}  // namespace

TEST_CASE("each step needs its attributes and takes no others") {
  End end({});
  CHECK(end.to(end.qp, IBV_QPS_RTR) == EINVAL);
  CHECK(end.to(end.qp, IBV_QPS_RTS) == EINVAL);
  check_step(end, IBV_QPS_INIT, kInit);
  check_step(end, IBV_QPS_RTR, kRtr);
  check_step(end, IBV_QPS_RTS, kRts);
  ibv_qp_attr attr = attributes(end, IBV_QPS_RTR);
  CHECK(ibv_modify_qp(end.qp, &attr, kRtr) == EINVAL);  // not backwards
  CHECK(ibv_modify_qp(end.qp, &attr, IBV_QP_TIMEOUT) == EINVAL);
  CHECK(end.to(end.qp, IBV_QPS_SQD) == 0);
  CHECK(end.to(end.qp, IBV_QPS_RTS) == 0);
  CHECK(end.to(end.qp, IBV_QPS_ERR) == 0);
  CHECK(end.to(end.qp, IBV_QPS_RTS) == EINVAL);
  CHECK(end.to(end.qp, IBV_QPS_RESET) == 0);
  check_step(end, IBV_QPS_INIT, kInit);
}

TEST_CASE("values that the device does not have are refused") {
  Setup setup;
  setup.plan = "max_rd_atomic=8 mtu=1024 gids=ll1,none,v4r1,v4r2";
  End end(setup);
  ibv_qp_attr attr = attributes(end, IBV_QPS_INIT);
  attr.port_num = 2;
  CHECK(ibv_modify_qp(end.qp, &attr, kInit) == EINVAL);
  attr.port_num = 1;
  attr.pkey_index = 1;
  CHECK(ibv_modify_qp(end.qp, &attr, kInit) == EINVAL);
  REQUIRE(end.to_init(end.qp) == 0);
  const auto refused = [&](auto change) {
    ibv_qp_attr wrong = attributes(end, IBV_QPS_RTR);
    change(wrong);
    return ibv_modify_qp(end.qp, &wrong, kRtr) == EINVAL;
  };
  CHECK(refused([](ibv_qp_attr& a) { a.path_mtu = IBV_MTU_2048; }));
  CHECK(refused([](ibv_qp_attr& a) { a.max_dest_rd_atomic = 9; }));
  CHECK(refused([](ibv_qp_attr& a) { a.min_rnr_timer = 32; }));
  CHECK(refused([](ibv_qp_attr& a) { a.ah_attr.is_global = 0; }));  // RoCE needs a GID
  CHECK(refused([](ibv_qp_attr& a) { a.ah_attr.grh.sgid_index = 4; }));
  attr = attributes(end, IBV_QPS_RTR);
  REQUIRE(ibv_modify_qp(end.qp, &attr, kRtr) == 0);
  attr = attributes(end, IBV_QPS_RTS);
  attr.max_rd_atomic = 9;
  CHECK(ibv_modify_qp(end.qp, &attr, kRts) == EINVAL);
  attr.max_rd_atomic = 8;
  attr.retry_cnt = 8;
  CHECK(ibv_modify_qp(end.qp, &attr, kRts) == EINVAL);
}

TEST_CASE("a queue pair that is not at least RTR hears nothing") {
  Setup short_wait;
  short_wait.timeout = 8;  // 1 ms
  short_wait.retry_cnt = 2;
  Pair p(short_wait);
  REQUIRE(p.b.to(p.b.qp, IBV_QPS_RESET) == 0);
  REQUIRE(p.b.to_init(p.b.qp) == 0);
  ibv_send_wr wr = p.a.write(p.b, 10);
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_RETRY_EXC_ERR);
}

TEST_CASE("a drained send queue begins nothing new and says when it is quiet") {
  Pair p;
  fake_verbs_hold(p.b.qp->qp_num);
  ibv_send_wr first = p.a.write(p.b, 100, 1), second = p.a.write(p.b, 100, 2);
  REQUIRE(p.a.post(first) == 0);
  pause_ms(2);
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_SQD;
  attr.en_sqd_async_notify = 1;
  REQUIRE(ibv_modify_qp(p.a.qp, &attr, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY) == 0);
  REQUIRE(p.a.post(second) == 0);
  fake_verbs_release(p.b.qp->qp_num);
  CHECK(p.a.await().wr_id == 1);
  CHECK(p.a.await_event() == IBV_EVENT_SQ_DRAINED);
  pause_ms(5);
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));
  REQUIRE(p.a.to(p.a.qp, IBV_QPS_RTS) == 0);
  CHECK(p.a.await().wr_id == 2);
}

TEST_CASE("objects that are in use cannot go") {
  Pair p;
  CHECK(ibv_dealloc_pd(p.a.pd) == EBUSY);
  CHECK(ibv_destroy_cq(p.a.cq) == EBUSY);
}
