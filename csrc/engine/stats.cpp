// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What the engine tells about itself: explain() and stats().
#include <sys/mman.h>

#include "engine/engine.hpp"

namespace kvxfer {
namespace {

const char* name_of(Code code) {
  switch (code) {
    case Code::kInvalidArgument:
      return "invalid_argument";
    case Code::kUnavailable:
      return "unavailable";
    case Code::kTransport:
      return "transport";
    case Code::kPeerDisconnected:
      return "peer_disconnected";
    case Code::kRemoteAccess:
      return "remote_access";
    case Code::kLease:
      return "lease";
    case Code::kCancelled:
      return "cancelled";
    default:
      return "other";
  }
}

// Asks each connection, best first, who would carry such a request.
std::string path_of(const Link& link, const Request& request) {
  if (link.data.empty()) return "nothing: no transport that we may use joins us";
  std::string refusals;
  for (auto& connection : link.data) {
    const auto refusal = refusal_of(*connection, request, nullptr);
    if (!refusal)
      return cat(connection->transport(), refusals.empty() ? "" : cat(" (not ", refusals, ")"));
    refusals += cat(refusals.empty() ? "" : "; not ", connection->transport(), ": ", *refusal);
  }
  return cat("nothing (not ", refusals, ")");
}

std::string paths_of(const Link& link, bool has_gpu_memory) {
  enum class Kind { kAllocated, kRegistered, kGpu };
  std::string out;
  for (const Op op : {Op::kWrite, Op::kRead})
    for (const auto& [kind, words] : {std::pair{Kind::kAllocated, "allocated memory"},
                                      {Kind::kRegistered, "registered memory"},
                                      {Kind::kGpu, "a GPU's memory"}}) {
      if (kind == Kind::kGpu && !has_gpu_memory) continue;
      Request request;
      request.op = op;
      request.local = std::make_shared<Region>();
      request.local->nbytes = request.nbytes = 4096;
      request.local->pieces = {{nullptr, 0, 4096}};
      request.spans = {{0, 0, 4096, 0}};
      if (kind == Kind::kAllocated)
        request.local->memfd = Fd(::memfd_create("kvxfer:explain", MFD_CLOEXEC));
      if (kind == Kind::kGpu) request.local->device = 0;
      out += cat("  ", op == Op::kWrite ? "write from " : "read into ", words, ": ",
                 path_of(link, request), "\n");
    }
  Request notification;
  notification.op = Op::kNotify;
  return out + cat("  notification: ", path_of(link, notification), "\n");
}

// What there is to say of a region's memory; or empty.
std::string said_of(const Region& region) {
  std::string out = region.backing.text;
  const auto say = [&](const auto&... what) { out += cat(out.empty() ? "" : "; ", what...); };
  for (const ExposurePtr& exposure : region.exposures) switch (exposure->state()) {
      case Exposure::State::kRunning:
        say(exposure->transport,
            " registers it: ", exposure->nbytes_done.load(std::memory_order_relaxed), " of ",
            exposure->nbytes, " bytes so far, until then its bytes go in messages");
        break;
      case Exposure::State::kDone:
        if (!exposure->text().empty()) say(exposure->transport, " ", exposure->text());
        break;
      case Exposure::State::kFailed:
        say("not for ", exposure->transport, ": ", exposure->text());
        break;
      case Exposure::State::kDropped:
        break;
    }
  return out;
}

}  // namespace

std::string Engine::explain(const Peer& peer) const {
  std::string memory;
  bool has_gpu_memory = false;
  {
    std::lock_guard lock(mutex_);
    for (auto& [id, region] : regions_) has_gpu_memory |= region->is_on_gpu();
    for (auto& [id, region] : regions_)
      if (const std::string said = said_of(*region); !said.empty())
        memory += cat("  our region '", region->name, "': ", said, "\n");
  }
  std::lock_guard lock(peer.mutex);
  std::string out = cat("peer '", peer.identity.name, "' at ", peer.identity.address,
                        ", incarnation ", hex(peer.identity.incarnation),
                        peer.alive ? "" : ", lost: ", peer.alive ? "" : peer.lost_because, "\n");
  for (auto& link : peer.links) {
    bool first = true;
    for (auto& connection : link->data) {
      out += cat("  ", first ? "uses " : "falls back to ", connection->describe(), "\n");
      first = false;
    }
    if (!allows("tcp")) out += "  tcp carries control only: transports= leaves it out\n";
    out += paths_of(*link, has_gpu_memory);
    out += cat("  death is seen by ", link->liveness, "\n");
    for (auto& refusal : link->refusals) out += cat("  not ", refusal, "\n");
  }
  for (const std::string& name : transport_names())
    if (name != "tcp" && !allows(name)) out += cat("  not ", name, ": transports= leaves it out\n");
  for (auto& reason : not_here_) out += cat("  not ", reason, "\n");
  return out + memory;
}

void Totals::add(const Counters& c) noexcept {
  bytes_written += c.bytes_written, bytes_read += c.bytes_read, bytes_received += c.bytes_received;
  bytes_served += c.bytes_served, bytes_sunk += c.bytes_sunk, requests += c.requests;
  requests_served += c.requests_served, refused += c.refused;
  notifications_sent += c.notifications_sent, notifications_received += c.notifications_received;
}

void Totals::add(const Totals& t) noexcept {
  bytes_written += t.bytes_written, bytes_read += t.bytes_read, bytes_received += t.bytes_received;
  bytes_served += t.bytes_served, bytes_sunk += t.bytes_sunk, requests += t.requests;
  requests_served += t.requests_served, refused += t.refused;
  notifications_sent += t.notifications_sent, notifications_received += t.notifications_received;
}

EngineStats Engine::stats() const {
  EngineStats out;
  std::lock_guard lock(mutex_);
  out.totals = forgotten_;
  for (auto& [incarnation, peer] : peers_) {
    PeerStats entry{hex(incarnation), peer->identity.name, peer->identity.address, peer->alive, {}};
    {
      std::lock_guard inner(peer->mutex);
      entry.transports = peer->past;
      for (auto& link : peer->links) {
        bool has_control = false;
        for (auto& connection : link->data) {
          entry.transports[std::string(connection->transport())].add(connection->counters);
          has_control |= connection == link->control;
        }
        if (!has_control) entry.transports["tcp"].add(link->control->counters);
      }
    }
    for (auto& [name, totals] : entry.transports) out.totals[name].add(totals);
    out.peers.push_back(std::move(entry));
  }
  out.done = ends_[0], out.failed = ends_[1], out.timed_out = ends_[2], out.cancelled = ends_[3];
  out.in_flight = started_ - out.done - out.failed - out.timed_out - out.cancelled;
  out.late_events = late_events_, out.late_writes_refused = late_writes_;
  out.spans_given = spans_given_, out.spans_posted = spans_posted_;
  fill_quarantine(out);
  for (auto& [id, region] : regions_)
    for (const ExposurePtr& exposure : region->exposures) {
      auto& entry = out.registration[exposure->transport];
      ++entry.regions;
      entry.running += exposure->state() == Exposure::State::kRunning;
      entry.failed += exposure->state() == Exposure::State::kFailed;
      entry.nbytes += exposure->nbytes;
      entry.nbytes_done += exposure->nbytes_done.load(std::memory_order_relaxed);
    }
  for (size_t code = 0; code <= kMaxCode; ++code)
    if (const uint64_t count = refused_[code]; count != 0)
      out.refused[name_of(static_cast<Code>(code))] = count;
  out.leases_open = leases_.size(), out.leases_expired = expired_,
  out.wakeups = reactor_.num_wakeups();
  out.handshakes_refused = handshakes_refused_;
  out.last_handshake_refusal = last_handshake_refusal_;
  return out;
}

}  // namespace kvxfer
