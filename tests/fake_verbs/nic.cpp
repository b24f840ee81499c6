// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "nic.hpp"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "requester.hpp"
#include "responder.hpp"

namespace fake_verbs {
namespace {

constexpr size_t kBatch = 64;  // packets taken in before answers and requests go out again
constexpr int kBudget = 32;    // packets of one queue pair before it is the next one's turn
constexpr int64_t kFlushNs = 100'000'000;  // nobody has to wait longer for a flush
constexpr uint32_t kQps = 1u << kSlotShift;

}  // namespace

Nic& Nic::get() {
  static Nic* const nic = new Nic;
  return *nic;
}

Nic::Nic() {
  const char* text = std::getenv("KVXFER_FAKE_VERBS");
  try {
    set_plan(parse_plan(text ? text : ""));
    devices_at_start = plan.devices;
    by_hand = network.alone = plan.by_hand;
  } catch (const std::exception& error) {
    // No verb can say it, and a test that goes on without its faults proves nothing.
    std::fprintf(stderr, "%s\n", error.what());
    ::_exit(2);
  }
  ::pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                   [] {
                     get().forked();
                     get().mutex_.unlock();
                   });
}

// The child has no hardware thread, and what it inherited is its parent's: every verb on that fails
// with EIO. It may open devices of its own.
void Nic::forked() {
  if (started_) {
    network.abandon();
    ::close(doorbell_);
  }
  network = Network();
  network.alone = by_hand;
  started_ = asleep_ = false;
  waiting_.store(0, std::memory_order_relaxed);
  for (const auto& device : devices_) {
    device->removed = true;
    for (const auto& [key, context] : contexts)
      for (const auto& [unused, cq] : context->cqs) cq->broken.store(true);
  }
  for (auto& device : devices_) gone_.push_back(std::move(device));
  devices_.clear();
  qps_.clear();
  ready_.clear();
}

void Nic::set_plan(const Plan& next) {
  plan = next;
  random.seed(plan.seed);
  wr_count_ = packet_count_ = polls = num_registered = 0;
  calls_.clear();
  every_poll_counts.store(plan.remove != 0, std::memory_order_relaxed);
  for (const auto& [number, qp] : qps_)
    if (qp->flushing) wake(*qp);
}

const std::vector<std::unique_ptr<Device>>& Nic::devices() {
  for (int i = static_cast<int>(devices_.size()); i < plan.devices; ++i)
    devices_.push_back(std::make_unique<Device>(plan, i));
  return devices_;
}

