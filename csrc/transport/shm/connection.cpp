// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/shm/connection.hpp"

#include <sys/epoll.h>

#include <utility>

#include "common/error.hpp"

namespace kvxfer::shm {

namespace {
// Rounds of work (a message, a chunk, a staging slot) before other connections get their turn.
constexpr int kMaxRounds = 16;

enum class SocketType : uint32_t { kRegion = 1, kWithdrawn = 2, kBye = 3, kWords = 4 };
struct SocketMessage {
  SocketType type{};
  uint32_t reserved = 0;
  uint64_t region = 0;
  uint64_t nbytes = 0;
};

bool send_shown(int socket, const SocketMessage& message, ByteView shown, int fd) noexcept {
  Bytes bytes;
  Writer writer(bytes);
  writer.put(message);
  writer.raw(shown);
  return send(socket, bytes, {&fd, fd >= 0 ? size_t{1} : size_t{0}});
}
}  // namespace

struct ShmConnection::BellHandler final : FdHandler {
  explicit BellHandler(std::shared_ptr<ShmConnection> c) : connection(std::move(c)) {}
  void on_events(uint32_t) override {
    connection->channel_.hear_bell();
    connection->host_.reactor().attend(connection);
  }
  std::shared_ptr<ShmConnection> connection;
};

struct ShmConnection::SocketHandler final : FdHandler {
  explicit SocketHandler(std::shared_ptr<ShmConnection> c) : connection(std::move(c)) {}
  void on_events(uint32_t) override { connection->read_socket(); }
  std::shared_ptr<ShmConnection> connection;
};

ShmConnection::ShmConnection(Host& host, Parts parts)
    : Connection(parts.reach->transport()),
      host_(host),
      socket_(std::move(parts.socket)),
      reach_(std::move(parts.reach)),
      channel_(std::move(parts.control), parts.me, std::move(parts.staging),
               std::move(parts.peer_staging), std::move(parts.my_bell), std::move(parts.peer_bell)),
      outgoing_(
          channel_, *this, host,
          [](void* self, const Region& region) {
            return static_cast<ShmConnection*>(self)->show(region);
          },
          this),
      incoming_(
          channel_, *this, host, make_copiers(host, this),
          [](void* self, uint64_t region) {
            return static_cast<ShmConnection*>(self)->source(region);
          },
          [](void* context, const Region& region) {
            return static_cast<ShmConnection*>(context)->show(region);
          },
          this) {}

void ShmConnection::start() {
  // On the progress thread, so that no event can find the tokens unset.
  host_.reactor().post([self = self()] {
    {
      std::lock_guard lock(self->mutex_);
      if (self->dead_) return;
    }
    self->bell_token_ = self->host_.reactor().add(self->channel_.bell(), EPOLLIN,
                                                  std::make_shared<BellHandler>(self));
    self->socket_token_ = self->host_.reactor().add(self->socket_.get(), EPOLLIN | EPOLLRDHUP,
                                                    std::make_shared<SocketHandler>(self));
    self->host_.reactor().attend(self);
  });
}

Status ShmConnection::post(const RequestPtr& request) noexcept {
  bool needs_pump = false;
  const Status status = outgoing_.post(request, needs_pump);
  if (!status.ok()) return status;
  counters.requests.fetch_add(1, std::memory_order_relaxed);
  host_.posted(*request);
  if (needs_pump) host_.reactor().attend(self());
  return status;
}

Cancelled ShmConnection::cancel(const RequestPtr& request) noexcept {
  return outgoing_.cancel(request);
}

bool ShmConnection::show(const Region& region) noexcept {
  if (!reach_->can_show(region)) return false;
  std::lock_guard lock(mutex_);
  if (dead_) return false;
  if (shown_.contains(region.id)) return true;
  // First the words: who has the region has what a grant on it refers to.
  if (const auto& words = region.gate.word().words(); words && !show_words(*words)) return false;
  int fd = -1;
  const Bytes shown = reach_->show(region, fd);
  if (!send_shown(socket_.get(), {SocketType::kRegion, 0, region.id, region.nbytes}, shown, fd))
    return false;
  shown_.insert(region.id);
  return true;
}

// Under the lock.
bool ShmConnection::show_words(const ExportedWords& words) noexcept {
  if (words_shown_) return true;
  int fd = -1;
  const Bytes shown = reach_->show(words, fd);
  words_shown_ =
      send_shown(socket_.get(), {SocketType::kWords, 0, 0, ExportedWords::kBytes}, shown, fd);
  return words_shown_;
}

void ShmConnection::withdraw(uint64_t region) noexcept {
  std::lock_guard lock(mutex_);
  if (dead_ || shown_.erase(region) == 0) return;
  const SocketMessage message{SocketType::kWithdrawn, 0, region, 0};
  // If the peer's socket is full it keeps what we showed for longer: no harm but the memory.
  [[maybe_unused]] const bool sent = send(socket_.get(), view_of(message), {});
}

std::shared_ptr<PeerMemory> ShmConnection::source(uint64_t region) {
  auto found = taken_.find(region);
  if (found == taken_.end()) {
    read_socket();  // the announcement was sent before the record that names it
    found = taken_.find(region);
  }
  return found == taken_.end() ? nullptr : found->second;
}

void ShmConnection::read_socket() {
  Bytes bytes;
  std::vector<Fd> fds;
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (dead_) return;
    }
    const Received received = receive(socket_.get(), bytes, fds, 1);
    if (received == Received::kAgain) return;
    if (received == Received::kClosed) {
      die({.code = Code::kPeerDisconnected, .text = "the peer's process or engine ended"});
      return;
    }
    Reader reader(bytes);
    const auto message = reader.get<SocketMessage>();
    if (received == Received::kBroken || !reader.ok()) return broken("a malformed socket message");
    const ByteView shown = reader.take(reader.remaining());
    Fd fd = fds.empty() ? Fd{} : std::move(fds[0]);
    std::string reason;
    if (message.type == SocketType::kWithdrawn && !fd) {
      taken_.erase(message.region);
    } else if (message.type == SocketType::kBye) {
      return die({.code = Code::kPeerDisconnected, .text = "the peer closed its engine"});
    } else if (message.type == SocketType::kWords) {
      if (!reach_->take_words(shown, std::move(fd), reason)) return broken(reason.c_str());
    } else if (message.type == SocketType::kRegion && taken_.size() < kMaxRegions &&
               !taken_.contains(message.region)) {
      auto memory = reach_->take(message.nbytes, shown, std::move(fd), reason);
      if (!memory) return broken(reason.c_str());
      taken_.emplace(message.region, std::move(memory));
    } else {
      return broken("an unexpected socket message");
    }
    std::lock_guard lock(mutex_);
    num_taken_ = taken_.size();
  }
}

