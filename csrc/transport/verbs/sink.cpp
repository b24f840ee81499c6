// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/sink.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {
constexpr int kMaxReceives = 128;  // chains under way, of at most 1 MiB each
constexpr uint32_t kMaxOps = 32;   // on the send queue

uint32_t num_receives(const Device& device) noexcept {
  return static_cast<uint32_t>(std::clamp(device.limits().max_qp_wr, 2, kMaxReceives));
}
}  // namespace

uint32_t Sink::num_entries(const Device& device) noexcept {
  return num_receives(device) + kMaxOps + 1;
}

Sink::Sink(std::shared_ptr<Device> device, ibv_cq* cq, size_t rail)
    : device_(std::move(device)),
      cq_(cq),
      rail_(rail),
      num_receives_(num_receives(*device_)),
      shape_{.max_send = kMaxOps + 1, .max_recv = num_receives_} {}

Sink::~Sink() {
  if (qp_) (void)stop_qp(qp_.get());
}

int Sink::post_receive() noexcept {
  ibv_recv_wr wr{}, *bad = nullptr;
  wr.wr_id = id(Work::kArrival);
  const int err = ibv_post_recv(qp_.get(), &wr, &bad);
  if (err == 0) ++posted_;
  return err;
}

QpEnd Sink::open() {
  if (!device_->has_windows())
    throw Error(Code::kTransport,
                cat(device_->name(), " has no memory windows of type 2B for pushed writes"), 0,
                "verbs");
  ++epoch_;
  posted_ = completed_ = told_ = 0;
  stopped_ = marker_due_ = false;
  error_ = 0;
  qp_ = make_qp(*device_, cq_, shape_, IBV_ACCESS_REMOTE_WRITE);
  psn_ = random_psn();
  for (uint32_t i = 0; i < num_receives_; ++i)
    if (const int err = post_receive()) {
      close();
      throw Error(Code::kTransport,
                  cat("ibv_post_recv(immediate ", i, ") on ", device_->name(),
                      " failed: ", errno_text(err)),
                  err, "verbs");
    }
  return {qp_->qp_num, psn_};
}

void Sink::connect(const Route& route, const QpEnd& remote) {
  connect_qp(*device_, qp_.get(), route, remote, psn_, 0, 0);
  connected_ = true;
  told_ = posted_;
}

bool Sink::bind(const WindowPtr& window, std::string& reason) {
  Window::Bound& bound = window->bound[rail_];
  if (!idle_.empty()) {
    bound.mw = std::move(idle_.back());
    idle_.pop_back();
  } else {
    bound.mw.reset(ibv_alloc_mw(device_->pd(), IBV_MW_TYPE_2));
    if (!bound.mw) {
      reason = cat("ibv_alloc_mw(type 2) on ", device_->name(), " failed: ", errno_text(errno));
      return false;
    }
  }
  bound.key = ibv_inc_rkey(bound.mw->rkey);
  bound.state = Window::Bound::State::kBinding;
  waiting_.push_back({window, true});
  flush();
  return true;
}

void Sink::invalidate(const WindowPtr& window) {
  window->bound[rail_].state = Window::Bound::State::kInvalidating;
  waiting_.push_back({window, false});
  flush();
}

void Sink::flush() {
  while (!waiting_.empty() && under_way_.size() < kMaxOps && error_ == 0 && !stopped_) {
    error_ = post(waiting_.front());
    if (error_ != 0) return;
    under_way_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

int Sink::post(const Op& op) {
  const Window& window = *op.window;
  const Window::Bound& bound = window.bound[rail_];
  ibv_send_wr wr{}, *bad = nullptr;
  wr.wr_id = id(Work::kWindow);
  wr.send_flags = IBV_SEND_SIGNALED;
  if (op.is_bind) {
    wr.opcode = IBV_WR_BIND_MW;
    wr.bind_mw.mw = bound.mw.get();
    wr.bind_mw.rkey = bound.key;
    wr.bind_mw.bind_info.mr = window.hull.registration->on(*device_);
    wr.bind_mw.bind_info.addr = reinterpret_cast<uint64_t>(window.hull.base);
    wr.bind_mw.bind_info.length = window.nbytes;
    wr.bind_mw.bind_info.mw_access_flags = IBV_ACCESS_REMOTE_WRITE;
  } else {
    wr.opcode = IBV_WR_LOCAL_INV;
    wr.invalidate_rkey = bound.key;
  }
  return ibv_post_send(qp_.get(), &wr, &bad);
}

std::optional<Sink::Op> Sink::on_op(const ibv_wc& completion) {
  if (!is_current(completion) || under_way_.empty()) return {};
  Op op = std::move(under_way_.front());
  under_way_.pop_front();
  // The library and the NIC count its key on from the last one that was bound.
  if (op.is_bind && completion.status == IBV_WC_SUCCESS)
    op.window->bound[rail_].mw->rkey = op.window->bound[rail_].key;
  flush();
  return op;
}

bool Sink::on_arrival(const ibv_wc& completion) noexcept {
  if (!is_current(completion)) return false;
  ++completed_;
  if (!stopped_ && completion.status == IBV_WC_SUCCESS)
    if (const int err = post_receive()) error_ = err;
  return true;
}

void Sink::stop() noexcept {
  connected_ = false;
  stopped_ = true;
  if (!qp_) return;
  if (stop_qp(qp_.get()) != 0) {  // a device that is gone: nothing comes back
    completed_ = posted_;
    return;
  }
  ibv_send_wr wr{}, *bad = nullptr;
  wr.wr_id = id(Work::kSinkMarker);
  wr.opcode = IBV_WR_SEND;  // never sent: it is flushed like what is before it
  wr.send_flags = IBV_SEND_SIGNALED;
  marker_due_ = ibv_post_send(qp_.get(), &wr, &bad) == 0;
}

void Sink::on_marker(const ibv_wc& completion) noexcept {
  if (is_current(completion)) marker_due_ = false;
}

void Sink::close() noexcept {
  connected_ = false;
  qp_.reset();
  ++epoch_;
  posted_ = completed_ = told_ = 0;
  marker_due_ = false;
  error_ = 0;
  under_way_.clear();
  waiting_.clear();
}

}  // namespace kvxfer::verbs
