// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/transport.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {

constexpr uint8_t kRetries = 6;  // 7, the most there is, is "for ever" on Soft-RoCE

enum class Ask : uint32_t { kJoin = 1, kCommit = 2 };

struct AskHead {
  uint32_t version = kVersion;
  Ask what{};
};
struct JoinHead {  // then the sender's address
  Ends ends{};
  uint32_t rkey = 0;  // of the word
  uint16_t gid = 0;   // index in the receiver's table, which it is asked to use
  uint16_t global = 0;
  uint64_t address = 0;  // of the word
};
struct ReplyHead {  // then, when refused, the reason as text
  uint32_t version = kVersion;
  uint32_t refused = 0;
  Ends ends{};
  uint32_t rkey = 0;
  uint32_t reserved = 0;
  uint64_t address = 0;
};

// Why the peer refused, or empty. What it has to say otherwise goes into `reply`.
std::string refusal(ByteView answer, const char* what, ReplyHead& reply) {
  Reader reader(answer);
  reply = reader.get<ReplyHead>();
  if (!reader.ok()) return cat("a malformed answer to the ", what);
  if (reply.refused == 0) return {};
  const ByteView text = reader.take(reader.remaining());
  return cat("the peer refused the ", what, ": ",
             std::string_view(reinterpret_cast<const char*>(text.data()), text.size()));
}

}  // namespace

struct VerbsTransport::EventHandler final : FdHandler {
  explicit EventHandler(VerbsTransport& t) : transport(t) {}
  void on_events(uint32_t) override { transport.on_events(); }
  VerbsTransport& transport;
};

std::optional<std::string> VerbsTransport::probe() const {
  if (device_) return {};
  std::string reason;
  auto device = Device::open(config_.verbs_device, reason);
  if (!device) return reason;
  if (Channel::num_buffers(*device) == 0 || PullQueue::depth(*device) == 0)
    return cat(device->name(), " has send queues of ", device->limits().max_qp_wr,
               " work requests, which are too short");
  word_ = std::make_unique<Word>();
  try {
    word_mr_ = device->register_memory(word_.get(), sizeof(Word), IBV_ACCESS_REMOTE_READ,
                                       "the engine's identity");
  } catch (const Error& error) {
    return error.what();
  }
  device_ = std::move(device);
  return {};
}

void VerbsTransport::start(Host& host) {
  host_ = &host;
  memory_.open(device_);
  word_->incarnation = host.self().incarnation;
  token_ = host.reactor().add(device_->context()->async_fd, EPOLLIN,
                              std::make_shared<EventHandler>(*this));
}

void VerbsTransport::stop() noexcept {
  if (host_ == nullptr) return;
  host_->reactor().remove(token_, device_->context()->async_fd);
  halves_.clear();
  memory_.clear();
  word_mr_.reset();
}

PortAddress VerbsTransport::own_address() const {
  PortAddress address = device_->address();
  if (config_.verbs_gid_index >= 0)
    std::erase_if(address.gids,
                  [&](const Gid& gid) { return gid.index != config_.verbs_gid_index; });
  return address;
}

Bytes VerbsTransport::offer() const {
  Bytes bytes;
  Writer writer(bytes);
  writer.u32(kVersion);
  encode(own_address(), writer);
  return bytes;
}

Route VerbsTransport::route_to(const Path& path, const PortAddress& remote) const {
  Route route;
  route.path = path;
  route.remote_lid = remote.lid;
  route.mtu =
      std::clamp<uint8_t>(std::min(device_->address().mtu, remote.mtu), IBV_MTU_256, IBV_MTU_4096);
  route.retry_count = kRetries;
  route.timeout = timeout_for(config_.deadline_ns, kRetries);
  return route;
}