void Nic::start() {
  if (started_) return;
  network.open();
  doorbell_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (doorbell_ < 0) throw std::system_error(errno, std::generic_category(), "fake_verbs: eventfd");
  started_ = true;
  if (by_hand) return;
  // Signals are the user's: none is delivered to the hardware.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([this] { run(); }).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

int Nic::refuse(const char* verb, const Device& device) {
  if (device.removed) return EIO;
  if (plan.fail.empty()) return 0;
  const auto asked = plan.fail.find(verb);
  if (asked == plan.fail.end() || ++calls_[verb] != asked->second.at) return 0;
  ++statistics.failed_calls;
  return asked->second.err;
}

bool Nic::hit(double probability) {
  return probability > 0 && std::uniform_real_distribution<>()(random) < probability;
}

int64_t Nic::within(int64_t up_to_ns) {
  return std::uniform_int_distribution<int64_t>(0, up_to_ns)(random);
}

uint32_t Nic::add(QueuePair& qp) {
  start();
  if (qps_.size() >= static_cast<size_t>(plan.max_qp)) return 0;
  uint32_t number = 0;
  do number = network.slot() << kSlotShift | (next_qp_ = (next_qp_ + 1) % kQps);
  while (qps_.contains(number));
  qps_[number] = &qp;
  return number;
}

void Nic::remove(QueuePair& qp) {
  forget(qp);
  qps_.erase(qp.qp_num);
  doomed.erase(qp.qp_num);
  if (qps_.empty()) network.leave_peers();
}

// Whoever posts has to see the end of all of it first: in ERR, and not for ever, since a machine
// may be busy. Who could not is not blamed for it. Receives of a queue pair that never carried
// anything are its buffers, and no work.
void Nic::note_end(const QueuePair& qp) {
  const bool carried = qp.retired > 0 || qp.receives_retired > 0;
  const bool all_seen =
      qp.posted == qp.retired && (!carried || qp.receives_posted == qp.receives_retired);
  const bool waited =
      qp.state == IBV_QPS_ERR && kvxfer::now_ns() - qp.in_error_since_ns >= kFlushNs;
  if (!all_seen && !waited && !qp.hindered) ++statistics.dirty_destroys;
}

QueuePair* Nic::find(uint32_t qpn) {
  const auto it = qps_.find(qpn);
  return it == qps_.end() ? nullptr : it->second;
}

void Nic::wake(QueuePair& qp) {
  if (!qp.ready) ready_.push_back(qp.qp_num);
  qp.ready = true;
  arm(0);
}

void Nic::arm(int64_t at_ns) {
  if (at_ns != 0) next_timer_ns_ = std::min(next_timer_ns_, at_ns);
  if (!asleep_ || at_ns == kvxfer::kNever) return;
  asleep_ = false;
  const uint64_t one = 1;
  (void)!::write(doorbell_, &one, sizeof one);
}

void Nic::count_request(QueuePair& qp) {
  ++statistics.work_requests;
  if (++wr_count_ == plan.qp_fatal) break_qp(qp, IBV_EVENT_QP_FATAL);
}

std::optional<ibv_wc_status> Nic::doom(const QueuePair& qp, bool is_read) {
  if (const auto it = doomed.find(qp.qp_num); it != doomed.end()) {
    const ibv_wc_status status = it->second;
    doomed.erase(it);
    return status;
  }
  const bool read_fails = is_read && hit(plan.read_error.probability);
  if (!read_fails && !hit(plan.error.probability)) return {};
  const Plan::Error& error = read_fails ? plan.read_error : plan.error;
  if (error.status) return error.status;
  // Each in turn, but those that only tag matching has.
  error_turn_ = error_turn_ % IBV_WC_GENERAL_ERR + 1;
  return static_cast<ibv_wc_status>(error_turn_);
}

void Nic::send(QueuePair& qp, Packet packet) {
  Port& port = *qp.port;
  Head& head = packet.head;
  head.src_qpn = qp.qp_num;
  head.dest_qpn = qp.attr.dest_qp_num;
  head.rail = static_cast<uint8_t>(port.rail);
  head.dlid = qp.attr.ah_attr.dlid;
  if (qp.attr.ah_attr.is_global) {
    const Gid& gid = port.gids[qp.attr.ah_attr.grh.sgid_index];
    head.sgid = gid.gid;
    head.gid_type = static_cast<uint8_t>(gid.type);
    head.dgid = qp.attr.ah_attr.grh.dgid;
  }
  ++statistics.packets;
  if (++packet_count_ == plan.port_down) {
    set_port(port, false);
    port.up_again_ns = plan.port_up_ns > 0 ? kvxfer::now_ns() + plan.port_up_ns : kvxfer::kNever;
    arm(port.up_again_ns);
  }
  if (!port.up || port.cut || port.device->removed) return;
  network.send(std::move(packet), plan, random, kvxfer::now_ns());
}

void Nic::deliver(Packet packet) {
  const Head& head = packet.head;
  QueuePair* const qp = find(head.dest_qpn);
  if (!qp || !qp->port || !qp->port->up || qp->port->cut || qp->port->device->removed) return;
  if (head.src_qpn != qp->attr.dest_qp_num) return;
  const ibv_ah_attr& address = qp->attr.ah_attr;
  if (qp->port->device->infiniband && head.dlid != qp->port->lid) return;
  if (address.is_global) {
    const Gid& own = qp->port->gids[address.grh.sgid_index];
    if (std::memcmp(&own.gid, &head.dgid, sizeof own.gid) != 0 ||
        std::memcmp(&address.grh.dgid, &head.sgid, sizeof own.gid) != 0 ||
        head.gid_type != own.type || !own.reaches(head.sgid))
      return;
  }
  if (qp->state != IBV_QPS_RTR && qp->state != IBV_QPS_RTS && qp->state != IBV_QPS_SQD) return;
  if (is_response(head.kind))
    on_answer(*this, *qp, packet);
  else
    on_request(*this, *qp, packet);
}

bool Nic::serve(QueuePair& qp) {
  if (qp.port && qp.port->device->removed) return false;
  if (qp.flushing && plan.flush) flush(qp);
  const bool more = answer_some(*this, qp, kBudget);
  return send_some(*this, qp, kBudget) || more;
}

bool Nic::round() {
  int64_t now = kvxfer::now_ns();
  network.receive(packets_, kBatch, now);
  for (; !packets_.empty(); packets_.pop_front()) deliver(std::move(packets_.front()));
  for (size_t n = ready_.size(); n > 0; --n) {
    QueuePair* const qp = find(ready_.front());
    ready_.pop_front();
    if (!qp) continue;
    qp->ready = false;
    if (serve(*qp)) wake(*qp);
  }
  network.flush();
  now = kvxfer::now_ns();
  if (now >= next_timer_ns_) {
    next_timer_ns_ = kvxfer::kNever;  // first: what follows may arm it
    arm(timers(now));
    arm(show_completions(now));
  }
  return !ready_.empty() || network.next_due() <= kvxfer::now_ns();
}

// Under the lock, but for the sleep itself.
void Nic::sleep(std::vector<pollfd>& polled) {
  polled.clear();
  polled.push_back({doorbell_, POLLIN, 0});
  network.add_poll(polled);
  const int64_t until = std::min(next_timer_ns_, network.next_due());
  asleep_ = true;
  mutex_.unlock();
  const int64_t left = std::max<int64_t>(0, until - kvxfer::now_ns());
  const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
  ::ppoll(polled.data(), polled.size(), until == kvxfer::kNever ? nullptr : &timeout, nullptr);
  uint64_t rung = 0;
  (void)!::read(doorbell_, &rung, sizeof rung);
  mutex_.lock();
  asleep_ = false;
}

void Nic::run() {
  std::vector<pollfd> polled;
  mutex_.lock();
  for (;;) {
    if (!round()) {
      sleep(polled);
    } else {
      mutex_.unlock();
      // A mutex is not fair: whoever waits for it would starve behind this loop.
      for (int i = 0; i < 16 && waiting_.load(std::memory_order_relaxed) > 0; ++i)
        std::this_thread::yield();
      mutex_.lock();
    }
  }
}

int64_t Nic::timers(int64_t now) {
  int64_t next = kvxfer::kNever;
  // A timer that runs out may end the queue pair, never add or remove one.
  for (const auto& [number, qp] : qps_) {
    if (now >= qp->timer_ns) on_timer(*this, *qp);
    if (qp->paused_until_ns > now)
      next = std::min(next, qp->paused_until_ns);
    else if (qp->paused_until_ns != 0)
      qp->paused_until_ns = 0, wake(*qp);
    next = std::min(next, qp->timer_ns);
  }
  for (const auto& device : devices_)
    for (Port& port : device->ports) {
      if (now >= port.up_again_ns) {
        port.up_again_ns = kvxfer::kNever;
        set_port(port, true);
      }
      next = std::min(next, port.up_again_ns);
    }
  return next;
}

void Nic::tell(Context& context, ibv_async_event event) {
  ++statistics.events;
  context.async.push(event);
}

void Nic::break_qp(QueuePair& qp, std::optional<ibv_event_type> type) {
  if (qp.state == IBV_QPS_ERR || qp.state == IBV_QPS_RESET) return;
  qp.state = IBV_QPS_ERR;
  qp.in_error_since_ns = kvxfer::now_ns();
  qp.timer_ns = kvxfer::kNever;
  qp.answers.clear();
  qp.flushing = true;
  wake(qp);
  if (!type) return;
  ibv_async_event event{};
  event.element.qp = &qp;
  event.event_type = *type;
  tell(context_of(qp.context), event);
}

void Nic::set_port(Port& port, bool up) {
  if (port.up == up) return;
  port.up = up;
  ibv_async_event event{};
  event.element.port_num = port.number;
  event.event_type = up ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR;
  for (const auto& [key, context] : contexts)
    if (context->of == port.device) tell(*context, event);
}

void Nic::remove_device(Device& device) {
  if (device.removed) return;
  device.removed = true;
  ibv_async_event event{};
  event.event_type = IBV_EVENT_DEVICE_FATAL;
  for (const auto& [key, context] : contexts) {
    if (context->of != &device) continue;
    tell(*context, event);
    for (const auto& [unused, cq] : context->cqs) cq->broken.store(true, std::memory_order_release);
  }
}

void Nic::replace_device(Device& removed) {
  for (auto& device : devices_)
    if (device.get() == &removed) {
      // Contexts of the old one are still open.
      gone_.push_back(std::exchange(device, std::make_unique<Device>(plan, removed.index)));
      return;
    }
}

}  // namespace fake_verbs