bool ShmConnection::take_message() {
  if (is_dead()) return false;  // by the message before, whose source was asked for over the socket
  uint32_t type = 0;
  switch (channel_.peek_message(type, body_)) {
    case Pop::kEmpty:
      return false;
    case Pop::kBroken:
      broken("a message ring out of its bounds");
      return false;
    case Pop::kRecord:
      break;
  }
  channel_.release_message();
  bool sane = false;
  switch (static_cast<Type>(type)) {
    case Type::kRequest:
      sane = incoming_.on_request(body_);
      break;
    case Type::kReadPart:
      sane = incoming_.on_read_part(body_);
      break;
    case Type::kAbort:
      sane = incoming_.on_abort(body_);
      break;
    case Type::kReadDone:
      sane = incoming_.on_read_done(body_);
      break;
    case Type::kGranted: {
      Reader reader(body_);
      const auto head = reader.get<GrantHead>();
      sane = reader.finished() && outgoing_.on_granted(head, source(head.region));
      break;
    }
    case Type::kOutcome: {
      Reader reader(body_);
      const auto outcome = reader.get<OutcomeHead>();
      const ByteView text = reader.take(reader.remaining());
      sane = reader.ok() && outgoing_.on_outcome(
                                outcome, {reinterpret_cast<const char*>(text.data()), text.size()});
      break;
    }
    default:
      break;
  }
  if (!sane) broken("a malformed message");
  return sane;
}

