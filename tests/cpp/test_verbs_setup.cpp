// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How queue pairs and connections are set up: what NICs are asked for, and what is said where a
// step fails or the two sides do not speak alike.
#include <cerrno>
#include <string>
#include <string_view>
#include <vector>

#include "engine_pair.hpp"
#include "transport/verbs/completion_queue.hpp"
#include "transport/verbs/queue_pair.hpp"
#include "transport/verbs/records.hpp"
#include "transport/verbs/transport.hpp"
#include "verbs_plan.hpp"

using namespace kvxfer;
using namespace kvxfer::verbs;

namespace {

std::shared_ptr<Device> first_device() {
  std::string reason;
  const auto takes_all = [](const Device&) { return std::string(); };
  const Devices devices = Device::open_all({}, takes_all, reason);
  REQUIRE_MESSAGE(!devices.empty(), reason);
  return devices.front();
}

Route route_to_itself(const Device& device) {
  std::string reason;
  const auto path = choose_path(device.address(), device.address(), -1, reason);
  REQUIRE_MESSAGE(path.has_value(), reason);
  return {.path = *path, .mtu = IBV_MTU_2048, .timeout = 13, .retry_count = 5};
}

// RESET to RTS, towards a queue pair that need not be there.
QpPtr set_up(const Device& device, const CompletionQueue& cq) {
  QpShape shape;
  QpPtr qp = make_qp(device, cq.get(), shape, IBV_ACCESS_REMOTE_READ);
  connect_qp(device, qp.get(), route_to_itself(device), {.number = 77, .psn = 55}, 99, 7, 3);
  return qp;
}

bool has(const std::string& text, std::string_view what) {
  return text.find(what) != std::string::npos;
}

}  // namespace

TEST_CASE("setup: a step of a queue pair that fails names call, states, attributes and errno") {
  const auto device = first_device();
  const CompletionQueue cq(device, 16);
  const struct {
    const char* states;
    std::vector<std::string> attributes;
  } steps[] = {
      {"RESET to INIT", {"port 1", cat("access ", int{IBV_ACCESS_REMOTE_READ})}},
      {"INIT to RTR",
       {"dest_qp_num 77", "path_mtu 4", "dlid 0", "10.77.0.1", "rq_psn 55", "max_dest_rd_atomic 7",
        "min_rnr_timer 12"}},
      {"RTR to RTS", {"sq_psn 99", "timeout 13", "retry_cnt 5", "rnr_retry 6", "max_rd_atomic 3"}}};
  for (size_t step = 0; step < std::size(steps); ++step)
    for (const auto& [name, err] : {std::pair{"EINVAL", EINVAL},
                                    {"ETIMEDOUT", ETIMEDOUT},
                                    {"ENOMEM", ENOMEM},
                                    {"EIO", EIO}}) {
      const Plan plan(cat("fail=modify_qp@", step + 1, ":", name));
      std::optional<Error> caught;
      try {
        (void)set_up(*device, cq);
      } catch (const Error& error) {
        caught = error;
      }
      REQUIRE(caught);
      const std::string text = caught->what();
      CAPTURE(text);
      CHECK(caught->code == Code::kTransport);
      CHECK(caught->err == err);
      CHECK(has(text, "ibv_modify_qp(qp "));
      CHECK(has(text, cat(", ", steps[step].states, ", ")));
      for (const std::string& attribute : steps[step].attributes)
        CHECK_MESSAGE(has(text, attribute), attribute);
      CHECK(has(text, cat(" on fake0:1 failed: ", errno_text(err))));
    }
}

TEST_CASE("setup: what a connection's queue pairs could not be set up for is connect()'s error") {
  EngineOptions options;
  options.secret = Bytes(32, std::byte{1});
  options.transports = {"verbs"};
  options.name = "a";
  const auto a = Engine::create(options);
  options.name = "b";
  const auto b = Engine::create(options);
  {
    const Plan plan("fail=modify_qp@1:ETIMEDOUT");
    std::optional<Error> caught;
    try {
      (void)a->connect(b->address(), 10);
    } catch (const Error& error) {
      caught = error;
    }
    REQUIRE(caught);
    CAPTURE(caught->what());
    CHECK(caught->code == Code::kUnavailable);
    CHECK(caught->err == ETIMEDOUT);
    CHECK(has(caught->what(), "verbs: ibv_modify_qp(qp "));
    CHECK(has(caught->what(), "RESET to INIT"));
    CHECK(has(caught->what(), errno_text(ETIMEDOUT)));
  }
  CHECK(a->connect(b->address(), 10)->alive.load());
  a->close();
  b->close();
}

TEST_CASE("setup: queue pairs get the route's retries, and an RNR's are less than any of those") {
  const auto device = first_device();
  const CompletionQueue cq(device, 16);
  const QpPtr qp = set_up(*device, cq);
  ibv_qp_attr attr{};
  ibv_qp_init_attr init{};
  REQUIRE(ibv_query_qp(qp.get(), &attr, IBV_QP_STATE, &init) == 0);
  CHECK(attr.qp_state == IBV_QPS_RTS);
  CHECK(int{attr.timeout} == 13);
  CHECK(int{attr.retry_cnt} == 5);
  CHECK(int{attr.path_mtu} == IBV_MTU_2048);
  CHECK(int{attr.max_dest_rd_atomic} == 7);
  CHECK(int{attr.max_rd_atomic} == 3);
  CHECK(int{attr.min_rnr_timer} == 12);  // 0.64 ms, by the standard's table
  CHECK(attr.rnr_retry < 7);             // which is "for ever"
  // Whatever the deadline is: who lacks a receive is given up before who does not answer would be.
  CHECK(attr.rnr_retry * int64_t{640'000} <= 6 * (int64_t{4096} << timeout_for(1, 6)));
}

TEST_CASE("setup: retries of a connection follow from its deadline") {
  for (const int64_t deadline_ns : {int64_t{1'000'000'000}, int64_t{30'000'000'000}}) {
    TransportConfig config;
    config.deadline_ns = deadline_ns;
    const Pair pair(1 << 16, "127.0.0.1:0", config);
    const std::string text = pair.a->explain(*pair.to_b);
    CAPTURE(text);
    // Where there is another rail there must be time for it.
    const bool only = has(text, "1 rail(s)");
    const uint8_t timeout = timeout_for(only ? deadline_ns : deadline_ns / 4, 6);
    CHECK(has(text,
              cat("gives up after 6 retries of ", (int64_t{4096} << timeout) / 1'000'000, " ms")));
  }
}

TEST_CASE("setup: another version of the transport is refused by either side, with both numbers") {
  VerbsTransport transport(TransportConfig{});
  REQUIRE_FALSE(transport.probe());
  Bytes offer = transport.offer();
  ++reinterpret_cast<uint8_t&>(offer[0]);  // little-endian, and first
  const auto why = transport.attach(Session{}, offer, Patience(deadline_after(1)));
  REQUIRE(why);
  CHECK(*why == cat("the peer offers version ", kVersion + 1, " of it, we speak ", kVersion));

  Bytes question;
  Writer writer(question);
  writer.u32(kVersion + 1);
  writer.u32(1);  // a join, if versions were the same
  const Bytes reply = transport.answer(Session{}, question);
  const std::string text(reinterpret_cast<const char*>(reply.data()), reply.size());
  CHECK(has(text, cat("you ask by version ", kVersion + 1, " of it, we speak ", kVersion)));
}
