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
// Rounds of work before other connections get their turn.
constexpr int kMaxRounds = 16;

bool is_dead_chunk(const ChunkPtr& chunk) { return Incoming::is_dead(*chunk); }
}  // namespace

struct VerbsConnection::ChannelHandler final : FdHandler {
  ChannelHandler(std::shared_ptr<VerbsConnection> c, CompletionQueue& q)
      : connection(std::move(c)), queue(q) {}
  void on_events(uint32_t) override {
    queue.hear();
    connection->host_.reactor().attend(connection);
  }
  std::shared_ptr<VerbsConnection> connection;
  CompletionQueue& queue;
};

VerbsConnection::VerbsConnection(Host& host, const Devices& devices, bool by_nearness,
                                 MemoryTable& memory, std::string why_no_push)
    : Connection("verbs"),
      host_(host),
      memory_(memory),
      why_no_push_(std::move(why_no_push)),
      rails_(devices, by_nearness, Channel::num_entries(Channel::num_buffers(devices)),
             why_no_push_.empty()),
      channel_(devices, rails_.queues()),
      windows_(channel_, rails_, memory, *this, host,
               [this](const Lease& lease, const Failure& failure) {
                 incoming_.stop_pushes(lease, failure);
               }),
      incoming_(channel_, rails_, memory, windows_, *this, host),
      outgoing_(devices, channel_, rails_, memory, *this, host, why_no_push_.empty()) {
  for (const auto& rail : rails_) rail->end.control = channel_.open(rail->number, 0);
}

VerbsConnection::~VerbsConnection() = default;

Ends VerbsConnection::ends() const {
  Ends ends{channel_.num_buffers(), 0, {}};
  for (const auto& rail : rails_) ends.rails.push_back(rail->end);
  return ends;
}

void VerbsConnection::connect(Side side, const std::vector<Route>& routes, const Ends& remote,
                              const Incarnation& peer) {
  side_ = side;
  peer_word_ = remote.word;
  peer_ = peer;
  for (const auto& rail : rails_) {
    const RailEnd& there = remote.rails[rail->number];
    rail->connect(routes[rail->number], there);
    connect_control(*rail, there.control);
  }
  channel_.begin(remote.num_buffers);
}

std::optional<std::string> VerbsConnection::try_first(int64_t deadline_ns) {
  Rail& rail = rails_[0];
  probe(rail);
  if (const int err = rail.pulls.post_error())
    return cat("ibv_post_send(RDMA_READ) failed: ", errno_text(err));
  while (now_ns() < deadline_ns) {
    ibv_wc completion;
    const int n = rail.completions.poll({&completion, 1});
    if (n < 0) return "ibv_poll_cq failed";
    if (n == 0) {
      std::this_thread::yield();
      continue;
    }
    if (completion.status != IBV_WC_SUCCESS)
      return cat(
          "an RDMA READ of the peer's memory failed: ", api().wc_status_str(completion.status),
          " (vendor error ", completion.vendor_err, "); the path is ", rail.route.path.reason);
    rails_.recycle(rail.pulls.on_completion(completion).done);
    if (std::bit_cast<Incarnation>(outgoing_.scratch(rail)) == peer_) return {};
    return "what answers at the peer's RDMA address is another engine";
  }
  return cat("an RDMA READ of the peer's memory was not answered in time; the path is ",
             rail.route.path.reason);
}

void VerbsConnection::start() {
  // On the progress thread, so that no event can find a token unset.
  host_.reactor().post([self = self()] {
    {
      std::lock_guard lock(self->mutex_);
      if (self->is_dead()) return;
    }
    for (const auto& rail : self->rails_)
      rail->token =
          self->host_.reactor().add(rail->completions.fd(), EPOLLIN,
                                    std::make_shared<ChannelHandler>(self, rail->completions));
    // The first one has been tried, by us or by the peer; the others are now.
    self->rails_[0].pulls.start();
    self->rails_[0].in_use.store(true, std::memory_order_relaxed);
    for (const auto& rail : self->rails_)
      if (rail->number > 0) self->probe(*rail);
    self->host_.reactor().attend(self);
  });
}

std::optional<std::string> VerbsConnection::refuses(const Request& request) const {
  // Without an id it is explain()'s, who asks about memory in general.
  if (!request.local || !request.local->is_on_gpu() || request.local->id == 0 ||
      memory_.find(request.local->id))
    return {};
  return cat("our region '", request.local->name, "' is memory of ",
             device_text(request.local->device), " and not registered");
}

Status VerbsConnection::post(const RequestPtr& request) noexcept {
  bool needs_pump = false;
  const Status status = outgoing_.post(request, needs_pump);
  // The progress thread finds what is wrong with the channel, and moves it.
  if (channel_.error() != 0) host_.reactor().attend(self());
  if (!status.ok()) return status;
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
  // Its chains are not to be posted; and as in post().
  if (!result.quiesced || why_no_push_.empty() || channel_.error() != 0)
    host_.reactor().attend(self());
  return result;
}

// ---------------------------------------------------------------- the progress thread

