// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How a session is joined: who asks for what, and what both sides make of it.
#include <algorithm>
#include <set>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "transport/verbs/transport.hpp"

namespace kvxfer::verbs {
namespace {

enum class Ask : uint32_t { kJoin = 1, kCommit = 2 };

struct AskHead {
  uint32_t version = kVersion;
  Ask what{};
};
struct JoinHead {  // then each rail: JoinRail, and the sender's address
  uint32_t num_buffers = 0;
  uint32_t num_rails = 0;
  uint64_t word = 0;  // where the sender's incarnation stands
};
struct JoinRail {
  RailEnd end;
  uint16_t port = 0;  // number in the receiver's offer
  uint16_t gid = 0;   // index in its table, which it is asked to use
  uint16_t global = 0;
  uint16_t reserved = 0;
};
struct ReplyHead {  // then the RailEnds; when refused, the reason as text
  uint32_t version = kVersion;
  uint32_t refused = 0;
  uint32_t num_buffers = 0;
  uint32_t num_rails = 0;
  uint64_t word = 0;
};

bool has_sane_buffers(uint32_t n) { return n >= Channel::kMinBuffers && n <= Channel::kMaxBuffers; }

std::string text_of_unpaired(size_t num_pairs, size_t num_own, size_t num_peer) {
  if (num_pairs == num_own && num_pairs == num_peer) return {};
  return cat("\n    in no rail: ", num_own - num_pairs, " port(s) of ours, ", num_peer - num_pairs,
             " of the peer's");
}

// Why the peer refused, or empty. What it has to say otherwise goes into `reply`.
std::string refusal(Reader& reader, const char* what, ReplyHead& reply) {
  reply = reader.get<ReplyHead>();
  if (!reader.ok()) return cat("a malformed answer to the ", what);
  if (reply.refused == 0) return {};
  const ByteView text = reader.take(reader.remaining());
  return cat("the peer refused the ", what, ": ",
             std::string_view(reinterpret_cast<const char*>(text.data()), text.size()));
}

}  // namespace

// Two questions: the join sets up queue pairs on both sides; the commit comes when a READ has shown
// that the first rail works. Until then the acceptor has promised nothing, and we may give up.
std::optional<std::string> VerbsTransport::attach(const Session& session, ByteView offer,
                                                  const Patience& patience) {
  if (auto why = unusable(); !why.empty()) return why;
  Reader reader(offer);
  const uint32_t version = reader.u32();
  if (reader.ok() && version != kVersion)
    return cat("the peer offers version ", version, " of it, we speak ", kVersion);
  std::vector<PortAddress> remote;
  for (size_t n = reader.u8(); n > 0 && remote.size() < kMaxRails; --n) {
    const auto address = decode_address(reader);
    if (!address) return "a malformed offer";
    remote.push_back(*address);
  }
  if (!reader.finished()) return "a malformed offer";
  std::string reason;
  const std::vector<PortAddress> own = own_addresses();
  auto pairs = pair_ports(own, remote, config_.verbs_gid_index, reason);
  if (pairs.empty()) return reason;
  const std::string unpaired = text_of_unpaired(pairs.size(), own.size(), remote.size());
  // Further queue pairs of two ports are rails like others, behind one for each pair.
  const size_t num_pairs = pairs.size();
  while (pairs.size() < std::min(num_pairs * config_.verbs_queue_pairs, kMaxRails))
    pairs.push_back(pairs[pairs.size() - num_pairs]);

  Devices devices;
  std::vector<Route> routes;
  for (const PortPair& pair : pairs) {
    devices.push_back(devices_[pair.local]);
    routes.push_back(route_to(*devices.back(), pair.path, remote[pair.remote], num_pairs));
  }
  auto connection = std::make_shared<VerbsConnection>(*host_, devices, config_.verbs_device.empty(),
                                                      memory_, why_no_push(devices));
  connection->note_unpaired(unpaired);
  const Ends ends = connection->ends();
  Bytes question;
  Writer writer(question);
  writer.put(AskHead{.what = Ask::kJoin});
  writer.put(JoinHead{ends.num_buffers, static_cast<uint32_t>(pairs.size()),
                      reinterpret_cast<uint64_t>(word_.get())});
  for (size_t i = 0; i < pairs.size(); ++i) {
    const Path& path = pairs[i].path;
    JoinRail rail{ends.rails[i], static_cast<uint16_t>(pairs[i].remote), path.remote.index,
                  path.global, 0};
    rail.end.word_rkey = word_registration_->rkeys()[devices[i]->index()];
    writer.put(rail);
    PortAddress ours;  // the one GID that the peer is to use
    ours.infiniband = devices[i]->address().infiniband;
    ours.lid = devices[i]->address().lid;
    ours.mtu = devices[i]->address().mtu;
    if (path.global) ours.gids.push_back(path.local);
    encode(ours, writer);
  }
  // A part of the time each, so that a transport after this one has some left.
  const auto part = [&] {
    const int64_t left_ns = patience.deadline_ns() - now_ns();
    return patience.until(std::min(now_ns() + left_ns / 3, deadline_after(kReadyTimeoutS)));
  };
  const auto joined = host_->ask(session, name(), question, part(), reason);
  if (!joined) return reason;
  Reader answer(*joined);
  ReplyHead reply;
  if (auto refused = refusal(answer, "join", reply); !refused.empty()) return refused;
  Ends theirs{reply.num_buffers, reply.word, {}};
  for (size_t i = 0; i < pairs.size(); ++i) theirs.rails.push_back(answer.get<RailEnd>());
  if (!answer.finished() || reply.num_rails != pairs.size() || !has_sane_buffers(reply.num_buffers))
    return "a malformed answer to the join";
  connection->connect(Side::kConnecting, routes, theirs, session.peer.incarnation);
  if (auto failed = connection->try_first(part().deadline_ns())) return failed;

  question.clear();
  writer.put(AskHead{.what = Ask::kCommit});
  // Before the peer may post anything.
  host_->adopt(session.id, connection);
  keep(connection);
  connection->start();
  const auto committed = host_->ask(session, name(), question, part(), reason);
  if (committed) {
    Reader rest(*committed);
    reason = refusal(rest, "commit", reply);
    if (reason.empty()) return {};
  }
  connection->close({.code = Code::kTransport, .text = reason});
  return reason;
}

Bytes VerbsTransport::answer(const Session& session, ByteView question) {
  Reader reader(question);
  const auto head = reader.get<AskHead>();
  Bytes reply;
  std::string refusal;
  if (!reader.ok()) {
    refusal = "a malformed question";
  } else if (head.version != kVersion) {
    refusal = cat("you ask by version ", head.version, " of it, we speak ", kVersion);
  } else {
    try {
      refusal = head.what == Ask::kJoin     ? join(session, reader, reply)
                : head.what == Ask::kCommit ? commit(session)
                                            : "an unknown question";
    } catch (const Error& error) {
      refusal = error.what();
    }
  }
  if (refusal.empty() && !reply.empty()) return reply;
  reply.clear();
  Writer writer(reply);
  ReplyHead refused;
  refused.refused = refusal.empty() ? 0 : 1;
  writer.put(refused);
  writer.raw(as_bytes_view(std::string_view(refusal).substr(0, 512)));
  return reply;
}

// Progress thread of the acceptor.
std::string VerbsTransport::join(const Session& session, Reader& question, Bytes& reply) {
  if (auto why = unusable(); !why.empty()) return why;
  const auto head = question.get<JoinHead>();
  if (!question.ok() || !has_sane_buffers(head.num_buffers) || head.num_rails == 0 ||
      head.num_rails > kMaxRails || halves_.contains(session.id))
    return "a malformed join";
  const std::vector<PortAddress> own = own_addresses();
  Ends theirs{head.num_buffers, head.word, {}};
  Devices devices;
  std::vector<PortAddress> remotes;
  std::vector<PortPair> pairs;
  for (uint32_t i = 0; i < head.num_rails; ++i) {
    const auto rail = question.get<JoinRail>();
    const auto remote = decode_address(question);
    if (!remote || rail.port >= devices_.size()) return "a malformed join";
    if (!devices_[rail.port]->is_up())
      return cat(devices_[rail.port]->name(), " has gone down since it was offered");
    Path path;
    path.global = rail.global != 0;
    path.reason = cat("LID ", own[rail.port].lid, " to LID ", remote->lid);
    if (path.global) {
      const auto gid = std::ranges::find(own[rail.port].gids, rail.gid, &Gid::index);
      if (gid == own[rail.port].gids.end() || remote->gids.size() != 1)
        return cat("GID index ", rail.gid, " of port ", rail.port, " is not one that was offered");
      path.local = *gid;
      path.remote = remote->gids[0];
      path.reason =
          cat("GID ", text_of(path.local), " to ", text_of(path.remote), ", chosen by the peer");
    }
    theirs.rails.push_back(rail.end);
    devices.push_back(devices_[rail.port]);
    remotes.push_back(*remote);
    pairs.push_back({rail.port, i, std::move(path)});
  }
  if (!question.finished()) return "a malformed join";
  const size_t num_ports = std::set<std::shared_ptr<Device>>(devices.begin(), devices.end()).size();
  std::vector<Route> routes;
  for (size_t i = 0; i < pairs.size(); ++i)
    routes.push_back(route_to(*devices[i], pairs[i].path, remotes[i], num_ports));
  auto connection = std::make_shared<VerbsConnection>(*host_, devices, config_.verbs_device.empty(),
                                                      memory_, why_no_push(devices));
  connection->connect(Side::kAccepting, routes, theirs, session.peer.incarnation);
  const Ends ends = connection->ends();
  Writer writer(reply);
  writer.put(ReplyHead{kVersion, 0, ends.num_buffers, static_cast<uint32_t>(ends.rails.size()),
                       reinterpret_cast<uint64_t>(word_.get())});
  for (size_t i = 0; i < pairs.size(); ++i) {
    RailEnd end = ends.rails[i];
    end.word_rkey = word_registration_->rkeys()[devices[i]->index()];
    writer.put(end);
  }
  const Key id = session.id;
  const Reactor::TimerId timer =
      host_->reactor().at(deadline_after(kReadyTimeoutS), [this, id] { halves_.erase(id); });
  halves_.emplace(id, Half{std::move(connection), timer});
  return {};
}

std::string VerbsTransport::commit(const Session& session) {
  const auto it = halves_.find(session.id);
  if (it == halves_.end()) return "there is no join to commit to";
  const auto connection = std::move(it->second.connection);
  host_->reactor().cancel(it->second.timer);
  halves_.erase(it);
  host_->adopt(session.id, connection);
  keep(connection);
  connection->start();
  return {};
}

}  // namespace kvxfer::verbs
