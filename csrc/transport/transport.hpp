// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The contract between the engine and its transports: plain data first, then three interfaces.
//
//   Transport   what is compiled in: probes itself, exposes regions, attaches to a peer's session
//   Connection  one per (peer incarnation, transport): carries requests
//   Host        the engine as a transport sees it: judges incoming requests, takes completions
//
// The tcp transport makes the authenticated session and its control lane; any other transport
// *attaches* to a session that exists, by an offer that travelled inside it.
// Set-up may throw kvxfer::Error. post, cancel and everything called on the progress thread do not.
// No lock is held across a copy, a system call that can block, or a call into the Host.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/error.hpp"
#include "common/patience.hpp"
#include "common/status.hpp"
#include "common/wire.hpp"
#include "transport/copy_pool.hpp"
#include "transport/reactor.hpp"
#include "transport/region.hpp"

namespace kvxfer {

// ---------------------------------------------------------------- limits, the same for every
// transport
inline constexpr uint32_t kMaxNotificationBytes = 48 * 1024;
inline constexpr uint32_t kMaxTokenBytes = 128;
inline constexpr uint32_t kMaxRegions = 4096;   // announced by one engine
inline constexpr uint32_t kMaxTags = 65536;     // arrival tags without a lease, per peer
inline constexpr uint32_t kNotifyWindow = 256;  // notifications a peer may have undrained
inline constexpr uint32_t kMaxInFlight = 1024;  // requests posted and not ended, per connection
inline constexpr uint32_t kMaxSpanBytes = 1u << 30;  // longer ones are cut by the engine
// From an authenticated session to its READY; a transport that attaches later is worth nothing.
inline constexpr double kReadyTimeoutS = 10.0;

// ---------------------------------------------------------------- a request, on the initiator's
// side
enum class Op : uint8_t { kWrite = 0, kRead = 1, kNotify = 2 };

// Offsets in regions; pointers never leave a process.
struct Span {
  uint64_t local = 0, remote = 0;
  uint32_t nbytes = 0;
  uint32_t index = 0;  // in the caller's arrays, for error messages
};

struct RegionRef {
  uint64_t id = 0;
  Key key{};
};
struct LeaseRef {
  uint64_t id = 0;  // 0: no lease
  Key key{};
};

// kHeld: waits for what `after=` names.
enum class State : uint8_t { kHeld, kQueued, kPosted, kDone, kFailed, kTimedOut, kCancelled };

// Immutable once posted. Owned jointly by the engine's handle and the connection that carries it;
// engine/transfer.hpp adds the state word and the waiters.
struct Request {
  virtual ~Request() = default;
  uint64_t id = 0;  // unique in this engine, increasing
  Op op = Op::kWrite;
  std::shared_ptr<Region> local;  // null for kNotify
  RegionRef remote;
  LeaseRef lease;
  std::vector<Span> spans;  // empty for kNotify; a write or read may have none
  uint64_t nbytes = 0;
  bool has_notify = false, has_arrival = false;
  Bytes notify;
  uint64_t arrival = 0;          // with a lease: index of the set; without: tag of the count
  int64_t deadline_ns = kNever;  // kept by the engine; a transport may use it as advice
};
using RequestPtr = std::shared_ptr<Request>;

// How a posted request ended. `failure` is set unless ok.
struct Completion {
  bool ok = true;
  uint64_t nbytes = 0;  // known to have landed
  Failure failure;
  bool agreed = true;  // false: the connection broke, and the peer may or may not have taken it
};

// What cancel() can promise about the other side.
enum class Agreement : uint8_t {
  kStopped,          // the target can never accept it: agreed
  kAlreadyAccepted,  // too late, the target took it: the transfer is done
  kUnknown,          // it may or may not land as a whole (a peer behind a network)
  kEnding,           // nothing was cancelled: Host::ended is on its way
};
struct Cancelled {
  Agreement agreement = Agreement::kUnknown;
  // True: local memory is no longer touched. False: Host::quiesced follows.
  bool quiesced = false;
};

// ---------------------------------------------------------------- an incoming request, on the
// owner's side
struct Access {
  Op op = Op::kWrite;
  RegionRef region;
  LeaseRef lease;
  std::optional<uint64_t> arrival;  // what will be set or counted: judged before a byte lands
};
struct Target {  // one descriptor: offset in the owner's region
  uint64_t offset = 0;
  uint32_t nbytes = 0;
};

// What an admitted request holds while it lands. The copier brackets each chunk (<= 256 KiB, or one
// non-blocking system call) with enter() and leave(); after enter() returned false nothing more may
// be stored (write) or sent (read), and the rest goes to a sink.
struct Landing {
  std::shared_ptr<Region> region;  // null for a notification without a lease
  std::shared_ptr<Lease> lease;    // null without one