bool VerbsConnection::take_completions(Rail& rail) {
  if (rail.held.empty()) {
    ibv_wc completions[kMaxCompletions];
    const int got = rail.completions.poll(completions);
    if (got < 0) {
      on_port_event(*rail.device, false, "ibv_poll_cq failed");
      return false;
    }
    rail.held.assign(completions, completions + got);
  }
  // One by one out of the queue: whoever drains meanwhile takes what is his from the rest.
  const size_t n = std::min(rail.held.size(), kMaxCompletions);
  for (size_t i = 0; i < n && !is_dead() && !rail.held.empty(); ++i) {
    const ibv_wc completion = rail.held.front();
    rail.held.pop_front();
    handle(rail, completion);
  }
  if (std::exchange(rail.failed, false) && !is_dead()) break_pulls(rail, Why::kFailed);
  if (rail.control_failed && !is_dead()) control_failed(rail, Failure(*rail.control_failed));
  if (rail.push && !is_dead()) {
    if (std::exchange(rail.push->failed, false))
      break_writer(rail, Why::kFailed, api().wc_status_str(rail.push->writes.first_error()));
    if (std::exchange(rail.push->sink_failed, false)) replace_sink(rail);
  }
  return n > 0;
}

void VerbsConnection::handle(Rail& rail, const ibv_wc& completion) {
  switch (work_of(completion.wr_id)) {
    case Work::kSend:
    case Work::kReceive:
      on_control(rail, completion);
      (void)take_messages();
      return;
    case Work::kRead:
      return on_read(rail, completion);
    case Work::kWrite:
      return on_written(rail, completion);
    case Work::kWindow:
    case Work::kArrival:
    case Work::kSinkMarker:
      return on_sink(rail, completion);
    case Work::kSendMarker:
    case Work::kReadMarker:
    case Work::kWriteMarker:
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
      for (const auto& rail : rails_)
        if (incoming_.held_back() && std::ranges::any_of(rail->pulls.in_flight(), is_dead_chunk))
          break_pulls(*rail, Why::kWanted);
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
    case Type::kNewControl:
      return on_queue_pairs(type, body);
    default:
      sane = on_push_message(type, body);
      break;
  }
  if (!sane) broken("a message that makes no sense");
}

void VerbsConnection::on_read(Rail& rail, const ibv_wc& completion) {
  ChainQueue::Outcome outcome = rail.pulls.on_completion(completion);
  if (completion.status != IBV_WC_SUCCESS && outcome.is_mine) rail.failed = true;
  if (!outcome.done) return;
  // While the queue pair is being stopped, a flush may come before the NIC has put away what it was
  // just receiving (Soft-RoCE copies on another CPU): such chains wait until it is destroyed.
  if (outcome.status != IBV_WC_SUCCESS && rail.stopping)
    rail.parked.emplace_back(std::move(outcome.done), outcome.status);
  else
    deliver(rail, std::move(outcome.done), outcome.status);
}

void VerbsConnection::deliver(Rail& rail, ChunkPtr chunk, ibv_wc_status status) {
  if (chunk->probe) return on_probed(rail, std::move(chunk), status);
  const bool is_write = chunk->job != nullptr;
  if (status == IBV_WC_SUCCESS) {
    rail.num_breaks = 0;
    if (!chunk->words) {
      rail.num_chains.fetch_add(1, std::memory_order_relaxed);
      rail.num_bytes.fetch_add(chunk->nbytes(), std::memory_order_relaxed);
    }
  }
  if (!is_dead() && (status == IBV_WC_SUCCESS || is_requests_own(status))) {
    std::optional<Failure> failure;
    if (status != IBV_WC_SUCCESS)
      failure =
          Failure{.code = status == IBV_WC_REM_ACCESS_ERR ? Code::kRemoteAccess : Code::kTransport,
                  .text = cat("an RDMA READ on ", rail.device->name(),
                              " failed: ", api().wc_status_str(status), " (vendor error ",
                              rail.pulls.vendor_error(), ")")};
    is_write ? incoming_.on_landed(std::move(chunk), std::move(failure))
             : outgoing_.on_landed(std::move(chunk), std::move(failure));
  } else {
    is_write ? incoming_.on_flushed(std::move(chunk)) : outgoing_.on_flushed(std::move(chunk));
  }
}

bool VerbsConnection::step() {
  bool some = take_messages();
  if (channel_.is_overrun() && !is_dead())
    broken("it goes on asking, and takes none of the answers");
  if (is_dead()) return some;
  for (const auto& rail : rails_) {
    some |= take_completions(*rail);
    if (is_dead()) return some;
  }
  some |= channel_.flush();
  // A peer that makes no other source for us must not keep from ending what was posted on the last.
  some |= outgoing_.drop_unwanted();
  if (rails_.any_room()) {
    some |= incoming_.pull_one();
    some |= outgoing_.pull_one();
  }
  if (why_no_push_.empty()) some |= step_pushes();
  if (is_dead()) return true;
  bool any_in_flight = false;
  for (const auto& rail : rails_) {
    if (const int err = rail->pulls.post_error(); err != 0 && rail->pulls.is_open()) {
      rail->last_error = cat("ibv_post_send(RDMA_READ) failed: ", errno_text(err));
      break_pulls(*rail, Why::kFailed);
      if (is_dead()) return true;
    }
    any_in_flight |= !rail->pulls.is_empty();
  }
  if (any_in_flight) watch_gates();
  some |= incoming_.serve_one();
  some |= outgoing_.pump();
  if (const int err = channel_.error()) {
    Rail& rail = rails_[channel_.rail()];
    control_failed(rail, {.code = Code::kTransport,
                          .err = err,
                          .text = cat("ibv_post_send or ibv_post_recv of a message on ",
                                      rail.device->name(), " failed")});
    some = true;
  }
  if (!is_dead() && outgoing_.room_wanted()) host_.writable(*this);
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
  for (const auto& rail : rails_) {
    const int err = rail->completions.arm();
    if (err == 0 || rail->down) continue;
    on_port_event(*rail->device, false, cat("ibv_req_notify_cq failed: ", errno_text(err)));
    if (is_dead()) return true;
  }
  // What came before it was armed rings no bell.
  return !step();
}

}  // namespace kvxfer::verbs
