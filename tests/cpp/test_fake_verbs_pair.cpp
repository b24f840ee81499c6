// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "fake_verbs_pair.hpp"

namespace fake_verbs_test {
namespace {

ibv_context* open(const Setup& setup) {
  REQUIRE(fake_verbs_plan(setup.plan.c_str()) == 0);
  int n = 0;
  ibv_device** list = ibv_get_device_list(&n);
  REQUIRE(setup.device < n);
  ibv_context* out = ibv_open_device(list[setup.device]);
  ibv_free_device_list(list);
  REQUIRE(out);
  return out;
}

}  // namespace

End::End(const Setup& s) : setup(s), context(open(s)), memory(s.nbytes) {
  pd = ibv_alloc_pd(context);
  REQUIRE(pd);
  if (s.channel) channel = ibv_create_comp_channel(context);
  cq = ibv_create_cq(context, s.cqe, this, channel, 0);
  REQUIRE(cq);
  mr = ibv_reg_mr(pd, memory.data(), memory.size(),
                  IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
                      IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND);
  REQUIRE(mr);
  REQUIRE(ibv_query_gid(context, 1, s.sgid_index, &gid) == 0);
  qp = make_qp(s);
}

End::~End() {
  if (qp) CHECK(ibv_destroy_qp(qp) == 0);
  if (mr) CHECK(ibv_dereg_mr(mr) == 0);
  if (cq) CHECK(ibv_destroy_cq(cq) == 0);
  if (channel) CHECK(ibv_destroy_comp_channel(channel) == 0);
  if (pd) CHECK(ibv_dealloc_pd(pd) == 0);
  CHECK(ibv_close_device(context) == 0);
}

ibv_qp* End::make_qp(const Setup& s) {
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = cq;
  init.cap = {s.max_send_wr, s.max_recv_wr, s.max_sge, s.max_sge, s.max_inline};
  init.qp_type = IBV_QPT_RC;
  init.sq_sig_all = s.sq_sig_all;
  ibv_qp* out = ibv_create_qp(pd, &init);
  REQUIRE(out);
  return out;
}

int End::to_init(ibv_qp* on) const {
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_INIT;
  attr.port_num = 1;
  attr.qp_access_flags = setup.access;
  return ibv_modify_qp(on, &attr,
                       IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

int End::to_rtr(ibv_qp* on, uint32_t peer_qpn, const ibv_gid& peer_gid) const {
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_RTR;
  attr.path_mtu = IBV_MTU_1024;
  attr.dest_qp_num = peer_qpn;
  attr.rq_psn = peer_qpn & 0xffffff;  // each side starts at its own number
  attr.max_dest_rd_atomic = setup.max_dest_rd_atomic;
  attr.min_rnr_timer = setup.min_rnr_timer;
  attr.ah_attr.is_global = 1;
  attr.ah_attr.grh.dgid = peer_gid;
  attr.ah_attr.grh.sgid_index = static_cast<uint8_t>(setup.sgid_index);
  attr.ah_attr.grh.hop_limit = 64;
  attr.ah_attr.port_num = 1;
  return ibv_modify_qp(on, &attr,
                       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                           IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

int End::to_rts(ibv_qp* on) const {
  ibv_qp_attr attr{};
  attr.qp_state = IBV_QPS_RTS;
  attr.timeout = setup.timeout;
  attr.retry_cnt = setup.retry_cnt;
  attr.rnr_retry = setup.rnr_retry;
  attr.sq_psn = on->qp_num & 0xffffff;
  attr.max_rd_atomic = setup.max_rd_atomic;
  return ibv_modify_qp(on, &attr,
                       IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                           IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}

int End::to(ibv_qp* on, ibv_qp_state state) const {
  ibv_qp_attr attr{};
  attr.qp_state = state;
  return ibv_modify_qp(on, &attr, IBV_QP_STATE);
}

ibv_qp_state End::state(ibv_qp* on) const {
  ibv_qp_attr attr{};
  ibv_qp_init_attr init{};
  REQUIRE(ibv_query_qp(on, &attr, IBV_QP_STATE, &init) == 0);
  return attr.qp_state;
}

int End::post(ibv_send_wr& wr, ibv_qp* on) const {
  ibv_send_wr* bad = nullptr;
  return ibv_post_send(on ? on : qp, &wr, &bad);
}

int End::receive(uint64_t wr_id, ibv_sge sge, ibv_qp* on) const {
  ibv_recv_wr wr{};
  wr.wr_id = wr_id;
  wr.sg_list = &sge;
  wr.num_sge = sge.length ? 1 : 0;
  ibv_recv_wr* bad = nullptr;
  return ibv_post_recv(on ? on : qp, &wr, &bad);
}

ibv_sge End::sge(size_t offset, size_t n) const {
  return {reinterpret_cast<uintptr_t>(memory.data() + offset), static_cast<uint32_t>(n), mr->lkey};
}

ibv_send_wr End::write(const End& to, size_t n, uint64_t wr_id) const {
  auto& list = lists[next_list++ % 8];
  list = {sge(0, n)};
  ibv_send_wr wr{};
  wr.wr_id = wr_id;
  wr.opcode = IBV_WR_RDMA_WRITE;
  wr.send_flags = IBV_SEND_SIGNALED;
  wr.sg_list = list.data();
  wr.num_sge = 1;
  wr.wr.rdma.remote_addr = reinterpret_cast<uintptr_t>(to.memory.data());
  wr.wr.rdma.rkey = to.mr->rkey;
  return wr;
}

ibv_wc End::await() const {
  ibv_wc wc{};
  REQUIRE(eventually([&] { return poll(wc); }));
  return wc;
}

void End::fill(uint8_t seed) {
  for (size_t i = 0; i < memory.size(); ++i)
    memory[i] = static_cast<std::byte>(seed + i * 7 + i / 251);
}

ibv_event_type End::await_event() const {
  pollfd fd{context->async_fd, POLLIN, 0};
  REQUIRE(::poll(&fd, 1, 5000) == 1);
  ibv_async_event event{};
  REQUIRE(ibv_get_async_event(context, &event) == 0);
  ibv_ack_async_event(&event);
  return event.event_type;
}

void connect(End& a, ibv_qp* qa, End& b, ibv_qp* qb) {
  REQUIRE(a.to_init(qa) == 0);
  REQUIRE(b.to_init(qb) == 0);
  REQUIRE(a.to_rtr(qa, qb->qp_num, b.gid) == 0);
  REQUIRE(b.to_rtr(qb, qa->qp_num, a.gid) == 0);
  REQUIRE(a.to_rts(qa) == 0);
  REQUIRE(b.to_rts(qb) == 0);
}

Pair::Pair(const Setup& left, const Setup& right) : a(left), b(right) { connect(a, a.qp, b, b.qp); }

}  // namespace fake_verbs_test
