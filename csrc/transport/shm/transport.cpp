// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/transport.hpp"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "common/peer_text.hpp"
#include "common/random.hpp"
#include "common/sha256.hpp"

namespace kvxfer::shm {

namespace {

constexpr size_t kMaxJoining = 64;  // strangers of our own user that have not proved anything yet
// A busy machine has kept a joining process from its next instruction for longer than 2 s.
constexpr int64_t kJoinTimeoutNs = static_cast<int64_t>(kReadyTimeoutS * 1e9);
constexpr char kMalformedAnswer[] = "the peer's answer to the join is malformed";

struct JoinRequest {  // then the introduction
  uint32_t version = kVersion;
  uint32_t reserved = 0;
  Key session{};
  std::array<std::byte, 32> nonce{};
  Digest proof{};
};
struct JoinReply {  // then, when refused, the reason as text
  uint32_t version = kVersion;
  uint32_t refused = 0;
  Digest proof{};
};

// Two labels, so that neither side can answer with what it was sent.
Digest prove(const Session& session, std::string_view transport, std::string_view role,
             const JoinRequest& join, ByteView introduction) {
  return hmac_sha256(session.key, {as_bytes_view("kvxfer "), as_bytes_view(transport),
                                   as_bytes_view(" join "), as_bytes_view(role),
                                   ByteView(join.session), ByteView(join.nonce), introduction});
}

Fd make_bell() {
  Fd bell(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!bell) fail_errno(Code::kRegistration, errno, "eventfd failed");
  return bell;
}

// A write to the peer's bell must neither block nor raise SIGPIPE: it is one of the kernel's own
// objects, as an eventfd is, and no pipe, socket or file. The flag is shared with the peer.
bool is_bell(int fd) {
  struct stat info{};
  const int flags = ::fcntl(fd, F_GETFL);
  return ::fstat(fd, &info) == 0 && (info.st_mode & S_IFMT) == 0 && flags >= 0 &&
         ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

std::string uid_reason(uint32_t theirs, uint32_t ours) {
  return cat("its user id is ", theirs, ", ours is ", ours,
             "; shared memory is for processes of one user");
}

}  // namespace

// A socket that has connected and must now prove that it belongs to a session of ours.
struct ShmTransport::Joining final : FdHandler {
  Joining(ShmTransport& t, Fd s, std::shared_ptr<std::atomic<size_t>> c)
      : transport(t), socket(std::move(s)), count(std::move(c)) {
    ++*count;
  }
  ~Joining() override { --*count; }

  void on_events(uint32_t) override {
    Bytes message;
    std::vector<Fd> fds;
    const Received received = receive(socket.get(), message, fds, 2);
    if (received == Received::kAgain) return;
    forget();  // the reactor keeps this alive until the end of the callback
    if (received != Received::kMessage) return;
    std::string reason;
    try {
      reason = join(message, fds);
    } catch (const std::exception& error) {
      reason = error.what();
    }
    if (!reason.empty()) refuse(reason);
  }

  void on_late() {
    on_events(0);  // who was kept from running all the time was us, perhaps
    if (token == 0) return;
    forget();
    refuse(cat("no join came within ", kReadyTimeoutS, " s"));
  }

  void refuse(const std::string& reason) {
    const JoinReply reply{.refused = 1};
    Bytes bytes;
    Writer writer(bytes);
    writer.put(reply);
    writer.raw(as_bytes_view(reason.substr(0, 256)));
    [[maybe_unused]] const bool sent = send(socket.get(), bytes, {});  // it may be gone already
  }

  void forget() {
    if (token != 0) transport.host_->reactor().remove(std::exchange(token, 0), socket.get());
    transport.host_->reactor().cancel(timer);
  }

