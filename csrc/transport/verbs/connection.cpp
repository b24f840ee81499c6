// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/connection.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <bit>
#include <thread>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {
// Rounds of work before other connections get their turn, and completions taken in each.
constexpr int kMaxRounds = 16;
constexpr size_t kMaxCompletions = 32;
constexpr uint8_t kMaxReads = 16;  // in flight; more than any link's round trip asks for

uint8_t reads_of(int limit) { return static_cast<uint8_t>(std::clamp(limit, 1, int{kMaxReads})); }

// Failures that one request's addresses or keys have caused; any other is the path's.
bool is_requests_own(ibv_wc_status status) {
  switch (status) {
    case IBV_WC_LOC_LEN_ERR:
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_QP_OP_ERR:
    case IBV_WC_LOC_ACCESS_ERR:
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_REM_ACCESS_ERR:
    case IBV_WC_REM_OP_ERR:
      return true;
    default:
      return false;
  }
}
}  // namespace

struct VerbsConnection::ChannelHandler final : FdHandler {
  explicit ChannelHandler(std::shared_ptr<VerbsConnection> c) : connection(std::move(c)) {}
  void on_events(uint32_t) override {
    connection->completions_.hear();
    connection->host_.reactor().attend(connection);
  }
  std::shared_ptr<VerbsConnection> connection;
};

VerbsConnection::VerbsConnection(Host& host, std::shared_ptr<Device> device, MemoryTable& memory)
    : Connection("verbs"),
      host_(host),
      device_(device),
      completions_(device, Channel::num_entries(Channel::num_buffers(*device)) +
                               PullQueue::num_entries(PullQueue::depth(*device))),
      channel_(device, completions_.get(), Channel::num_buffers(*device)),
      pulls_(device, completions_.get(), PullQueue::depth(*device)),
      incoming_(channel_, pulls_, memory, *this, host),
      outgoing_(device, channel_, pulls_, memory, *this, host),
      served_(reads_of(device->limits().max_qp_rd_atom)),
      issued_(reads_of(device->limits().max_qp_init_rd_atom)) {
  QpShape shape;
  source_ = make_qp(*device_, completions_.get(), shape, IBV_ACCESS_REMOTE_READ);
  source_psn_ = random_psn();
  ends_ = {channel_.end(),
           pulls_.open(),
           {source_->qp_num, source_psn_},
           Channel::num_buffers(*device_),
           served_,
           issued_,
           0};
}

VerbsConnection::~VerbsConnection() {
  if (source_) (void)stop_qp(source_.get());
}

void VerbsConnection::connect(const Route& route, const Ends& remote) {
  route_ = route;
  issued_ = std::min(issued_, remote.served);
  served_ = std::max<uint8_t>(std::min(served_, remote.issued), 1);
  channel_.connect(route_, remote.control, remote.num_buffers);
  connect_qp(*device_, source_.get(), route_, remote.pull, source_psn_, served_, 0);
  pulls_.connect(route_, remote.source, issued_);
  pulls_.start();
}

std::optional<std::string> VerbsConnection::try_read(uint64_t address, uint32_t rkey,
                                                     Incarnation& out, int64_t deadline_ns) {
  ChunkPtr chunk = pulls_.new_chunk();
  static_assert(sizeof(outgoing_.scratch()) == sizeof(Incarnation));
  chunk->add(address, rkey, reinterpret_cast<std::byte*>(outgoing_.scratch().data()),
             outgoing_.scratch_lkey(), sizeof(Incarnation), 1);
  if (const int err = pulls_.post(std::move(chunk), false))
    return cat("ibv_post_send(RDMA_READ) failed: ", errno_text(err));
  while (now_ns() < deadline_ns) {
    ibv_wc completion;
    const int n = completions_.poll({&completion, 1});
    if (n < 0) return "ibv_poll_cq failed";
    if (n == 0) {
      std::this_thread::yield();
      continue;
    }
    if (completion.status != IBV_WC_SUCCESS)
      return cat(
          "an RDMA READ of the peer's memory failed: ", api().wc_status_str(completion.status),
          " (vendor error ", completion.vendor_err, "); the path is ", route_.path.reason);
    pulls_.recycle(pulls_.on_completion(completion).done);
    out = std::bit_cast<Incarnation>(outgoing_.scratch());
    return {};
  }
  return cat("an RDMA READ of the peer's memory was not answered in time; the path is ",
             route_.path.reason);
}

void VerbsConnection::start() {
  // On the progress thread, so that no event can find the token unset.
  host_.reactor().post([self = self()] {
    {
      std::lock_guard lock(self->mutex_);
      if (self->is_dead()) return;
    }
    self->token_ = self->host_.reactor().add(self->completions_.fd(), EPOLLIN,
                                             std::make_shared<ChannelHandler>(self));
    self->host_.reactor().attend(self);
  });
}

