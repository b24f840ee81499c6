// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/faulty/transport.hpp"

#include <utility>

#include "common/error.hpp"
#include "transport/registry.hpp"

namespace kvxfer::faulty {
namespace {

std::unique_ptr<Transport> make_below(const Plan& plan, const TransportConfig& config) {
  auto below = make_transport(plan.wrap, config);
  if (!below) fail(Code::kInvalidArgument, "faults: there is no transport '", plan.wrap, "'");
  return below;
}

// Ours on top of one below; set in adopt(), before anything can come.
std::shared_ptr<FaultyConnection> above(Connection& below) {
  return std::static_pointer_cast<FaultyConnection>(below.peer.lock());
}

Request& whole(Request& request) {
  auto* half = dynamic_cast<Truncated*>(&request);
  return half != nullptr ? *half->whole : request;
}

}  // namespace

FaultyTransport::FaultyTransport(const TransportConfig& config)
    : plan_(parse_plan(config.faults)), below_(make_below(plan_, config)) {}

FaultyTransport::~FaultyTransport() = default;

void FaultyTransport::start(Host& host) {
  host_ = &host;
  below_->start(*this);
}

void FaultyTransport::adopt(const Key& session, std::shared_ptr<Connection> connection) {
  const uint64_t number = num_connections_.fetch_add(1, std::memory_order_relaxed);
  auto ours = std::make_shared<FaultyConnection>(*host_, plan_, plan_.seed + number, connection);
  connection->peer = ours;
  host_->adopt(session, std::move(ours));
}

void FaultyTransport::posted(Request& request) noexcept { host_->posted(whole(request)); }

void FaultyTransport::ended(Connection& from, const RequestPtr& request,
                            Completion completion) noexcept {
  if (auto ours = above(from)) ours->on_ended(request->id, std::move(completion));
}

void FaultyTransport::quiesced(Request& request) noexcept { host_->quiesced(whole(request)); }

void FaultyTransport::writable(Connection& from) noexcept {
  if (auto ours = above(from)) ours->on_writable();
}

void FaultyTransport::unshown(Connection& from, const Request& request) noexcept {
  if (auto ours = above(from)) host_->unshown(*ours, request);
}

std::optional<Failure> FaultyTransport::admit(Connection& from, const Access& access,
                                              Landing& out) noexcept {
  auto ours = above(from);
  if (!ours) return Failure{.code = Code::kPeerDisconnected, .text = "the connection is closing"};
  return host_->admit(*ours, access, out);
}

std::optional<Failure> FaultyTransport::accept(Connection& from, Landing& landing,
                                               Arrival arrival) noexcept {
  auto ours = above(from);
  if (!ours) return Failure{.code = Code::kPeerDisconnected, .text = "the connection is closing"};
  auto failure = host_->accept(*ours, landing, std::move(arrival));
  ours->mirror();
  return failure;
}

void FaultyTransport::lost(Connection& from, const Failure& cause) noexcept {
  if (auto ours = above(from)) ours->on_lost(cause);
}

}  // namespace kvxfer::faulty
