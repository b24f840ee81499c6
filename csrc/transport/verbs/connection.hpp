// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One verbs connection: three queue pairs over one completion queue.
//
//   control  messages, both ways (Channel)
//   pull     our RDMA READs of the peer's memory (PullQueue)
//   source   answers the peer's READs of ours: no work of ours is ever posted on it
//
// A failed pull queue pair, or a source that must be taken away from a peer that does not answer,
// is replaced by a pair of fresh ones (replace.cpp); the other direction and the messages go on.
// docs/verbs.md has the protocol and what each completion proves.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "transport/verbs/channel.hpp"
#include "transport/verbs/completion_queue.hpp"
#include "transport/verbs/incoming.hpp"
#include "transport/verbs/outgoing.hpp"
#include "transport/verbs/pull_queue.hpp"

namespace kvxfer::verbs {

// What a side must know of the other's queue pairs; travels in the join.
struct Ends {
  QpEnd control, pull, source;
  uint32_t num_buffers = 0;
  uint8_t served = 0, issued = 0;  // RDMA READs in flight: as their responder, as their requester
  uint16_t reserved = 0;
};

class VerbsConnection final : public Connection, public Pollable {
 public:
  VerbsConnection(Host& host, std::shared_ptr<Device> device, MemoryTable& memory);  // throws
  ~VerbsConnection() override;
  const Ends& ends() const noexcept { return ends_; }    // as they were in the beginning
  void connect(const Route& route, const Ends& remote);  // throws
  // Before start(): reads the peer's incarnation. Empty when it came; else why not.
  std::optional<std::string> try_read(uint64_t address, uint32_t rkey, Incarnation& out,
                                      int64_t deadline_ns);
  void start();  // from here on the reactor drives it

  Status post(const RequestPtr& request) noexcept override;
  Cancelled cancel(const RequestPtr& request) noexcept override;
  void close(const Failure& cause) noexcept override;
  void join() noexcept override {}  // only the progress thread, which the engine joins, works here
  std::shared_ptr<Pollable> pollable() noexcept override { return self(); }
  bool poll() override;
  bool doze() override;
  void awake() override {}
  std::string describe() const override;
  std::string condition() const override;

  // An event of the device that names one of our queue pairs; false: not ours. Progress thread.
  bool on_queue_pair_event(uint32_t number, const char* event);

 private:
  // A flush takes microseconds; a device that does not do it is gone, and to destroy is all there
  // is.
  static constexpr int64_t kFlushNs = 100'000'000;
  struct ChannelHandler;

  std::shared_ptr<VerbsConnection> self() {
    return std::static_pointer_cast<VerbsConnection>(shared_from_this());
  }
  bool is_dead() const noexcept { return dead_.load(std::memory_order_relaxed); }
  bool step();
  bool take_completions();
  void handle(const ibv_wc& completion);
  void on_read(const ibv_wc& completion);
  void on_message(Type type, ByteView body);
  void on_queue_pairs(Type type, ByteView body);
  void drain(std::initializer_list<uint64_t> markers, int64_t bound_ns);
  void deliver(ChunkPtr chunk, ibv_wc_status status);
  void die(const Failure& cause);
  void broken(const char* what);
  void control_failed(const ibv_wc& completion);

  // replace.cpp
  void break_pulls(bool counts);
  void stop_pulls();
  void close_pulls();
  void replace_source();
  void check_answers() noexcept;
  void check_gates();
  void watch_answers(int64_t when_ns);
  void watch_gates();

  Host& host_;
  const std::shared_ptr<Device> device_;
  CompletionQueue completions_;
  Channel channel_;
  PullQueue pulls_;
  Incoming incoming_;
  Outgoing outgoing_;
  QpPtr source_;
  Ends ends_;
  Route route_;
  uint32_t source_psn_ = 0;
  uint8_t served_, issued_;

  std::mutex mutex_;  // dead_ changes under it, so that close() and start() agree
  std::atomic<bool> dead_{false};
  std::atomic<bool> answers_watched_{false};  // check_answers() is due
  // What is being replaced, for condition(): written by the progress thread, relaxed.
  std::atomic<bool> pulls_broken_{false}, source_gone_{false};
  std::atomic<uint32_t> num_replaced_{0};  // for describe(); relaxed

  // Progress thread only.
  std::deque<ibv_wc> held_;  // taken while something else was waited for
  bool pull_failed_ = false, stopping_pulls_ = false;
  std::deque<std::pair<ChunkPtr, ibv_wc_status>> parked_;
  bool gates_watched_ = false;
  Reactor::TimerId gates_timer_ = Reactor::kNoTimer;
  uint32_t num_breaks_ = 0;    // since a chain last came through
  uint32_t source_epoch_ = 0;  // of ours
  uint32_t peer_epoch_ = 0;    // of the peer's source
  bool serving_ = true;        // our source is connected
  std::string last_error_;     // of a post that failed, or an event
  Bytes body_;
  Reactor::Token token_ = 0;
};

}  // namespace kvxfer::verbs
