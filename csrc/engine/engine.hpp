// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The transfer engine: regions, peers, transfers, leases, and the one progress thread beneath them.
// Every public member may be called from any thread. Set-up and argument errors throw; what goes
// wrong with a transfer is its own end.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "engine/control.hpp"
#include "engine/peer.hpp"
#include "engine/spans.hpp"
#include "engine/transfer.hpp"
#include "transport/config.hpp"
#include "transport/registry.hpp"
#include "transport/tcp/transport.hpp"

namespace kvxfer {

using RegionPtr = std::shared_ptr<Region>;

struct EngineOptions {
  std::string name = "kvxfer", listen = "127.0.0.1:0";
  std::vector<std::string> transports;  // empty: all that work here, best first
  Bytes secret;
  bool secret_is_explicit = false;
  TransportConfig transport;
};

// Of an engine or a region: throws when peers could not be told it.
void check_name(const char* what, const std::string& name);

// Throws RegistrationError where a transport that was asked for by name could not register it.
void check_reached(const Region& region);

struct RegionOptions {
  std::string name;
  bool require_lease = false;
  bool shareable = true;
  bool is_on_gpu = false;  // the pieces are a GPU's memory, as CUDA addresses it
};

// A lease that knows its engine, for its timer and for telling the application that it is quiet.
struct EngineLease final : Lease {
  std::weak_ptr<Engine> engine;
  Reactor::TimerId timer = Reactor::kNoTimer;  // engine mutex
  Bytes token;
};
using LeasePtr = std::shared_ptr<EngineLease>;

struct Notification {
  PeerPtr peer;
  Bytes payload;
};
struct PeerEvent {
  bool connected = true;
  PeerPtr peer;
  std::string cause;
};

using Arguments = std::variant<SpanArguments, BlockArguments>;

struct SubmitOptions {
  bool has_notify = false, has_arrival = false, has_lease = false;
  Bytes notify;
  uint64_t arrival = 0;
  Bytes lease;
  int64_t deadline_ns = kNever;
  LatchPtr after;  // null: at once
};

struct PeerStats {
  std::string incarnation, name, address;
  bool alive = false;
  std::map<std::string, Totals> transports;
};
struct EngineStats {
  std::vector<PeerStats> peers;
  std::map<std::string, Totals> totals;  // of all peers, also those forgotten
  uint64_t done = 0, failed = 0, timed_out = 0, cancelled = 0, in_flight = 0;
  uint64_t late_events = 0, late_writes_refused = 0;
  uint64_t unquiesced = 0;          // transfers
  uint64_t quarantined_nbytes = 0;  // of transfers and leases that are not quiet
  double quarantined_age_s = 0;     // of the oldest
  uint64_t spans_given = 0, spans_posted = 0;
  std::map<std::string, uint64_t> refused;  // requests of peers, by reason
  struct Registration {
    uint64_t regions = 0, running = 0, failed = 0;
    uint64_t nbytes = 0, nbytes_done = 0;
  };
  std::map<std::string, Registration> registration;  // by transport
  uint64_t leases_open = 0, leases_expired = 0, wakeups = 0;
  uint64_t handshakes_refused = 0;
  std::string last_handshake_refusal;
};

class Engine final : public tcp::SessionHost, public std::enable_shared_from_this<Engine> {
 public:
  static std::shared_ptr<Engine> create(EngineOptions options);
  explicit Engine(EngineOptions options);  // use create()
  ~Engine() override;
  void close() noexcept;
  bool closed() const noexcept { return closed_.load(std::memory_order_acquire) || !here(); }
  // False in a child that was forked from the process that made it: there it is
  // dead.
  bool here() const noexcept { return birth_.here(); }
  void check_here() const;

  const std::string& address() const noexcept { return identity_.address; }
  std::string unused_region_name();
  RegionPtr allocate(uint64_t nbytes, RegionOptions options);
  RegionPtr register_pieces(std::vector<Piece> pieces, bool writable, std::shared_ptr<void> keep,
                            RegionOptions options);
  // Closes the region to everybody; the memory is free once region->gate is quiet.
  void deregister(const RegionPtr& region);