Status VerbsConnection::post(const RequestPtr& request) noexcept {
  bool needs_pump = false;
  const Status status = outgoing_.post(request, needs_pump);
  if (!status.ok()) {
    // The progress thread finds what is wrong with the channel, and ends it.
    if (channel_.error() != 0) host_.reactor().attend(self());
    return status;
  }
  counters.requests.fetch_add(1, std::memory_order_relaxed);
  host_.posted(*request);
  if (needs_pump) host_.reactor().attend(self());
  return status;
}

Cancelled VerbsConnection::cancel(const RequestPtr& request) noexcept {
  bool unanswered = false;
  const Cancelled result = outgoing_.cancel(request, unanswered);
  if (unanswered && !answers_watched_.exchange(true, std::memory_order_relaxed))
    watch_answers(now_ns());
  return result;
}

// ---------------------------------------------------------------- the progress thread

bool VerbsConnection::take_completions() {
  ibv_wc completions[kMaxCompletions];
  size_t n = 0;
  while (n < kMaxCompletions && !held_.empty()) {
    completions[n++] = held_.front();
    held_.pop_front();
  }
  if (n == 0) {
    const int got = completions_.poll(completions);
    if (got < 0) {
      die({.code = Code::kTransport, .text = cat("ibv_poll_cq on ", device_->name(), " failed")});
      return false;
    }
    n = static_cast<size_t>(got);
  }
  for (size_t i = 0; i < n && !is_dead(); ++i) handle(completions[i]);
  if (std::exchange(pull_failed_, false) && !is_dead()) break_pulls(true);
  return n > 0;
}

void VerbsConnection::handle(const ibv_wc& completion) {
  switch (work_of(completion.wr_id)) {
    case Work::kSend:
      if (completion.status != IBV_WC_SUCCESS) return control_failed(completion);
      channel_.on_sent(number_of(completion.wr_id));
      return;
    case Work::kReceive: {
      if (completion.status != IBV_WC_SUCCESS) return control_failed(completion);
      Type type{};
      switch (channel_.on_received(completion, type, body_)) {
        case Heard::kFragment:
          return;
        case Heard::kMalformed:
          return broken("a malformed message");
        case Heard::kMessage:
          return on_message(type, body_);
      }
      return;
    }
    case Work::kRead:
      return on_read(completion);
    case Work::kSendMarker:
    case Work::kReadMarker:
      return;  // of a queue pair that is gone
  }
}

void VerbsConnection::on_message(Type type, ByteView body) {
  bool sane = false;
  switch (type) {
    case Type::kCredit:
      sane = body.empty();
      break;
    case Type::kRequest:
      sane = incoming_.on_request(body);
      break;
    case Type::kPart:
      sane = incoming_.on_part(body);
      break;
    case Type::kAbort:
      sane = incoming_.on_abort(body);
      break;
    case Type::kReadDone:
      sane = incoming_.on_read_done(body);
      break;
    case Type::kWriteData:
      // These bytes land at once: nothing of a dead predecessor may land behind them.
      if (incoming_.held_back()) break_pulls(false);
      sane = is_dead() || incoming_.on_write_data(body);
      break;
    case Type::kOutcome:
      sane = outgoing_.on_outcome(body);
      break;
    case Type::kUseMessages:
      sane = outgoing_.on_use_messages(body);
      break;
    case Type::kMore:
      sane = outgoing_.on_more(body);
      break;
    case Type::kGranted:
      sane = outgoing_.on_granted(body);
      break;
    case Type::kReadData:
      sane = outgoing_.on_read_data(body);
      break;
    case Type::kPullBroken:
    case Type::kNewSource:
    case Type::kNewPuller:
    case Type::kSourceReady:
      return on_queue_pairs(type, body);
  }
  if (!sane) broken("a message that makes no sense");
}

void VerbsConnection::on_read(const ibv_wc& completion) {
  PullQueue::Outcome outcome = pulls_.on_completion(completion);
  if (completion.status != IBV_WC_SUCCESS && outcome.is_mine) pull_failed_ = true;
  if (!outcome.done) return;
  // While the queue pair is being stopped, a flush may come before the NIC has put away what it was
  // just receiving (Soft-RoCE copies on another CPU): such chains wait until it is destroyed.
  if (outcome.status != IBV_WC_SUCCESS && stopping_pulls_)
    parked_.emplace_back(std::move(outcome.done), outcome.status);
  else
    deliver(std::move(outcome.done), outcome.status);
}

void VerbsConnection::deliver(ChunkPtr chunk, ibv_wc_status status) {
  const bool is_write = chunk->job != nullptr;
  if (status == IBV_WC_SUCCESS) num_breaks_ = 0;
  if (!is_dead() && (status == IBV_WC_SUCCESS || is_requests_own(status))) {
    std::optional<Failure> failure;
    if (status != IBV_WC_SUCCESS)
      failure = Failure{
          .code = status == IBV_WC_REM_ACCESS_ERR ? Code::kRemoteAccess : Code::kTransport,
          .text = cat("an RDMA READ on ", device_->name(), " failed: ", api().wc_status_str(status),
                      " (vendor error ", pulls_.vendor_error(), ")")};
    is_write ? incoming_.on_landed(std::move(chunk), std::move(failure))
             : outgoing_.on_landed(std::move(chunk), std::move(failure));
  } else {
    is_write ? incoming_.on_flushed(std::move(chunk)) : outgoing_.on_flushed(std::move(chunk));
  }
}

