// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The software NICs' channels ring when armed, once, and destruction waits for acknowledgements.
#include <fcntl.h>

#include <atomic>
#include <thread>

#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

namespace {

Setup with_channel() {
  Setup out;
  out.channel = true;
  return out;
}

bool rings(const End& end, int timeout_ms) {
  pollfd fd{end.channel->fd, POLLIN, 0};
  return ::poll(&fd, 1, timeout_ms) == 1;
}

ibv_cq* take_event(const End& end) {
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  REQUIRE(ibv_get_cq_event(end.channel, &cq, &context) == 0);
  CHECK(context == &end);
  return cq;
}

void write(Pair& p) {
  ibv_send_wr wr = p.a.write(p.b, 10);
  REQUIRE(p.a.post(wr) == 0);
}

}  // namespace

TEST_CASE("a channel rings for the next completion after it was armed, once") {
  Pair p(with_channel());
  write(p);
  CHECK_FALSE(rings(p.a, 20));  // not armed
  REQUIRE(ibv_req_notify_cq(p.a.cq, 0) == 0);
  CHECK_FALSE(rings(p.a, 20));  // what is there already does not ring: poll after arming
  write(p);
  REQUIRE(rings(p.a, 5000));
  write(p);
  CHECK(take_event(p.a) == p.a.cq);
  CHECK_FALSE(rings(p.a, 20));
  ibv_ack_cq_events(p.a.cq, 1);
  for (int i = 0; i < 3; ++i) CHECK(p.a.await().status == IBV_WC_SUCCESS);
}

TEST_CASE("a channel armed for solicited completions rings for them and for errors") {
  Pair p(with_channel());
  for (uint64_t i = 0; i < 3; ++i) REQUIRE(p.b.receive(i, p.b.sge(0, 100)) == 0);
  REQUIRE(ibv_req_notify_cq(p.b.cq, 1) == 0);
  ibv_send_wr wr = p.a.write(p.b, 10);
  wr.opcode = IBV_WR_SEND;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.b.await().wr_id == 0);
  CHECK_FALSE(rings(p.b, 20));
  wr.send_flags |= IBV_SEND_SOLICITED;
  REQUIRE(p.a.post(wr) == 0);
  REQUIRE(rings(p.b, 5000));
  ibv_ack_cq_events(take_event(p.b), 1);
  REQUIRE(ibv_req_notify_cq(p.b.cq, 1) == 0);
  REQUIRE(p.b.to(p.b.qp, IBV_QPS_ERR) == 0);  // flushes the third receive
  REQUIRE(rings(p.b, 5000));
  ibv_ack_cq_events(take_event(p.b), 1);
}

TEST_CASE("an event descriptor may be made non-blocking") {
  End end(with_channel());
  for (const int fd : {end.channel->fd, end.context->async_fd})
    REQUIRE(::fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  CHECK(ibv_get_cq_event(end.channel, &cq, &context) == -1);
  CHECK(errno == EAGAIN);
  ibv_async_event event{};
  CHECK(ibv_get_async_event(end.context, &event) == -1);
  CHECK(errno == EAGAIN);
}

TEST_CASE("a completion queue is destroyed only when its events have been acknowledged") {
  Pair p(with_channel());
  REQUIRE(ibv_req_notify_cq(p.a.cq, 0) == 0);
  write(p);
  ibv_cq* cq = take_event(p.a);
  REQUIRE(ibv_destroy_qp(p.a.qp) == 0);
  p.a.qp = nullptr;
  std::atomic<bool> destroyed{false};
  std::thread destroyer([&] {
    CHECK(ibv_destroy_cq(cq) == 0);
    destroyed = true;
  });
  pause_ms(30);
  CHECK_FALSE(destroyed);
  ibv_ack_cq_events(cq, 1);
  destroyer.join();
  CHECK(destroyed);
  p.a.cq = nullptr;
}

TEST_CASE("events that nobody has taken go with their object") {
  Pair p(with_channel());
  REQUIRE(ibv_req_notify_cq(p.a.cq, 0) == 0);
  write(p);
  REQUIRE(rings(p.a, 5000));
  REQUIRE(fake_verbs_break_qp(p.a.qp->qp_num) == 0);
  CHECK(ibv_destroy_comp_channel(p.a.channel) == EBUSY);
  REQUIRE(ibv_destroy_qp(p.a.qp) == 0);
  REQUIRE(ibv_destroy_cq(p.a.cq) == 0);
  p.a.qp = nullptr;
  p.a.cq = nullptr;
  CHECK_FALSE(rings(p.a, 20));
  pollfd fd{p.a.context->async_fd, POLLIN, 0};
  CHECK(::poll(&fd, 1, 20) == 0);
}

TEST_CASE("a queue pair that breaks says so and flushes") {
  Pair p;
  REQUIRE(p.a.receive(4, p.a.sge(0, 10)) == 0);
  REQUIRE(fake_verbs_break_qp(p.a.qp->qp_num) == 0);
  CHECK(p.a.await_event() == IBV_EVENT_QP_FATAL);
  CHECK(p.a.await().status == IBV_WC_WR_FLUSH_ERR);
  CHECK(p.a.state(p.a.qp) == IBV_QPS_ERR);
}

TEST_CASE("a port tells when its link goes and comes, and loses packets meanwhile") {
  Pair p;
  REQUIRE(fake_verbs_set_port("fake0", 1, 0) == 0);
  CHECK(p.a.await_event() == IBV_EVENT_PORT_ERR);
  ibv_port_attr attr{};
  REQUIRE(ibv_query_port(p.a.context, 1, &attr) == 0);
  CHECK(attr.state == IBV_PORT_DOWN);
  write(p);
  pause_ms(30);
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));
  REQUIRE(fake_verbs_set_port("fake0", 1, 1) == 0);
  CHECK(p.a.await_event() == IBV_EVENT_PORT_ACTIVE);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);  // by a retry
  CHECK(fake_verbs_set_port("fake0", 2, 1) == ENODEV);
}

TEST_CASE("a path that is cut loses packets and tells nobody") {
  Pair p;
  const int64_t events = fake_verbs_count("events");
  REQUIRE(fake_verbs_cut_port("fake0", 1, 1) == 0);
  ibv_port_attr attr{};
  REQUIRE(ibv_query_port(p.a.context, 1, &attr) == 0);
  CHECK(attr.state == IBV_PORT_ACTIVE);
  write(p);
  pause_ms(30);
  ibv_wc wc{};
  CHECK_FALSE(p.a.poll(wc));
  CHECK(fake_verbs_count("events") == events);
  REQUIRE(fake_verbs_cut_port("fake0", 1, 0) == 0);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);  // by a retry
  CHECK(fake_verbs_cut_port("fake0", 2, 1) == ENODEV);
}

TEST_CASE("a link that stays away ends the queue pair when its retries are used up") {
  Setup impatient;
  impatient.timeout = 8;  // 1 ms
  impatient.retry_cnt = 3;
  Pair p(impatient);
  const int64_t before = fake_verbs_count("timeouts");
  REQUIRE(fake_verbs_set_port("fake0", 1, 0) == 0);
  write(p);
  CHECK(p.a.await().status == IBV_WC_RETRY_EXC_ERR);
  CHECK(fake_verbs_count("timeouts") == before + 4);
  REQUIRE(fake_verbs_set_port("fake0", 1, 1) == 0);
}