  // `interrupted` is asked now and then while it waits, on the calling thread: true ends it with
  // kCancelled. So does close(), which is told as for any call on a closed engine.
  PeerPtr connect(const std::string& address, double timeout_s,
                  const std::function<bool()>& interrupted = {});
  std::map<std::string, RemoteRegionPtr> regions_of(const Peer& peer) const;

  TransferPtr submit(Op op, const RegionPtr& local, const RemoteRegionPtr& remote,
                     const Arguments& arguments, SubmitOptions options);
  TransferPtr notify(const PeerPtr& peer, SubmitOptions options);
  void late(const TransferPtr& transfer) noexcept;    // its deadline has passed
  void cancel(const TransferPtr& transfer) noexcept;  // it has ended when this returns
  void let_go(const TransferPtr& transfer) noexcept;  // its `after` has settled

  // The caller polls: it found nothing, and may look again at once. Moves what can be moved, in the
  // progress thread's stead. Any thread that holds no lock of ours.
  void poll() noexcept {
    if (!closed()) reactor_.poll();
  }
  // The caller is about to sleep, so the progress thread goes back to work (Reactor::rest).
  void rest() noexcept { reactor_.rest(); }
  std::vector<Notification> notifications();
  std::vector<PeerEvent> peer_events();

  LeasePtr grant(const RegionPtr& region, const Column& offsets, const Column& nbytes, double ttl_s,
                 std::optional<Incarnation> peer, uint64_t num_arrivals);
  void begin_revoke(const LeasePtr& lease) noexcept;
  void extend(const LeasePtr& lease, double ttl_s);

  uint64_t arrivals(uint64_t tag, const Peer& peer) const;
  int fileno() const noexcept { return event_.get(); }
  void clear_wakeup() noexcept;
  std::string explain(const Peer& peer) const;
  EngineStats stats() const;

  // SessionHost
  Reactor& reactor() noexcept override { return reactor_; }
  const std::shared_ptr<CopyPool>& copy_pool() const noexcept override { return copy_pool_; }
  const PeerIdentity& self() const noexcept override { return identity_; }
  void posted(Request& request) noexcept override;
  void ended(Connection& from, const RequestPtr& request, Completion completion) noexcept override;
  void quiesced(Request& request) noexcept override;
  void writable(Connection& from) noexcept override;
  void unshown(Connection& from, const Request& request) noexcept override;
  std::optional<Failure> admit(Connection& from, const Access& access,
                               Landing& out) noexcept override;
  std::optional<Failure> accept(Connection& from, Landing& landing,
                                Arrival arrival) noexcept override;
  std::optional<Session> session(const Key& id) noexcept override;
  void adopt(const Key& session, std::shared_ptr<Connection> connection) override;
  void lost(Connection& from, const Failure& cause) noexcept override;
  std::optional<Bytes> ask(const Session& session, std::string_view transport, ByteView question,
                           const Patience& patience, std::string& reason) override;
  bool opened(const std::shared_ptr<tcp::TcpConnection>& connection) noexcept override;
  bool control(tcp::TcpConnection& from, ByteView payload) noexcept override;
  void ready(tcp::TcpConnection& from) noexcept override;
  Bytes offers() override;
  void turned_away(const std::string& address, const std::string& reason) noexcept override;

 private:
  friend struct QuietHook;
  std::optional<Failure> judge(Connection& from, const Access& access, Landing& out) noexcept;
  void check_open() const;
  RegionPtr add_region(RegionPtr region);
  void check_new_region(const Region& region) const;  // mutex_ held
  void expose(const RegionPtr& region);
  void check_gpu_reached(const Region& region) const;
  void withdraw(Region& region) noexcept;
  bool allows(std::string_view transport) const;
  PeerPtr peer_for(const PeerIdentity& identity);  // mutex_ held
  // The steps of connect(): the session, the other transports, the peer's word that it is ready.
  PeerPtr join_peer(const tcp::TcpTransport::Established& established, const std::string& address,
                    const Patience& patience);
  void attach_all(Link& link, const Session& session, ByteView encoded_offers,
                  const Patience& patience);
  void await_ready(Link& link, const Patience& patience);
  LinkPtr open_link(const std::shared_ptr<tcp::TcpConnection>& connection, bool initiator);
  struct ProcessHandler;
  void watch_process(const LinkPtr& link) noexcept;
  void unwatch_process(Link& link) noexcept;
  bool on_attach(tcp::TcpConnection& from, Attach attach) noexcept;
  void announce(Link& link);               // mutex_ held
  void broadcast(const Control& message);  // mutex_ held
  void forget_old_peers();                 // mutex_ held

