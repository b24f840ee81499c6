// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Another engine, by its incarnation: its regions, the sessions with it, and what waits to be sent.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/control.hpp"
#include "engine/transfer.hpp"
#include "transport/tcp/connection.hpp"

namespace kvxfer {

struct RemoteRegion {
  RegionRef ref;
  std::string name;
  uint64_t nbytes = 0;
  bool writable = true;
  int device = kHostMemory;
  std::weak_ptr<Peer> peer;
};
using RemoteRegionPtr = std::shared_ptr<RemoteRegion>;

// Why this connection does not carry the request, whose far end is `target` if it has one; or
// empty.
std::optional<std::string> refusal_of(const Connection& connection, const Request& request,
                                      const RemoteRegion* target);

// One authenticated session: the control connection and every transport that attached to it. Two
// engines that connect to each other at the same moment get two, and both keep the same order.
struct Link {
  std::shared_ptr<tcp::TcpConnection> control;
  std::vector<std::shared_ptr<Connection>> data;  // best first; tcp only where it is allowed
  std::vector<std::string> refusals;              // "shm: other user", for explain()
  Incarnation initiator{};                        // who connected
  bool announced = false;                         // our regions were sent; engine mutex
  bool ready = false, lost = false;               // engine mutex
  Failure cause;
  std::optional<Attach> answer;  // what a transport that attaches waits for; engine mutex
  WaitWord changed;
  Reactor::TimerId timer = Reactor::kNoTimer;
  Fd process;  // a pidfd; with its token, progress thread only
  Reactor::Token process_token = 0;
  std::string liveness = "its sockets";  // for explain(); written before the link is in use
};
using LinkPtr = std::shared_ptr<Link>;

struct Totals {
  uint64_t bytes_written = 0, bytes_read = 0, bytes_received = 0, bytes_served = 0, bytes_sunk = 0;
  uint64_t requests = 0, requests_served = 0, refused = 0;
  uint64_t notifications_sent = 0, notifications_received = 0;
  void add(const Counters& c) noexcept;
  void add(const Totals& t) noexcept;
};

struct Peer {
  const void* owner = nullptr;  // the engine whose peer it is
  Birth birth;
  PeerIdentity identity;  // constant once the peer is in the engine's table
  std::atomic<bool> alive{false};

  mutable std::mutex mutex;    // over all below; no call into a connection while it is held
  std::vector<LinkPtr> links;  // ready ones, the order of use
  std::string lost_because;
  std::map<std::string, RemoteRegionPtr> regions;
  std::map<std::string, Totals> past;  // of connections that are gone, by transport
  // Of transfers that have not come to rest, wherever they are: bounded, so that a peer that takes
  // nothing does not fill our memory. They publish nothing.
  std::atomic<uint64_t> num_pending{0}, num_pending_spans{0};
  // Requests on their way to a connection, in order; one thread at a time hands them over.
  std::deque<TransferPtr> backlog;
  bool kicking = false, kick_again = false;
  uint32_t credits = kNotifyWindow;             // notifications that we may still send
  uint32_t undrained = 0;                       // theirs, not yet taken by our application
  uint32_t drained = 0;                         // taken, and not yet reported
  std::unordered_map<uint64_t, uint64_t> tags;  // arrivals without a lease
  WaitWord tags_changed;
  // What the system said last of its process, and when: thousands of transfers may end for it at
  // once.
  std::string stopped;
  int64_t stopped_ns = 0;
};
using PeerPtr = std::shared_ptr<Peer>;

}  // namespace kvxfer