bool ShmConnection::take_bulk() {
  if (is_dead()) return false;
  if (!bulk_held_) {
    switch (channel_.peek_bulk(held_type_, held_)) {
      case Pop::kEmpty:
        return false;
      case Pop::kBroken:
        broken("a bulk ring out of its bounds");
        return false;
      case Pop::kRecord:
        break;
    }
    // The head of its request was pushed before it, into the other ring: read up first what stands
    // there now, and not what a peer adds meanwhile.
    const uint64_t end = channel_.messages_end();
    while (channel_.has_message_before(end) && take_message()) {
    }
    if (is_dead()) return false;
  }
  bool sane = false, finished = true;
  switch (static_cast<Type>(held_type_)) {
    case Type::kSpans:
      sane = incoming_.on_spans(held_, finished);
      break;
    case Type::kStaged:
      sane = incoming_.on_staged(held_, finished);
      break;
    case Type::kCheck:
      sane = incoming_.on_check(held_);
      break;
    case Type::kReadData: {
      Reader reader(held_);
      const auto head = reader.get<StageHead>();
      sane =
          reader.finished() && head.stage_slot < kNumStageSlots && head.nbytes <= kStageSlotBytes;
      const auto stage = sane ? channel_.take_stage() : std::nullopt;
      sane = stage && outgoing_.on_read_data(head, channel_.peer_stage(head.stage_slot));
      if (stage) channel_.return_stage(*stage);
      break;
    }
    default:
      break;
  }
  if (!sane) {
    broken("a malformed bulk record");
    return false;
  }
  bulk_held_ = !finished;
  if (finished) channel_.release_bulk();
  return finished;
}

bool ShmConnection::step() {
  bool some = channel_.flush();
  some |= take_message();
  some |= incoming_.collect();
  some |= incoming_.copy_one();
  some |= take_bulk();
  some |= incoming_.serve_one();
  some |= outgoing_.pull_one();
  some |= outgoing_.pump();
  if (outgoing_.room_wanted()) host_.writable(*this);
  return some;
}

bool ShmConnection::poll() {
  bool some = false;
  incoming_.tell_late();
  for (int round = 0; round < kMaxRounds && !is_dead() && step(); ++round) some = true;
  if (channel_.broken()) broken("a ring position out of its bounds");
  return some;
}

bool ShmConnection::doze() {
  if (is_dead()) return true;
  incoming_.tell_late();
  return channel_.prepare_sleep(bulk_held_);
}

std::shared_ptr<CopyClient> ShmConnection::make_copiers(Host& host, ShmConnection* connection) {
  if (!host.copy_pool()) return nullptr;
  // Copiers call it only while the connection is alive: clear() waits for them.
  return std::make_shared<CopyClient>(host.copy_pool(), [&reactor = host.reactor(), connection] {
    reactor.post([weak = connection->weak_from_this(), &reactor] {
      if (auto alive = std::static_pointer_cast<ShmConnection>(weak.lock())) reactor.attend(alive);
    });
  });
}

void ShmConnection::broken(const char* what) {
  die({.code = Code::kTransport, .text = cat("the peer broke the shm protocol: ", what)});
}

void ShmConnection::die(const Failure& cause) {
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(dead_, true)) return;
  }
  if (bell_token_ != 0) host_.reactor().remove(bell_token_, channel_.bell());
  if (socket_token_ != 0) host_.reactor().remove(socket_token_, socket_.get());
  if (cause.code ==
      Code::kCancelled) {  // our engine closes: the peer may know that it is no accident
    const SocketMessage bye{.type = SocketType::kBye};
    [[maybe_unused]] const bool sent = send(socket_.get(), view_of(bye), {});
  }
  socket_.reset();  // the peer sees it at once
  incoming_.clear();
  outgoing_.end_all(cause);
  taken_.clear();
  host_.lost(*this, cause);
}

void ShmConnection::close(const Failure& cause) noexcept {
  if (host_.reactor().on_thread()) return die(cause);
  host_.reactor().post([self = self(), cause] { self->die(cause); });
}

// Only the progress thread, and the copiers that it waits for in die(), are ever inside a copy or a
// system call of ours; and the engine joins that one.
void ShmConnection::join() noexcept {}

std::string ShmConnection::describe() const {
  std::lock_guard lock(mutex_);
  return cat(transport(), ": Unix socket and shared rings; ", reach_->describe(), "; ",
             "directly readable, each from its first use on: ", shown_.size(),
             " of our regions by the peer, ", num_taken_, " of its by us");
}

}  // namespace kvxfer::shm