  class Use;
  TransferPtr make_transfer(Op op, const PeerPtr& peer, SubmitOptions& options);
  void take_room(Transfer& transfer);  // counts it into its peer, or throws kBackPressure
  void return_room(Transfer& transfer) noexcept;
  void come_to_rest(Transfer& transfer) noexcept;  // nothing touches its local memory any more
  void launch(const TransferPtr& transfer);
  void kick(const PeerPtr& peer) noexcept;
  enum class Posted : uint8_t { kGone, kBusy };
  Posted post_one(Peer& peer, const TransferPtr& transfer) noexcept;
  void stop(const TransferPtr& transfer, State why) noexcept;
  std::string stopped(Peer& peer) const;  // "its process 123 is stopped", or empty
  std::string why_it_waits(const Transfer& transfer) const;
  void end(const TransferPtr& transfer, State state, Failure failure, bool agreed,
           bool quiesced) noexcept;
  bool return_credit(Peer& peer, Transfer& transfer) noexcept;
  void completed(const TransferPtr& transfer, Completion completion) noexcept;
  void signal() noexcept;
  void enter_quarantine(const Transfer& transfer);
  void enter_quarantine(const LeasePtr& lease);
  void leave_quarantine(const void* who) noexcept;
  void check_quarantine(const Region& region, const std::vector<Extent>& extents) const;
  void fill_quarantine(EngineStats& out) const;

  const EngineOptions options_;
  const Birth birth_;
  PeerIdentity identity_;
  Reactor reactor_;
  std::shared_ptr<CopyPool> copy_pool_;  // null: the progress thread copies
  std::unique_ptr<tcp::TcpTransport> tcp_;
  std::vector<std::pair<std::string, std::unique_ptr<Transport>>>
      transports_;                        // attach, best first
  std::vector<std::string> not_here_;     // "shm: reason"
  std::shared_ptr<ExportedWords> words_;  // of our gates; null where no peer could look at them
  std::atomic<bool> closed_{false};
  std::mutex close_mutex_;
  Fd event_;
  std::atomic<bool> signalled_{false};

  mutable std::mutex mutex_;  // over all below; a peer's mutex may be taken
                              // inside, never outside
  std::unordered_map<uint64_t, RegionPtr> regions_;
  std::unordered_map<uint64_t, LeasePtr> leases_;
  std::map<Incarnation, PeerPtr> peers_;
  std::map<Key, std::pair<PeerPtr, LinkPtr>> pending_;  // sessions that are being set up
  std::map<std::string, Totals> forgotten_;
  uint64_t next_id_ = 1, num_unnamed_ = 0;
  uint64_t handshakes_refused_ = 0;
  std::string last_handshake_refusal_;

  // Memory that may still be touched though its transfer or lease has ended.
  mutable std::mutex quarantine_mutex_;  // innermost
  struct Quarantined {
    std::shared_ptr<Region> region;
    std::vector<Extent> extents;
    uint64_t nbytes = 0;
    int64_t since_ns = 0;
    bool is_lease = false;
  };
  std::map<const void*, Quarantined> quarantine_;  // by transfer or lease

  std::mutex inbox_mutex_;  // innermost
  std::vector<Notification> inbox_;
  std::vector<PeerEvent> events_;

  std::atomic<uint64_t> next_request_{1};
  std::atomic<uint64_t> ends_[4]{};  // done, failed, timed out, cancelled
  std::atomic<uint64_t> started_{0}, late_events_{0}, late_writes_{0}, expired_{0};
  std::atomic<uint64_t> spans_given_{0}, spans_posted_{0};
  std::atomic<uint64_t> refused_[kMaxCode + 1]{};  // of peers, by code
};

}  // namespace kvxfer
