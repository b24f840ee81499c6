// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/control_pair.hpp"

#include <utility>

namespace kvxfer::verbs {
namespace {
constexpr uint32_t kMaxInline = 220;
}

ControlPair::ControlPair(std::shared_ptr<Device> device, ibv_cq* cq, uint32_t num_buffers)
    : device_(std::move(device)),
      cq_(cq),
      shape_{.max_send = num_buffers + kMoreSends,
             .max_recv = num_buffers + kResumes,
             .max_inline = kMaxInline} {}

ControlPair::~ControlPair() {
  if (qp_) (void)stop_qp(qp_.get());
}

QpEnd ControlPair::open(uint32_t epoch) {
  qp_ = make_qp(*device_, cq_, shape_, 0);
  psn_ = random_psn();
  epoch_ = epoch;
  return {qp_->qp_num, psn_};
}

void ControlPair::connect(const Route& route, const QpEnd& remote) {
  connect_qp(*device_, qp_.get(), route, remote, psn_, 0, 0);
  connected_ = true;
}

int ControlPair::post_send(ibv_send_wr* chain) noexcept {
  ibv_send_wr* bad = nullptr;
  return ibv_post_send(qp_.get(), chain, &bad);
}

int ControlPair::post_receive(uint32_t buffer, ibv_sge where) noexcept {
  ibv_recv_wr wr{}, *bad = nullptr;
  wr.wr_id = id(Work::kReceive, buffer);
  wr.sg_list = &where;
  wr.num_sge = 1;
  const int err = ibv_post_recv(qp_.get(), &wr, &bad);
  if (err == 0) ++num_receives_;
  return err;
}

bool ControlPair::stop() noexcept {
  stopping_ = true;
  if (!qp_ || stop_qp(qp_.get()) != 0) return false;
  ibv_send_wr wr{};
  wr.wr_id = marker();
  wr.opcode = IBV_WR_SEND;  // never sent: it is flushed like what is before it
  wr.send_flags = IBV_SEND_SIGNALED;
  return post_send(&wr) == 0;
}

void ControlPair::close() noexcept {
  qp_.reset();
  connected_ = stopping_ = false;
  num_receives_ = 0;
}

}  // namespace kvxfer::verbs
