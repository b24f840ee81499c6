// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Queue pairs that end, completion queues that overflow, ports that go down.
#include <poll.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "facts.hpp"

namespace facts {
namespace {

std::string events(Device& device, std::chrono::milliseconds patience) {
  std::string seen;
  const auto end = std::chrono::steady_clock::now() + patience;
  while (std::chrono::steady_clock::now() < end) {
    pollfd descriptor{.fd = device.context->async_fd, .events = POLLIN, .revents = 0};
    if (poll(&descriptor, 1, 100) <= 0) continue;
    ibv_async_event event{};
    if (ibv_get_async_event(device.context, &event) != 0) break;
    seen += (seen.empty() ? "" : ", ") + std::string(ibv_event_type_str(event.event_type));
    ibv_ack_async_event(&event);
  }
  return seen.empty() ? "none" : seen;
}

}  // namespace

void end_facts(World& world) {
  Memory from(world.here, 5), to(world.there);
  std::vector<ibv_sge> sges(16, from.sge(0, 524288));
  const auto chain_of = [&](std::vector<ibv_send_wr>& chain) {
    chain.clear();
    for (uint64_t i = 0; i < 16; ++i)
      chain.push_back(write_of(&sges[i], 1, to.address(), to.mr->rkey, i));
    for (size_t i = 0; i + 1 < 16; ++i) chain[i].next = &chain[i + 1];
  };
  std::vector<ibv_send_wr> chain;
  {
    Pair pair(world);
    pair.target.to(IBV_QPS_ERR);  // it answers nothing, so that all stays outstanding
    chain_of(chain);
    pair.initiator.post(chain[0]);
    pair.initiator.to(IBV_QPS_ERR);
    size_t flushed = 0, in_order = 0;
    for (uint64_t i = 0; const auto done = pair.initiator.next(2000ms); ++i) {
      flushed += done->status == IBV_WC_WR_FLUSH_ERR;
      in_order += done->wr_id == i;
    }
    say("16 outstanding writes, then ERR",
        std::to_string(flushed) + " flushed, " + std::to_string(in_order) + " in order");
    chain_of(chain);
    chain[0].next = nullptr;
    const int error = pair.initiator.post(chain[0]);
    say("post in ERR", std::string(std::strerror(error)) + ", " + pair.initiator.status(2000ms));
  }
  {
    Pair pair(world);
    pair.target.to(IBV_QPS_ERR);
    chain_of(chain);
    pair.initiator.post(chain[0]);
    pair.initiator.to(IBV_QPS_RESET);
    size_t count = 0;
    while (pair.initiator.next(2000ms)) ++count;
    say("16 outstanding writes, then RESET", std::to_string(count) + " completions");
  }
  {
    Limits limits;
    limits.timeout = 14;  // 67 ms
    limits.retries = 2;
    Pair pair(world, limits);
    pair.target.to(IBV_QPS_ERR);
    const auto began = std::chrono::steady_clock::now();
    std::fill_n(to.bytes, 4096, 0);
    const std::string status = written(pair, from, to.address(), to.mr->rkey);
    const auto took = std::chrono::steady_clock::now() - began;
    say("write to a QP that its owner moved to ERR (timeout 67 ms, 2 retries)",
        status + (to.bytes[0] == 0 ? ", nothing landed" : ", bytes LANDED") + ", after " +
            std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(took).count()) +
            " ms");
  }
  for (const uint8_t retries : {6, 7}) {
    Limits limits;
    limits.timeout = 12;  // 17 ms
    limits.retries = retries;
    Pair pair(world, limits);
    pair.target.to(IBV_QPS_ERR);
    ibv_sge sge = from.sge(0, 4096);
    ibv_send_wr request = write_of(&sge, 1, to.address(), to.mr->rkey);
    pair.initiator.post(request);
    say("the same with " + std::to_string(retries) + " retries of 17 ms, within 3 s",
        pair.initiator.status(3000ms));
  }
  {
    Pair pair(world);
    auto gone = std::make_unique<Memory>(world.there);
    const uint64_t address = gone->address();
    const uint32_t rkey = gone->mr->rkey;
    ibv_dereg_mr(gone->mr);
    gone->mr = nullptr;
    say("write to a deregistered region", written_then_states(pair, from, address, rkey));
  }
  {
    Limits limits;
    limits.cqe = 4;
    Pair pair(world, limits);
    ibv_sge sge = from.sge(0, 64);
    for (uint64_t i = 0; i < 16; ++i) {
      ibv_send_wr request = write_of(&sge, 1, to.address(), to.mr->rkey, i);
      pair.initiator.post(request);
    }
    std::this_thread::sleep_for(500ms);
    size_t count = 0;
    while (pair.initiator.next(500ms)) ++count;
    say("16 completions into a CQ of 4, polled late",
        std::to_string(count) + " came (CQ made with " + std::to_string(pair.initiator.cq->cqe) +
            "), QP " + name_of(pair.initiator.state()) +
            ", asynchronous events: " + events(world.here, 500ms));
  }
}

void event_facts(World& world, const std::string& interface, const std::string& name) {
  Device& device = world.here;
  Memory from(device, 5), to(world.there);
  events(device, 200ms);
  {
    Limits limits;
    limits.retries = 2;
    Pair pair(world, limits);
    if (std::system(("ip link set " + interface + " down").c_str()) != 0)
      fail("ip link set down", EPROTO);
    say("asynchronous events when the interface goes down", events(device, 1500ms));
    ibv_port_attr port{};
    ibv_query_port(device.context, 1, &port);
    say("port state then", ibv_port_state_str(port.state));
    say("a write then (2 retries of 67 ms; to itself, so not over the wire)",
        written(pair, from, to.address(), to.mr->rkey));
    if (std::system(("ip link set " + interface + " up").c_str()) != 0)
      fail("ip link set up", EPROTO);
    say("asynchronous events when it comes back", events(device, 1500ms));
  }
  {
    Pair pair(world);
    // In the background: Soft-RoCE lets the command wait until the last process has closed the
    // device.
    if (std::system(("rdma link delete " + name + " &").c_str()) != 0)
      fail("rdma link delete", EPROTO);
    say("asynchronous events when the device is removed", events(device, 3000ms));
    ibv_sge sge = from.sge(0, 64);
    ibv_send_wr request = write_of(&sge, 1, to.address(), to.mr->rkey);
    const int error = pair.initiator.post(request);
    say("a post then", std::string(std::strerror(error)) + ", " + pair.initiator.status(1000ms));
    ibv_qp_attr attributes{};
    attributes.qp_state = IBV_QPS_ERR;
    say("ibv_modify_qp then",
        std::strerror(ibv_modify_qp(pair.initiator.qp, &attributes, IBV_QP_STATE)));
  }
}

}  // namespace facts
