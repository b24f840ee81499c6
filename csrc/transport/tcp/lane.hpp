// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What a tcp connection is made of: lanes, the frames they send, requests of both sides.
// Who may touch what is said in connection.hpp and docs/thread_model.md.
#pragma once

#include <sys/uio.h>

#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "transport/tcp/stream.hpp"
#include "transport/tcp/wire.hpp"

namespace kvxfer::tcp {

inline constexpr size_t kMaxIov = 1024;           // pieces of one system call (IOV_MAX)
inline constexpr size_t kTurn = 2 * 1024 * 1024;  // bytes of a lane, then the others get a look

// A body: a list of pieces of memory and a position in it.
struct Piecewise {
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
  uint32_t unsent = 0;       // frames that were cut and have not left as a whole
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
  bool dropped = false;
};

// Head and control bytes, body, trailer: cut once, sent in as many system calls as it takes, and
// used again with its buffers.
struct Frame {
  Bytes head;
  Piecewise body;
  uint64_t body_nbytes = 0;
  uint64_t sent = 0;
  bool has_trailer = false;
  std::array<std::byte, kTrailerBytes> trailer{};
  Code poison = Code::kOk;   // else: the rest of the body is padding, and the trailer says so
  FlightPtr flight;          // ours
  Landing landing;           // the peer's read, looked at before each system call
  size_t answer_nbytes = 0;  // what it counts for in answers_nbytes_ while it is queued
  // Of the sending token's holder: this system call reads the body, inside the gates of `landing`.
  bool reads_body = false, inside = false, told = false;

  uint64_t size() const noexcept {
    return head.size() + body_nbytes + (has_trailer ? kTrailerBytes : 0);
  }
  void reset() noexcept;
  // Only a note: the token's holder may be inside a system call on these very bytes.
  void spoil(Code why) noexcept;
  void set_trailer(Code code) noexcept;
  // What is left to send, as far as it fits; true: all of it.
  bool gather(iovec* out, size_t max, size_t& count) noexcept;
  void advance(uint64_t nbytes) noexcept;
};
using FramePtr = std::unique_ptr<Frame>;

// A request of the peer's; progress thread only.
struct Inbound {
  Landing landing;
  uint64_t total = 0, landed = 0;
  Arrival arrival;
  Op op = Op::kWrite;
  bool seen = false;     // a stripe came
  bool verdict = false;  // refused: told to the peer, the rest drains
  bool aborted = false;
  bool holds_notify = false;  // counted in notifies_held_
  size_t num_aborts = 0;
};
using InboundPtr = std::shared_ptr<Inbound>;

struct Lane {
  uint32_t index = 0;
  StreamPtr stream;
  Reactor::Token token = 0;

  // Sending. `queue` is under the connection's mutex; `out` is changed by the holder of the token
  // under the mutex, and read without it by the holder alone.
  std::deque<FramePtr> queue, out;
  uint64_t out_nbytes = 0;  // unsent in `out`
  bool sending = false, again = false, serve_turn = false;

  // Receiving; progress thread only.
  enum class Phase : uint8_t { kHead, kControl, kBody, kTrailer } phase = Phase::kHead;
  Bytes buffer;
  size_t begin = 0, end = 0;
  // The last read took less than there was room for: an event will tell of more. Not so once it has
  // hung up, which an event tells of only once, together with the last bytes perhaps.
  bool drained = false, hung_up = false;
  Head head;
  StripeHead stripe;
  size_t last_control = 0;  // control bytes of the last frame with a body: a good guess of the next
  Piecewise body;
  InboundPtr inbound;
  FlightPtr reading;
  Flight::ReadStripe read_stripe{};
  uint32_t aborts_seen = 0;
  bool paused = false;  // holds a stripe that another lane's ABORTs must come before
  size_t buffered() const noexcept { return end - begin; }
};

}  // namespace kvxfer::tcp