  std::string join(ByteView message, std::vector<Fd>& fds) {
    Reader reader(message);
    const auto request = reader.get<JoinRequest>();
    if (!reader.ok() || request.version != kVersion || fds.size() != 2)
      return "a malformed join, or another version of the transport";
    const ByteView introduction = reader.take(reader.remaining());
    const auto session = transport.host_->session(request.session);
    if (!session || !equal_constant_time(request.proof, prove(*session, transport.name(), "client",
                                                              request, introduction)))
      return "the join names no session of ours, or does not prove that it belongs to it";

    ShmConnection::Parts parts;
    std::string reason;
    parts.reach = transport.meet(socket.get(), session->peer, introduction, reason);
    if (!parts.reach) return reason;
    Segment control = make_shared("kvxfer-control", sizeof(Control));
    parts.me = 1;
    parts.staging = make_owned("kvxfer-staging", kStageBytes);
    parts.peer_staging = map_peer_readonly(fds[0].get(), kStageBytes, reason);
    if (!parts.peer_staging) return reason;
    if (!is_bell(fds[1].get())) return "its bell is no event descriptor";
    parts.my_bell = make_bell();
    parts.peer_bell = std::move(fds[1]);
    parts.control = control.mapping;

    const JoinReply reply{.proof =
                              prove(*session, transport.name(), "server", request, introduction)};
    const int given[3] = {control.fd.get(), parts.staging.fd.get(), parts.my_bell.get()};
    parts.socket = Fd(::dup(socket.get()));
    if (!parts.socket) return cat("dup failed: ", errno_text(errno));
    ::fcntl(parts.socket.get(), F_SETFD, FD_CLOEXEC);
    auto connection = std::make_shared<ShmConnection>(*transport.host_, std::move(parts));
    // Adopted before the other side may post anything.
    transport.host_->adopt(session->id, connection);
    transport.keep(connection);
    connection->start();
    if (!send(socket.get(), view_of(reply), given))
      connection->close({.code = Code::kPeerDisconnected, .text = "the peer left while it joined"});
    return {};
  }

  ShmTransport& transport;
  Fd socket;
  std::shared_ptr<std::atomic<size_t>> count;
  Reactor::Token token = 0;
  Reactor::TimerId timer = Reactor::kNoTimer;
};

struct ShmTransport::Listener final : FdHandler {
  Listener(ShmTransport& t, Fd s) : transport(t), socket(std::move(s)) {}

