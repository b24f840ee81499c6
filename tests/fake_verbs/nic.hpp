// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// All NICs of this process: one lock, one thread that plays the hardware, and what both sides of
// the PCIe bus share.
//
// Everything that the NIC does to user memory it does under the lock, before the completion that
// tells of it is put into its queue under the same lock: what a user may look at after polling
// happened before. Whoever looks earlier has a data race, as he would have with hardware.
#pragma once

#include <poll.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device.hpp"
#include "fake_verbs.h"
#include "network.hpp"
#include "plan.hpp"

namespace fake_verbs {

struct Statistics {
  uint64_t work_requests = 0, doorbells = 0, receives = 0, packets = 0, retransmissions = 0;
  uint64_t inlined = 0, dirty_destroys = 0;
  uint64_t failed_calls = 0, timeouts = 0, rnr_naks = 0, completions = 0, events = 0, binds = 0,
           bytes_placed = 0;
};

class Nic {
 public:
  // Never destroyed: its thread runs until the process ends.
  static Nic& get();

  // The user's side of the lock. The NIC's thread makes way for it.
  class Lock {
   public:
    explicit Lock(Nic& nic) : nic_(&nic) {
      nic.waiting_.fetch_add(1, std::memory_order_relaxed);
      nic.mutex_.lock();
      nic.waiting_.fetch_sub(1, std::memory_order_relaxed);
    }
    Lock(Lock&& other) noexcept : nic_(std::exchange(other.nic_, nullptr)) {}
    ~Lock() {
      if (nic_) nic_->mutex_.unlock();
    }

   private:
    Nic* nic_;
  };
  Lock lock() { return Lock(*this); }

  // -- All of the following under the lock.
  void set_plan(const Plan& next);
  const std::vector<std::unique_ptr<Device>>& devices();  // the plan's first; never fewer again
  // An errno for this call of a verb: the device is gone, or the plan says so. 0: go on.
  int refuse(const char* verb, const Device& device);
  bool hit(double probability);
  int64_t within(int64_t up_to_ns);
  int limit(int stated) const { return static_cast<int>(stated * plan.lie); }

  uint32_t add(QueuePair& qp);  // its number; 0: too many
  void remove(QueuePair& qp);
  void note_end(const QueuePair& qp);  // its user destroys it, or takes its work away
  QueuePair* find(uint32_t qpn);
  // Something to send, answer or flush.
  void wake(QueuePair& qp);
  void arm(int64_t at_ns);            // look at timers then at the latest
  void count_request(QueuePair& qp);  // one was posted
  // What the plan ends it with.
  std::optional<ibv_wc_status> doom(const QueuePair& qp, bool is_read);

  void send(QueuePair& qp, Packet packet);
  void complete(CompletionQueue& cq, Cqe cqe);
  int poll(CompletionQueue& cq, int most, ibv_wc* out);
  // Once round everything. False: nothing is left that can be done now.
  bool round();
  void tell(Context& context, ibv_async_event event);
  // The queue pair breaks by itself: ERR, an event when there is one to tell.
  void break_qp(QueuePair& qp, std::optional<ibv_event_type> event);
  void set_port(Port& port, bool up);
  void remove_device(Device& device);
  void replace_device(Device& removed);
  // No event or completion of this one is left anywhere.
  void forget(QueuePair& qp);
  void forget(CompletionQueue& cq);

  Plan plan;
  int devices_at_start = 1;  // as KVXFER_FAKE_VERBS has it; written before there is a second thread
  bool by_hand = false;      // likewise
  fake_verbs_tamperer tamper = nullptr;
  std::mt19937_64 random;
  Network network;
  Statistics statistics;
  std::unordered_map<const void*, std::unique_ptr<Context>> contexts;
  uint64_t locked_bytes = 0;
  uint64_t num_registered = 0;   // calls under this plan
  uint64_t num_registering = 0;  // of which so many are held
  uint64_t polls = 0;
  std::atomic<bool> every_poll_counts{false};  // the plan has something to do at one of them
  // Asked for by a test, for the next request of a QP.
  std::unordered_map<uint32_t, ibv_wc_status> doomed;

 private:
  Nic();
  void start();
  void forked();
  void run();
  void sleep(std::vector<pollfd>& polled);
  void deliver(Packet packet);
  bool serve(QueuePair& qp);  // true: there is more
  void flush(QueuePair& qp);
  int64_t timers(int64_t now);
  int64_t show_completions(int64_t now);
  void show(CompletionQueue& cq);

  std::mutex mutex_;
  std::atomic<int> waiting_{0};  // users at the lock; relaxed: a hint
  bool started_ = false, asleep_ = false;
  int doorbell_ = -1;
  int64_t next_timer_ns_ = kvxfer::kNever;
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<Device>> gone_;  // removed and replaced; in a child, its parent's
  std::unordered_map<uint32_t, QueuePair*> qps_;
  uint32_t next_qp_ = 0;
  std::deque<uint32_t> ready_;  // QP numbers: the pair may be gone by then
  uint64_t wr_count_ = 0, packet_count_ = 0;
  std::unordered_map<std::string, uint64_t> calls_;
  size_t error_turn_ = 0;
  std::deque<Packet> packets_;  // scratch of round()
};

}  // namespace fake_verbs
