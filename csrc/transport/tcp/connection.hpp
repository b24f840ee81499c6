// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One tcp connection: lane 0 for control and small bodies, further lanes for bulk in stripes.
// Sending is done by whoever holds a lane's sending token (a caller of post() or the progress
// thread); receiving by the progress thread alone.
#pragma once

#include <sys/uio.h>

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "transport/tcp/wire.hpp"

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
  // lanes[0] is the control lane, one or more bulk lanes follow; all connected and non-blocking.
  TcpConnection(SessionHost& host, Session session, std::vector<Fd> lanes);
  ~TcpConnection() override;
  void start();  // from here on the reactor drives it

  const Session& session() const noexcept { return session_; }
  bool same_host() const noexcept;
  // Any thread, no system call but a wake-up; in order on lane 0.
  void send_control(ByteView payload) { enqueue(encode_plain(Type::kControl, payload)); }
  void send_ready() { enqueue(encode_plain(Type::kReady, {})); }

  Status post(const RequestPtr& request) noexcept override;
  Cancelled cancel(const RequestPtr& request) noexcept override;
  void close(const Failure& cause) noexcept override;
  void join() noexcept override;
  std::string describe() const override;

 private:
  struct Piecewise {  // where a body continues: a list of pieces and a position in it
    std::vector<iovec> pieces;
    size_t next = 0, offset = 0;
    uint64_t left = 0;
    void clear() noexcept { pieces.clear(), next = offset = 0, left = 0; }
    void add(void* base, size_t nbytes) { pieces.push_back({base, nbytes}), left += nbytes; }
    void advance(uint64_t nbytes) noexcept;
    size_t gather(iovec* out, size_t max, uint64_t max_nbytes) const noexcept;
  };
  // A request of ours that was posted and has not ended.
  struct Flight {
    RequestPtr request;
    bool begun = false;  // a frame of it has been cut
    uint32_t busy = 0;   // threads inside a system call on its local memory
    size_t span = 0;     // cutting continues here
    uint64_t span_done = 0;
    bool cut_all = false;
    uint32_t next_stripe = 0;  // READ
    struct ReadStripe {
      size_t span;
      uint64_t offset;
      uint64_t nbytes;
    };
    std::unordered_map<uint32_t, ReadStripe> reads;
    uint64_t landed = 0;
    enum class Ending : uint8_t { kNone, kEnd, kQuiesce } ending = Ending::kNone;
    Completion completion;
  };
  using FlightPtr = std::shared_ptr<Flight>;
  // A stripe that the peer asked to read.
  struct Serve {
    uint64_t request = 0;
    uint32_t stripe = 0;
    Landing landing;
    std::vector<Target> targets;
    uint32_t nbytes = 0;
    bool dropped = false;
  };
  struct Frame {
    Frame() {}  // clang: an optional of a nested class with initialisers is not constructible else
    Bytes head;
    Piecewise body;
    uint64_t body_nbytes = 0;
    uint64_t sent = 0;
    bool has_trailer = false;
    std::array<std::byte, kTrailerBytes> trailer{};
    Code poison = Code::kOk;  // else: the rest of the body is padding, and the trailer says so
    FlightPtr flight;         // ours
    Landing landing;          // the peer's read, looked at before each system call
    uint64_t served = 0;
    uint64_t size() const noexcept {
      return head.size() + body_nbytes + (has_trailer ? kTrailerBytes : 0);
    }
    void spoil(Code why) noexcept;
    void prepare() noexcept;
    size_t gather(iovec* out) const noexcept;
    void advance(uint64_t nbytes) noexcept;
  };
  // A request of the peer's; progress thread only.
  struct Inbound {
    Landing landing;
    uint64_t total = 0, landed = 0;
    Arrival arrival;
    Op op = Op::kWrite;
    bool seen = false;     // a stripe came
    bool verdict = false;  // refused: told to the peer, the rest drains
    bool aborted = false;
    size_t num_aborts = 0;
  };
  using InboundPtr = std::shared_ptr<Inbound>;
  enum class Phase : uint8_t { kHead, kControl, kBody, kTrailer };
  struct Lane {
    uint32_t index = 0;
    Fd fd;
    Reactor::Token token = 0;
    // Sending; under mutex_, except what the token's holder does with `current` in a system call.
    std::deque<Frame> queue;
    std::optional<Frame> current;
    bool sending = false, again = false, serve_turn = false;
    // Receiving; progress thread only.
    Phase phase = Phase::kHead;
    Bytes buffer;
    size_t begin = 0, end = 0;
    Head head;
    StripeHead stripe;
    Piecewise body;
    InboundPtr inbound;
    FlightPtr reading;
    Flight::ReadStripe read_stripe{};
    uint32_t aborts_seen = 0;
    bool paused = false;  // holds a stripe that another lane's ABORTs must come before
    size_t buffered() const noexcept { return end - begin; }
  };
  struct LaneHandler;
  struct Deliveries;
  enum class Step : uint8_t { kAgain, kBlocked, kFailed };

  // connection.cpp: sending
  void enqueue(Bytes frame);
  void queue_locked(uint32_t lane, Bytes frame);
  void pump(Lane& lane, size_t budget) noexcept;
  void pump_soon(Lane& lane);
  bool next_frame(Lane& lane);
  bool cut_write(Lane& lane, const FlightPtr& flight);
  void cut_reads();
  bool cut_serve(Lane& lane, Serve& serve);
  void finish(const FlightPtr& flight, Flight::Ending ending, Completion completion,
              Deliveries& out);
  void abort_locked(const FlightPtr& flight);
  void room_locked(Deliveries& out);
  void deliver(Deliveries& deliveries) noexcept;
  void buried() noexcept;

  // receive.cpp: progress thread
  void receive(Lane& lane) noexcept;
  Step step(Lane& lane);
  Step fill(Lane& lane, size_t need);
  Step receive_body(Lane& lane);
  Step protocol_error(std::string text);
  Step stream_ended(Lane& lane, int err);
  Step on_head(Lane& lane);
  Step on_control(Lane& lane, ByteView control);
  Step on_stripe(Lane& lane, ByteView control);
  Step on_stripe_end(Lane& lane, Code trailer);
  Step on_read(Lane& lane, ByteView control);
  Step on_read_data(Lane& lane, ByteView control);
  Step on_read_data_end(Lane& lane, Code trailer);
  Step on_verdicts(Lane& lane, ByteView control);
  Step on_abort(Lane& lane);
  void refuse(uint64_t request, Inbound& inbound, const Failure& failure);
  void flush_acks();

  SessionHost& host_;
  const Session session_;
  std::vector<std::unique_ptr<Lane>> lanes_;

  mutable std::mutex mutex_;  // over all below; never held across a system call that moves data
  std::unordered_map<uint64_t, FlightPtr> flights_;
  // Cancelled after they had begun: the owner's verdict is still to come.
  std::unordered_map<uint64_t, RequestPtr> zombies_;
  std::deque<FlightPtr> small_jobs_, bulk_jobs_, read_jobs_;
  std::deque<Serve> serves_;
  uint32_t reads_outstanding_ = 0;
  uint32_t cancel_count_ = 0;
  bool dead_ = false, want_room_ = false, started_ = false;
  Failure cause_;

  // Progress thread only.
  std::unordered_map<uint64_t, InboundPtr> inbound_;
  std::vector<uint64_t> acks_;
  uint32_t serves_pending_ = 0;  // under mutex_
};

}  // namespace kvxfer::tcp
