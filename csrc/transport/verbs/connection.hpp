// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One verbs connection: messages over the control queue pair of one of its rails (Channel), and
// READs over the pull and source queue pairs of all of them (rail.hpp).
//
// Where both engines push, writes under leases go through windows instead (push_pairs.cpp).
//
// A rail that fails is stopped, what it had in flight is posted on others, and it is used again
// when a READ has come over fresh queue pairs (replace.cpp). Messages move to another rail
// (control_pairs.cpp). The connection ends when no rail is left for READs, or for messages.
// docs/verbs.md has the protocol and what each completion proves.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "transport/verbs/channel.hpp"
#include "transport/verbs/incoming.hpp"
#include "transport/verbs/outgoing.hpp"
#include "transport/verbs/rail.hpp"

namespace kvxfer::verbs {

// What a side must know of the other's queue pairs; travels in the join.
struct Ends {
  uint32_t num_buffers = 0;
  uint64_t word = 0;  // where the incarnation stands, to be read by whoever tries a rail
  std::vector<RailEnd> rails;
};

// Who has asked for the connection.
enum class Side : uint8_t { kConnecting, kAccepting };

class VerbsConnection final : public Connection, public Pollable {
 public:
  // Over these devices, in this order. `why_no_push`: why it neither pushes nor gives windows, or
  // empty. Throws.
  VerbsConnection(Host& host, const Devices& devices, bool by_nearness, MemoryTable& memory,
                  std::string why_no_push);
  // Whether devices have completion queues that are long enough for pushes; or why not.
  static std::string refuse_push(const Devices& devices);
  ~VerbsConnection() override;
  Ends ends() const;  // as they were in the beginning, but for what concerns the word
  // Throws.
  void connect(Side side, const std::vector<Route>& routes, const Ends& remote,
               const Incarnation& peer);
  // Ports that belong to no rail, for describe(); before start().
  void note_unpaired(std::string text) { unpaired_ = std::move(text); }
  // Before start(): reads the peer's incarnation over the first rail. Empty when it came; else why
  // not.
  std::optional<std::string> try_first(int64_t deadline_ns);
  void start();  // from here on the reactor drives it

  std::optional<std::string> refuses(const Request& request) const override;
  bool reaches_gpus() const noexcept override { return true; }
  Status post(const RequestPtr& request) noexcept override;
  Cancelled cancel(const RequestPtr& request) noexcept override;
  void close(const Failure& cause) noexcept override;
  void lease_closed() noexcept;     // of any peer; any thread
  void join() noexcept override {}  // only the progress thread, which the engine joins, works here
  std::shared_ptr<Pollable> pollable() noexcept override { return self(); }
  bool poll() override;
  bool doze() override;
  void awake() override {}
  std::string describe() const override;
  std::string condition() const override;

  // What each rail has carried: chains of READs that came through, and their bytes. Any thread.
  struct Carried {
    uint64_t chains = 0, nbytes = 0;
    uint32_t puller = 0;  // number of the queue pair that reads now
    bool in_use = false;
    // What we have pushed; numbers of the queue pairs that push, and that take the peer's.
    uint64_t chains_pushed = 0, nbytes_pushed = 0;
    uint32_t pusher = 0, sink = 0;
    bool pushing = false;
    // Its queue pair for messages, once joined to the peer's, or 0; and whether that is the one
    // that carries them.
    uint32_t control = 0;
    bool carries_messages = false;
  };
  std::vector<Carried> carried() const;

  // Events of a device. Progress thread. False: it is not one of our queue pairs.
  bool on_queue_pair_event(const Device& device, uint32_t number, const char* event);
  void on_port_event(const Device& device, bool up, const std::string& event);

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
  bool take_completions(Rail& rail);
  void handle(Rail& rail, const ibv_wc& completion);
  void on_read(Rail& rail, const ibv_wc& completion);
  void on_message(Type type, ByteView body);
  void on_queue_pairs(Type type, ByteView body);
  void drain(Rail& rail, std::initializer_list<uint64_t> markers);
  void deliver(Rail& rail, ChunkPtr chunk, ibv_wc_status status);
  void die(const Failure& cause);
  void broken(const char* what);

  // control_pairs.cpp
  void on_control(Rail& rail, const ibv_wc& completion);
  bool take_messages();
  void control_failed(Rail& rail, const Failure& why);
  void move_messages(const Failure& why);
  void on_resume(const Resume& resume);
  void drop_control(Rail& rail);
  void renew_control(Rail& rail);
  void connect_control(Rail& rail, const QpEnd& there);  // throws
  void tell_control(const Rail& rail, const QpEnd& end);
  void on_new_control(Rail& rail, const QpHead& head);

  // replace.cpp
  enum class Why : uint8_t { kFailed, kWanted };  // it failed, or we want back what it has
  void break_pulls(Rail& rail, Why why);
  void stop_pulls(Rail& rail);
  void close_pulls(Rail& rail);
  void ask_for_source(Rail& rail);
  void ask_again(Rail& rail);  // when its pause is over
  void probe(Rail& rail);
  void on_probed(Rail& rail, ChunkPtr chunk, ibv_wc_status status);
  void replace_source(Rail& rail);
  void withdraw_source(Rail& rail);
  void tell_sources();
  bool end_if_none_left(const Rail& failed);
  void on_new_source(Rail& rail, const QpHead& head);
  void on_new_puller(Rail& rail, const QpHead& head);
  void check_answers() noexcept;
  void check_pushes();
  void check_gates();
  void watch_answers(int64_t when_ns);
  void watch_gates();

  // push_pairs.cpp
  bool on_push_message(Type type, ByteView body);
  void on_written(Rail& rail, const ibv_wc& completion);
  void on_sink(Rail& rail, const ibv_wc& completion);
  bool step_pushes();
  bool make_sinks(std::string& why_not);
  void replace_sink(Rail& rail);
  void stop_sink(Rail& rail);
  void stop_writer(Rail& rail);
  void break_writer(Rail& rail, Why why, const std::string& what);
  void ask_for_sink(Rail& rail);
  void note_break(Rail& rail, const std::string& what);
  void tell_credit(Rail& rail, Type type, const std::vector<uint32_t>& held);
  bool on_ask_window(ByteView body);
  bool on_new_sink(ByteView body);
  bool on_new_pusher(ByteView body);
  bool on_sink_ready(ByteView body);
  void look_at_windows();
  void on_push_port(Rail& rail, bool up);
  void stop_pushes();  // the connection dies

  Host& host_;
  const MemoryTable& memory_;
  const std::string why_no_push_;
  Rails rails_;
  Channel channel_;
  Windows windows_;
  Incoming incoming_;
  Outgoing outgoing_;
  Side side_ = Side::kConnecting;
  uint64_t peer_word_ = 0;
  Incarnation peer_{};
  std::string unpaired_;

  std::mutex mutex_;  // dead_ changes under it, so that close() and start() agree
  std::atomic<bool> dead_{false};
  std::atomic<bool> answers_watched_{false};  // check_answers() is due
  // A lease has ended, of which there may be a window. Written by who ended it, before it wakes the
  // progress thread, which reads it: relaxed would do, since the gate itself is what is looked at.
  std::atomic<bool> look_at_gates_{false};

  // Progress thread only.
  bool gates_watched_ = false, windows_watched_ = false;
  Reactor::TimerId gates_timer_ = Reactor::kNoTimer, windows_timer_ = Reactor::kNoTimer;
  Bytes body_;
};

}  // namespace kvxfer::verbs