bool VerbsConnection::step() {
  bool some = take_completions();
  if (is_dead()) return some;
  some |= channel_.flush();
  for (const bool incoming : {true, false}) {
    int err = 0;
    some |= incoming ? incoming_.pull_one(err) : outgoing_.pull_one(err);
    if (err == 0) continue;
    last_error_ = cat("ibv_post_send(RDMA_READ) failed: ", errno_text(err));
    break_pulls(true);
    if (is_dead()) return some;
  }
  if (!pulls_.is_empty()) watch_gates();
  some |= incoming_.serve_one();
  some |= outgoing_.pump();
  if (const int err = channel_.error())
    die({.code = Code::kTransport,
         .err = err,
         .text =
             cat("ibv_post_send or ibv_post_recv of a message on ", device_->name(), " failed")});
  else if (outgoing_.room_wanted())
    host_.writable(*this);
  return some;
}

bool VerbsConnection::poll() {
  bool some = false;
  incoming_.tell_late();
  for (int round = 0; round < kMaxRounds && !is_dead() && step(); ++round) some = true;
  return some;
}

bool VerbsConnection::doze() {
  if (is_dead()) return true;
  incoming_.tell_late();
  if (const int err = completions_.arm()) {
    die({.code = Code::kTransport,
         .err = err,
         .text = cat("ibv_req_notify_cq on ", device_->name(), " failed")});
    return true;
  }
  // What came before it was armed rings no bell.
  return !step();
}

// Takes completions until these have come; what is not of our READs is kept for later.
void VerbsConnection::drain(std::initializer_list<uint64_t> markers, int64_t bound_ns) {
  size_t missing = markers.size();
  const int64_t until_ns = now_ns() + bound_ns;
  while (missing > 0 && now_ns() < until_ns) {
    ibv_wc completions[kMaxCompletions];
    const int n = completions_.poll(completions);
    if (n < 0) return;
    if (n == 0) std::this_thread::yield();
    for (int i = 0; i < n; ++i) {
      const ibv_wc& each = completions[i];
      if (std::find(markers.begin(), markers.end(), each.wr_id) != markers.end())
        --missing;
      else if (work_of(each.wr_id) == Work::kRead)
        on_read(each);
      else
        held_.push_back(each);
    }
  }
}

void VerbsConnection::control_failed(const ibv_wc& completion) {
  const bool lost = completion.status == IBV_WC_RETRY_EXC_ERR;
  die({.code = lost ? Code::kPeerDisconnected : Code::kTransport,
       .text = cat("the control queue pair on ", device_->name(), " failed: ",
                   api().wc_status_str(completion.status), " (vendor error ", completion.vendor_err,
                   ")", lost ? ": the peer's host or the network does not answer" : "")});
}

void VerbsConnection::broken(const char* what) {
  die({.code = Code::kTransport, .text = cat("the peer broke the verbs protocol: ", what)});
}

// ERR first, so that everything posted comes back; then destroyed, after which neither NIC touches
// our memory; then the requests end.
void VerbsConnection::die(const Failure& cause) {
  {
    std::lock_guard lock(mutex_);
    if (dead_.exchange(true, std::memory_order_relaxed)) return;
  }
  if (token_ != 0) host_.reactor().remove(token_, completions_.fd());
  host_.reactor().cancel(gates_timer_);
  if (source_) (void)stop_qp(source_.get());
  stopping_pulls_ = true;
  const bool control_marked = channel_.stop(), pulls_marked = pulls_.stop();
  if (control_marked && pulls_marked)
    drain({work_id(Work::kSendMarker, 0), pulls_.marker()}, kFlushNs);
  else if (pulls_marked)
    drain({pulls_.marker()}, kFlushNs);
  else if (control_marked)
    drain({work_id(Work::kSendMarker, 0)}, kFlushNs);
  channel_.destroy();
  close_pulls();
  source_.reset();
  held_.clear();
  incoming_.clear();
  outgoing_.end_all(cause);
  host_.lost(*this, cause);
}

void VerbsConnection::close(const Failure& cause) noexcept {
  if (host_.reactor().on_thread()) return die(cause);
  host_.reactor().post([self = self(), cause] { self->die(cause); });
}

std::string VerbsConnection::describe() const {
  return cat("verbs: ", device_->name(), ", ", route_.path.reason, ", MTU ", 128 << route_.mtu,
             ", ", int{issued_}, " READs in flight, gives up after ", int{route_.retry_count},
             " retries of ", (int64_t{4096} << route_.timeout) / 1'000'000,
             " ms; the owner pulls: no region is remotely writable; ",
             num_replaced_.load(std::memory_order_relaxed), " queue pair(s) replaced");
}

}  // namespace kvxfer::verbs