  void on_events(uint32_t) override {
    for (;;) {
      Fd peer(::accept4(socket.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!peer) return;  // EAGAIN, or out of descriptors: epoll tells us again
      const auto uid = peer_uid(peer.get());
      if (!uid || *uid != transport.host_->self().host.uid || *joining >= kMaxJoining) continue;
      auto handler = std::make_shared<Joining>(transport, std::move(peer), joining);
      Reactor& reactor = transport.host_->reactor();
      std::weak_ptr<Joining> weak = handler;
      handler->timer = reactor.at(deadline_after(kReadyTimeoutS), [weak] {
        if (auto late = weak.lock()) late->on_late();
      });
      handler->token = reactor.add(handler->socket.get(), EPOLLIN, handler);
    }
  }

  ShmTransport& transport;
  Fd socket;
  std::shared_ptr<std::atomic<size_t>> joining = std::make_shared<std::atomic<size_t>>(0);
};

std::optional<std::string> ShmTransport::probe() const {
  try {
    const Segment segment = make_owned("kvxfer-probe", 4096);
    std::string reason;
    if (!map_peer_readonly(segment.fd.get(), 4096, reason)) return reason;
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

void ShmTransport::start(Host& host) {
  host_ = &host;
  socket_name_ = "kvxfer-" + hex(random_bytes<16>());
  listener_ = std::make_shared<Listener>(*this, listen_abstract(socket_name_));
  listener_token_ = host.reactor().add(listener_->socket.get(), EPOLLIN, listener_);
}

void ShmTransport::stop() noexcept {
  if (!listener_) return;
  host_->reactor().remove(listener_token_, listener_->socket.get());
  listener_->socket.reset();
}

Bytes ShmTransport::offer() const {
  Bytes bytes;
  Writer writer(bytes);
  writer.u32(kVersion);
  writer.text(host_->self().host.boot_id);
  writer.text(socket_name_);
  writer.raw(introduction());
  return bytes;
}

std::optional<std::string> ShmTransport::attach(const Session& session, ByteView offer,
                                                const Patience& patience) {
  Reader reader(offer);
  const uint32_t version = reader.u32();
  const std::string boot_id = reader.text(128), socket_name = reader.text(96);
  const ByteView theirs = reader.take(reader.remaining());
  if (!reader.ok() || version != kVersion)
    return cat("the peer offers version ", version, " of it, we speak ", kVersion);
  const HostIdentity& self = host_->self().host;
  if (boot_id != self.boot_id) return "the peer runs on another machine (other boot id)";
  // From here on the peer's clock runs for our join, so what takes long comes first.
  Segment staging = make_owned("kvxfer-staging", kStageBytes);
  int err = 0;
  Fd socket = connect_abstract(socket_name, err);
  if (!socket)
    return cat("its Unix socket cannot be reached: ", errno_text(err),
               err == ECONNREFUSED ? " (another network namespace?)" : "");
  const auto uid = peer_uid(socket.get());
  if (!uid || *uid != self.uid) return uid_reason(uid.value_or(0), self.uid);

  ShmConnection::Parts parts;
  std::string reason;
  // Before the join: once the peer has taken us, giving up would end the whole session.
  parts.reach = meet(socket.get(), session.peer, theirs, reason);
  if (!parts.reach) return reason;
  parts.me = 0;
  parts.staging = std::move(staging);
  parts.my_bell = make_bell();
  JoinRequest request{.session = session.id, .nonce = random_bytes<32>()};
  const Bytes ours = introduction();
  request.proof = prove(session, name(), "client", request, ours);
  const int given[2] = {parts.staging.fd.get(), parts.my_bell.get()};
  Bytes join;
  Writer writer(join);
  writer.put(request);
  writer.raw(ours);
  const bool sent = send(socket.get(), join, given);
  err = errno;
  // Half of the time, so that a transport after this one has some left. A peer that hung up before
  // we sent has said why.
  const int64_t begun_ns = now_ns();
  const int64_t wait_ns =
      std::clamp<int64_t>((patience.deadline_ns() - begun_ns) / 2, 0, kJoinTimeoutNs);
  if (sent && !patience.until(begun_ns + wait_ns).wait(socket.get(), POLLIN))
    return cat("the peer did not answer the join within ", wait_ns / 1'000'000, " ms");
  Bytes message;
  std::vector<Fd> fds;
  const Received received = receive(socket.get(), message, fds, 3);
  if (received == Received::kBroken) return kMalformedAnswer;
  if (received != Received::kMessage)
    return cat("the peer closed the Unix socket ",
               sent ? "without an answer" : cat("before it had our join (", errno_text(err), ")"),
               ": another user, too many who join at once, or it is closing");
  Reader answer(message);
  const auto reply = answer.get<JoinReply>();
  if (!answer.ok()) return kMalformedAnswer;
  if (reply.refused != 0) {
    const ByteView text = answer.take(answer.remaining());
    return cat("the peer refused the join: ",
               peer_text({reinterpret_cast<const char*>(text.data()), text.size()}));
  }
  if (fds.size() != 3 ||
      !equal_constant_time(reply.proof, prove(session, name(), "server", request, ours)))
    return "the Unix socket is not the peer's: its proof is wrong";
  parts.control = map_peer_shared(fds[0].get(), sizeof(Control), reason);
  if (parts.control) parts.peer_staging = map_peer_readonly(fds[1].get(), kStageBytes, reason);
  if (!parts.peer_staging) return reason;
  if (!is_bell(fds[2].get())) return "its bell is no event descriptor";
  parts.peer_bell = std::move(fds[2]);
  parts.socket = std::move(socket);
  auto connection = std::make_shared<ShmConnection>(*host_, std::move(parts));
  host_->adopt(session.id, connection);
  keep(connection);
  connection->start();
  return {};
}

std::unique_ptr<Reach> ShmTransport::meet(int, const PeerIdentity&, ByteView introduction,
                                          std::string& reason) const {
  if (introduction.empty()) return make_mapped_reach();
  reason = "a malformed introduction";
  return nullptr;
}

void ShmTransport::keep(const std::shared_ptr<ShmConnection>& connection) {
  std::lock_guard lock(mutex_);
  std::erase_if(connections_, [](const auto& weak) { return weak.expired(); });
  connections_.push_back(connection);
}

void ShmTransport::withdraw(Region& region) noexcept {
  std::vector<std::shared_ptr<ShmConnection>> alive;
  {
    std::lock_guard lock(mutex_);
    for (const auto& weak : connections_)
      if (auto connection = weak.lock()) alive.push_back(std::move(connection));
  }
  for (const auto& connection : alive) connection->withdraw(region.id);
}

}  // namespace kvxfer::shm