  bool enter() noexcept {
    if (region && !region->gate.enter()) return false;
    if (lease && !lease->gate.enter()) {
      if (region) region->gate.leave();
      return false;
    }
    return true;
  }
  void leave() noexcept {
    if (lease) lease->gate.leave();
    if (region) region->gate.leave();
  }
  // Every descriptor inside the region and, where there is a lease, inside its spans. `first` is
  // the number of the first descriptor within the request.
  std::optional<Failure> check(std::span<const Target> targets, uint64_t first) const;
  // Why enter() said no.
  Failure closed() const;
};

struct Arrival {  // what becomes visible once all bytes of a request have landed
  bool has_notify = false, has_arrival = false;
  Bytes notify;
  uint64_t arrival = 0;
  uint64_t nbytes = 0;
  // Where cancel can be decided exactly (shm's slot word): Host::accept calls it inside the gates,
  // before it counts or shows anything; false means the initiator cancelled first, and accept fails
  // with Code::kCancelled. Empty: nothing to agree on.
  std::function<bool()> commit;

  std::optional<uint64_t> number() const {
    return has_arrival ? std::optional(arrival) : std::nullopt;
  }
};

// ---------------------------------------------------------------- identity
struct HostIdentity {
  std::string boot_id;  // a hint only: cloned virtual machines share it
  uint64_t net_ns = 0, pid_ns = 0;
  uint32_t uid = 0, pid = 0;
};

struct PeerIdentity {
  std::string name, address;  // address: where it listens, "host:port"
  Incarnation incarnation{};
  HostIdentity host;
};

// An authenticated session. Transports that attach prove that they belong to it by
// HMAC(key, label ‖ id ‖ what they add).
struct Session {
  Key id{};
  std::array<std::byte, 32> key{};
  PeerIdentity peer;
  bool initiator = false;  // we connected
};

// ---------------------------------------------------------------- counters, written with relaxed
// adds
struct Counters {
  std::atomic<uint64_t> bytes_written{0};    // ours, accepted by the peer
  std::atomic<uint64_t> bytes_read{0};       // ours, landed here
  std::atomic<uint64_t> bytes_received{0};   // the peer's writes, landed here
  std::atomic<uint64_t> bytes_served{0};     // the peer's reads, sent from here
  std::atomic<uint64_t> bytes_sunk{0};       // arrived for a refused, revoked or ended request
  std::atomic<uint64_t> requests{0};         // ours, posted
  std::atomic<uint64_t> requests_served{0};  // the peer's, accepted
  std::atomic<uint64_t> refused{0};          // the peer's, refused by us
  std::atomic<uint64_t> notifications_sent{0}, notifications_received{0};

  // A request of ours, or of the peer's, that carried all its bytes.
  void carried(Op op, uint64_t nbytes) noexcept {
    (op == Op::kRead ? bytes_read : bytes_written).fetch_add(nbytes, std::memory_order_relaxed);
  }
  void served(Op op, uint64_t nbytes) noexcept {
    requests_served.fetch_add(1, std::memory_order_relaxed);
    (op == Op::kRead ? bytes_served : bytes_received).fetch_add(nbytes, std::memory_order_relaxed);
  }
};

class Connection;

// ---------------------------------------------------------------- the engine, as a transport sees
// it
class Host {
 public:
  virtual ~Host() = default;
  virtual Reactor& reactor() noexcept = 0;
  virtual const std::shared_ptr<CopyPool>& copy_pool() const noexcept = 0;  // null: copy yourself
  virtual const PeerIdentity& self() const noexcept = 0;

  // Initiator's side; any thread, no lock of the connection held.
  virtual void posted(Request& request) noexcept = 0;  // its first byte left
  // Once for each request that post() took, unless cancel() said anything but kEnding. Local memory
  // is no longer touched by then.
  virtual void ended(Connection& from, const RequestPtr& request,
                     Completion completion) noexcept = 0;
  // Once for each request of which cancel() reported quiesced == false.
  virtual void quiesced(Request& request) noexcept = 0;
  // After a post() returned kAgain: there is room again.
  virtual void writable(Connection& from) noexcept = 0;
  // A request that cancel() left open (kUnknown) was after all refused by the target: its
  // notification was not shown, so its credit comes back. Otherwise call nothing.
  virtual void unshown(Connection& from, const Request& request) noexcept = 0;

  // Owner's side; progress thread (or a copier of the transport).
  // Looks up region and lease; checks key, peer, op, gate. Nothing may land before this succeeded
  // and Landing::check passed for the descriptors that follow.
  virtual std::optional<Failure> admit(Connection& from, const Access& access,
                                       Landing& out) noexcept = 0;
  // All bytes have landed. Enters the gates once more, then counts, then shows the notification.
  // A failure means: not accepted, nothing was counted or shown. `landing` is empty for kNotify.
  virtual std::optional<Failure> accept(Connection& from, Landing& landing,
                                        Arrival arrival) noexcept = 0;

