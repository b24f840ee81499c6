// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One tcp connection: lane 0 for control and small bodies, further lanes for bulk in stripes.
// Sending is done by whoever holds a lane's sending token (a caller of post() or the progress
// thread; under TLS the progress thread alone); receiving by the progress thread.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "transport/tcp/lane.hpp"

namespace kvxfer::tcp {

class TcpConnection;

// What the tcp transport needs of the engine beyond Host, because it carries the session itself.
class SessionHost : public Host {
 public:
  // Acceptor: authenticated, all lanes are there. False: not wanted (closing).
  virtual bool opened(const std::shared_ptr<TcpConnection>& connection) noexcept = 0;
  // A CONTROL payload; false: malformed, which ends the connection.
  virtual bool control(TcpConnection& from, ByteView payload) noexcept = 0;
  virtual void ready(TcpConnection& from) noexcept = 0;
  // What our other transports offer to a peer that wants to attach.
  virtual Bytes offers() = 0;
  // A stranger was turned away; kept for stats().
  virtual void turned_away(const std::string& address, const std::string& reason) noexcept = 0;
};

class TcpConnection final : public Connection {
 public:
  // lanes[0] is the control lane, one or more bulk lanes follow.
  TcpConnection(SessionHost& host, Session session, std::vector<StreamPtr> lanes);
  ~TcpConnection() override;
  void start();  // from here on the reactor drives it

  const Session& session() const noexcept { return session_; }
  bool same_host() const noexcept;
  // Any thread, no system call but a wake-up; in order on lane 0.
  void send_control(ByteView payload) { enqueue(encode_plain(Type::kControl, payload)); }
  // The same, sent by the caller itself, who holds no lock.
  void send_control_now(ByteView payload);
  void send_ready() { enqueue(encode_plain(Type::kReady, {})); }

  Status post(const RequestPtr& request) noexcept override;
  Cancelled cancel(const RequestPtr& request) noexcept override;
  void close(const Failure& cause) noexcept override;
  void join() noexcept override;
  std::string describe() const override;
  std::string condition() const override;

 private:
  struct LaneHandler;
  struct Deliveries;
  enum class Step : uint8_t { kAgain, kBlocked, kFailed };

  // connection.cpp: life and ends
  void finish(const FlightPtr& flight, Flight::Ending ending, Completion completion,
              Deliveries& out);
  void abort_locked(const FlightPtr& flight);
  void spoil_locked(const FlightPtr& flight);
  void room_locked(Deliveries& out);
  void deliver(Deliveries& deliveries) noexcept;
  void buried() noexcept;

  // sending.cpp
  void enqueue(Bytes frame);
  void queue_locked(uint32_t lane, Bytes frame);
  void answer(Bytes frame);
  void answer_locked(FramePtr frame);
  void pump(Lane& lane, size_t budget) noexcept;
  void pump_soon(Lane& lane);
  void pump_all_soon();
  FramePtr new_frame();
  FramePtr new_frame(Bytes head);
  void recycle(FramePtr frame);
  void fill_out(Lane& lane);
  FramePtr next_frame(Lane& lane);
  FramePtr cut_write(const FlightPtr& flight);
  FramePtr cut_serve(Serve& serve);
  void cut_reads();
  size_t enter_out(Lane& lane, iovec* iov, std::span<Frame*> frames, size_t& num_frames);
  void leave_out(Lane& lane, std::span<Frame* const> frames, uint64_t nbytes, Deliveries& out);

  // receive.cpp: progress thread
  void receive(Lane& lane) noexcept;
  void receive_soon(Lane& lane);
  Step step(Lane& lane);
  Step fill(Lane& lane, size_t need);
  Step receive_body(Lane& lane);
  ssize_t store_body(Lane& lane, bool store, int& err);
  Step protocol_error(std::string text);
  Step stream_ended(Lane& lane, int err);
  Step on_head(Lane& lane);
  Step on_control(Lane& lane, ByteView control);

  // owner.cpp: what the peer asks of us
  Step on_stripe(Lane& lane, ByteView control);
  Step on_stripe_end(Lane& lane, Code trailer);
  Step on_abort(Lane& lane);
  Step on_read(Lane& lane, ByteView control);
  void refuse(uint64_t request, Inbound& inbound, const Failure& failure);
  void drop_notify(Inbound& inbound);
  void flush_acks();

  // initiator.cpp: what the peer says to our requests
  Step on_read_data(Lane& lane, ByteView control);
  Step on_read_data_end(Lane& lane, Code trailer);
  Step on_acks(ByteView control);
  Step on_refuse(Lane& lane, ByteView control);

  // liveness.cpp
  void watch_peer();
  void look_after() noexcept;
  std::optional<Failure> unreachable(int64_t now) const;

  SessionHost& host_;
  const Session session_;
  std::vector<std::unique_ptr<Lane>> lanes_;

  mutable std::mutex mutex_;  // over all below; never held across a system call that moves data
  std::unordered_map<uint64_t, FlightPtr> flights_;
  // Cancelled after they had begun: the owner's verdict is still to come.
  std::unordered_map<uint64_t, RequestPtr> zombies_;
  std::deque<FlightPtr> small_jobs_, bulk_jobs_, read_jobs_;
  std::deque<Serve> serves_;
  uint32_t serves_pending_ = 0;
  std::vector<FramePtr> spare_frames_;
  StripeHead cutting_;  // reused, so that a stripe is cut without an allocation
  uint32_t reads_outstanding_ = 0;
  uint32_t cancel_count_ = 0;
  size_t answers_nbytes_ = 0;  // of frames that wait on lane 0 because the peer asked for something
  bool dead_ = false, want_room_ = false, started_ = false;
  bool watched_ = false;  // look_after() is due
  Failure cause_;

  // Written by the progress thread; condition() reads pinged_ns_ from any. Alone, so relaxed.
  int64_t heard_ns_ = 0;
  std::atomic<int64_t> pinged_ns_{0};  // the first PING without an answer; 0: none

  // Progress thread only.
  std::unordered_map<uint64_t, InboundPtr> inbound_;
  uint32_t notifies_held_ = 0;  // of requests that lack bytes
  std::vector<uint64_t> acks_;
  bool acks_wait_ = true;  // all of them are of bare notifications: an answer may take them along
};

}  // namespace kvxfer::tcp