// Two questions: the join sets up queue pairs on both sides; the commit comes when a READ has shown
// that the path works. Until then the acceptor has promised nothing, and we may give up.
std::optional<std::string> VerbsTransport::attach(const Session& session, ByteView offer,
                                                  int64_t deadline_ns) {
  {
    std::lock_guard lock(mutex_);
    if (!lost_.empty()) return lost_;
  }
  Reader reader(offer);
  const uint32_t version = reader.u32();
  if (reader.ok() && version != kVersion)
    return cat("the peer offers version ", version, " of it, we speak ", kVersion);
  const auto remote = decode_address(reader);
  if (!remote || !reader.finished()) return "a malformed offer";
  std::string reason;
  const auto path = choose_path(device_->address(), *remote, config_.verbs_gid_index, reason);
  if (!path) return reason;

  auto connection = std::make_shared<VerbsConnection>(*host_, device_, memory_);
  PortAddress ours;  // the one GID that the peer is to use
  ours.infiniband = device_->address().infiniband;
  ours.lid = device_->address().lid;
  ours.mtu = device_->address().mtu;
  if (path->global) ours.gids.push_back(path->local);
  Bytes question;
  Writer writer(question);
  writer.put(AskHead{.what = Ask::kJoin});
  writer.put(JoinHead{.ends = connection->ends(),
                      .rkey = word_mr_->rkey,
                      .gid = path->remote.index,
                      .global = path->global,
                      .address = reinterpret_cast<uint64_t>(word_.get())});
  encode(ours, writer);
  // A part of the time each, so that a transport after this one has some left.
  const auto part = [&] {
    return std::min(now_ns() + (deadline_ns - now_ns()) / 3, deadline_after(kReadyTimeoutS));
  };
  const auto joined = host_->ask(session, name(), question, part(), reason);
  if (!joined) return reason;
  ReplyHead reply;
  if (auto refused = refusal(*joined, "join", reply); !refused.empty()) return refused;
  connection->connect(route_to(*path, *remote), reply.ends);
  Incarnation seen{};
  if (auto failed = connection->try_read(reply.address, reply.rkey, seen, part())) return failed;
  if (seen != session.peer.incarnation)
    return "what answers at the peer's RDMA address is another engine";

  question.clear();
  writer.put(AskHead{.what = Ask::kCommit});
  // Before the peer may post anything.
  host_->adopt(session.id, connection);
  keep(connection);
  connection->start();
  const auto committed = host_->ask(session, name(), question, part(), reason);
  if (committed) {
    reason = refusal(*committed, "commit", reply);
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
  if (!reader.ok() || head.version != kVersion) {
    refusal = "a malformed question, or another version of the transport";
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
  writer.put(ReplyHead{.refused = refusal.empty() ? 0u : 1u});
  writer.raw(as_bytes_view(std::string_view(refusal).substr(0, 512)));
  return reply;
}

// Progress thread of the acceptor.
std::string VerbsTransport::join(const Session& session, Reader& question, Bytes& reply) {
  {
    std::lock_guard lock(mutex_);
    if (!lost_.empty()) return lost_;
  }
  const auto head = question.get<JoinHead>();
  const auto remote = decode_address(question);
  if (!remote || !question.finished() || head.ends.num_buffers < Channel::kMinBuffers ||
      head.ends.num_buffers > Channel::kMaxBuffers || halves_.contains(session.id))
    return "a malformed join";
  Path path;
  path.global = head.global != 0;
  path.reason = cat("LID ", device_->address().lid, " to LID ", remote->lid);
  if (path.global) {
    const PortAddress own = own_address();
    const auto gid = std::ranges::find(own.gids, head.gid, &Gid::index);
    if (gid == own.gids.end() || remote->gids.size() != 1)
      return cat("GID index ", head.gid, " is not one that was offered");
    path.local = *gid;
    path.remote = remote->gids[0];
    path.reason =
        cat("GID ", text_of(path.local), " to ", text_of(path.remote), ", chosen by the peer");
  }
  auto connection = std::make_shared<VerbsConnection>(*host_, device_, memory_);
  connection->connect(route_to(path, *remote), head.ends);
  Writer writer(reply);
  writer.put(ReplyHead{.ends = connection->ends(),
                       .rkey = word_mr_->rkey,
                       .address = reinterpret_cast<uint64_t>(word_.get())});
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

void VerbsTransport::keep(const std::shared_ptr<VerbsConnection>& connection) {
  std::lock_guard lock(mutex_);
  std::erase_if(connections_, [](const auto& weak) { return weak.expired(); });
  connections_.push_back(connection);
}

std::vector<std::shared_ptr<VerbsConnection>> VerbsTransport::alive() {
  std::vector<std::shared_ptr<VerbsConnection>> out;
  std::lock_guard lock(mutex_);
  for (const auto& weak : connections_)
    if (auto connection = weak.lock()) out.push_back(std::move(connection));
  return out;
}

// ---------------------------------------------------------------- events of the device

void VerbsTransport::on_events() {
  ibv_async_event event{};
  while (api().get_async_event(device_->context(), &event) == 0) {
    const ibv_event_type type = event.event_type;
    uint32_t number = 0;
    switch (type) {
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        number = event.element.qp->qp_num;
        break;
      case IBV_EVENT_PORT_ERR:
        number = static_cast<uint32_t>(event.element.port_num);
        break;
      default:
        break;
    }
    // At once: a queue pair cannot be destroyed while an event of its is out.
    api().ack_async_event(&event);
    const char* const text = api().event_type_str(type);
    switch (type) {
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        for (const auto& connection : alive())
          if (connection->on_queue_pair_event(number, text)) break;
        break;
      case IBV_EVENT_PORT_ERR:
        if (number == device_->port()) lose_all(text);
        break;
      case IBV_EVENT_DEVICE_FATAL:
      case IBV_EVENT_CQ_ERR: {
        {
          std::lock_guard lock(mutex_);
          lost_ = cat("the device ", device_->name(), " is of no use any more: ", text);
        }
        lose_all(text);
        break;
      }
      default:  // nothing that takes anything away
        break;
    }
  }
}

void VerbsTransport::lose_all(const std::string& event) {
  for (const auto& connection : alive())
    connection->close({.code = Code::kTransport,
                       .text = cat("the device ", device_->name(), " reported: ", event)});
}

}  // namespace kvxfer::verbs