  // Attaching, acceptor's side: the session that a JOIN names, while it is being set up.
  virtual std::optional<Session> session(const Key& id) noexcept = 0;
  // Attaching, connecting side, on the thread that called connect(): puts a question to the same
  // transport of the acceptor, inside the session, and waits for what its answer() returns. Empty,
  // with the reason, when none came.
  virtual std::optional<Bytes> ask(const Session& session, std::string_view transport,
                                   ByteView question, const Patience& patience,
                                   std::string& reason) {
    (void)session, (void)transport, (void)question, (void)patience;
    reason = "questions cannot be asked here";
    return {};
  }
  // A transport attached: both sides call it, before the session is announced as a peer.
  virtual void adopt(const Key& session, std::shared_ptr<Connection> connection) = 0;
  // The connection is dead; its requests have all been ended. Once; progress thread.
  virtual void lost(Connection& from, const Failure& cause) noexcept = 0;
};

// ---------------------------------------------------------------- a connection
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  explicit Connection(std::string_view transport) : transport_(transport) {}
  virtual ~Connection() = default;
  std::string_view transport() const noexcept { return transport_; }

  // Whether this request can go this way, or why not (for explain()). Pure; any thread.
  virtual std::optional<std::string> refuses(const Request& request) const {
    (void)request;
    return {};
  }
  // Whether NICs alone touch the bytes of both sides, so that they may be a GPU's memory. False:
  // some CPU copies them. Pure; any thread.
  virtual bool reaches_gpus() const noexcept { return false; }
  // Any thread, never blocks. kAgain: back-pressure, the engine keeps the request and offers it
  // again after Host::writable. kPeerDisconnected: dead. Any other end comes by Host::ended.
  virtual Status post(const RequestPtr& request) noexcept = 0;
  // Any thread. The engine calls it once, for a request that post() took, before it ends it itself.
  virtual Cancelled cancel(const RequestPtr& request) noexcept = 0;
  // Any thread. Ends every request with `cause` (each once, through Host::ended), then Host::lost.
  virtual void close(const Failure& cause) noexcept = 0;
  // Engine close: returns when no thread of ours is inside a copy or a system call of this one.
  virtual void join() noexcept = 0;
  // What a thread that waits for one of its requests may poll, where polling is worth it.
  virtual std::shared_ptr<Pollable> pollable() noexcept { return nullptr; }
  // One line for explain(): lanes, addresses, what is mapped.
  virtual std::string describe() const = 0;
  // What is known of a peer that does not answer, for the message of a passed deadline; or empty.
  virtual std::string condition() const { return {}; }

  Counters counters;
  // Set by the engine before the connection is used, cleared never; opaque to the transport.
  std::weak_ptr<void> peer;

 private:
  std::string_view transport_;
};

// ---------------------------------------------------------------- a transport
class Transport {
 public:
  virtual ~Transport() = default;
  virtual std::string_view name() const noexcept = 0;
  // Empty when it works here; else the reason, with errno where there is one.
  virtual std::optional<std::string> probe() const = 0;
  // After a probe that was empty: what it has found, in words; or empty. May open CUDA.
  virtual std::string detail() const { return {}; }

  // Acceptor's side. start() puts listeners into the reactor; offer() is what a peer must know to
  // attach (the name of a Unix socket, ...), sent inside the authenticated session.
  virtual void start(Host& host) = 0;
  virtual void stop() noexcept = 0;
  // Attaches to a session only when no better one could: it would carry nothing beside it.
  virtual bool is_spare() const noexcept { return false; }
  virtual Bytes offer() const { return {}; }

  // Connecting side, on the thread that called connect(); may block as long as `patience` lasts.
  // Either Host::adopt was called when it returns empty, or the result says why this way cannot be
  // gone.
  virtual std::optional<std::string> attach(const Session& session, ByteView offer,
                                            const Patience& patience) {
    (void)session, (void)offer, (void)patience;
    return "cannot attach";
  }

  // Acceptor's side, progress thread: what Host::ask brought. Only while the session is being set
  // up.
  virtual Bytes answer(const Session& session, ByteView question) {
    (void)session, (void)question;
    return {};
  }

  // A region came or is going. What takes long, or fails, is told by an Exposure that expose() adds
  // to the region. withdraw() returns when no peer-visible resource of it is left that we hold
  // (mappings of peers are read-only: no harm), and nothing registers it any more.
  virtual void expose(const std::shared_ptr<Region>& region) { (void)region; }
  virtual void withdraw(Region& region) noexcept { (void)region; }
  // A lease's gate was closed while somebody is inside. Any thread; must not block: who is inside
  // on behalf of a peer's NIC ends that, and leaves.
  virtual void revoked(const Lease& lease) noexcept { (void)lease; }
};

}  // namespace kvxfer
