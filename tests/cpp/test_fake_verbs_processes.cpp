// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The software NICs between processes, and what needs a process of its own: another set of
// devices, a device that is removed, a fork. Each child is this program again, with one of the
// test cases that are skipped otherwise.
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

extern char** environ;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// A process that runs one test case with a plan; killed when forgotten.
struct Child {
  Child(const std::string& test_case, const std::string& plan = "") {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    fd = fds[0];
    const int theirs = ::dup(fds[1]);  // without CLOEXEC
    ::close(fds[1]);
    std::vector<std::string> words = {"KVXFER_FAKE_VERBS=" + plan,
                                      "FAKE_VERBS_TEST_FD=" + std::to_string(theirs)};
    std::vector<char*> env;
    for (std::string& word : words) env.push_back(word.data());
    for (char** e = environ; *e; ++e)
      if (std::strncmp(*e, "KVXFER_FAKE_VERBS=", 18) != 0) env.push_back(*e);
    env.push_back(nullptr);
    std::string self = "/proc/self/exe", all = "--no-skip", which = "--test-case=" + test_case,
                quiet = "--minimal";
    char* argv[] = {self.data(), all.data(), which.data(), quiet.data(), nullptr};
    REQUIRE(::posix_spawn(&pid, self.c_str(), nullptr, nullptr, argv, env.data()) == 0);
    ::close(theirs);
  }
  ~Child() {
    if (pid > 0) ::kill(pid, SIGKILL), wait();
    ::close(fd);
  }
  // Its exit status, or minus the signal.
  int wait() {
    int status = 0;
    REQUIRE(::waitpid(pid, &status, 0) == pid);
    pid = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  // Until the last of its threads has stopped: one that runs still answers.
  void stop() {
    int status = 0;
    REQUIRE(::kill(pid, SIGSTOP) == 0);
    REQUIRE(::waitpid(pid, &status, WUNTRACED) == pid);
    REQUIRE(WIFSTOPPED(status));
  }
  pid_t pid = -1;
  int fd = -1;
};

struct Card {  // what two ends have to know of each other
  uint32_t qp_num, rkey;
  uint64_t address;
  ibv_gid gid;
};

Card exchange(const End& end, int fd) {
  Card mine{end.qp->qp_num, end.mr->rkey, reinterpret_cast<uintptr_t>(end.memory.data()), end.gid};
  REQUIRE(::send(fd, &mine, sizeof mine, MSG_NOSIGNAL) == sizeof mine);
  Card theirs{};
  REQUIRE(::recv(fd, &theirs, sizeof theirs, MSG_WAITALL) == sizeof theirs);
  REQUIRE(end.to_init(end.qp) == 0);
  REQUIRE(end.to_rtr(end.qp, theirs.qp_num, theirs.gid) == 0);
  REQUIRE(end.to_rts(end.qp) == 0);
  return theirs;
}

void say(int fd, char what) { REQUIRE(::send(fd, &what, 1, MSG_NOSIGNAL) == 1); }
char hear(int fd) {
  char what = 0;
  CHECK(::recv(fd, &what, 1, 0) == 1);
  return what;
}

int parent_fd() { return std::atoi(std::getenv("FAKE_VERBS_TEST_FD")); }

ibv_send_wr write_to(const Card& to, const End& from, size_t n) {
  ibv_send_wr wr = from.write(from, n);
  wr.wr.rdma.remote_addr = to.address;
  wr.wr.rdma.rkey = to.rkey;
  return wr;
}

// The open contexts of every device there is.
std::vector<ibv_context*> open_all() {
  int n = 0;
  ibv_device** list = ibv_get_device_list(&n);
  std::vector<ibv_context*> out;
  for (int i = 0; i < n; ++i) out.push_back(ibv_open_device(list[i]));
  ibv_free_device_list(list);
  return out;
}

Setup on_device(int device) {
  Setup out;
  out.plan = std::getenv("KVXFER_FAKE_VERBS");
  out.device = device;
  out.timeout = 8;
  out.retry_cnt = 2;
  return out;
}

}  // namespace

TEST_CASE("child: a peer that does as it is told" * doctest::skip()) {
  End end({});
  end.fill(100);
  const int fd = parent_fd();
  const Card peer = exchange(end, fd);
  REQUIRE(end.receive(1, end.sge(50'000, 100)) == 0);
  say(fd, 'r');
  for (;;) switch (hear(fd)) {
      case 'n':  // a notification is in: is its data?
        CHECK(end.await().opcode == IBV_WC_RECV_RDMA_WITH_IMM);
        for (size_t i = 0; i < 40'000; ++i) REQUIRE(end.memory[i] == std::byte{7});
        say(fd, 'y');
        break;
      case 'w': {  // write back
        end.fill(55);
        ibv_send_wr wr = write_to(peer, end, 40'000);
        wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
        REQUIRE(end.post(wr) == 0);
        CHECK(end.await().status == IBV_WC_SUCCESS);
        break;
      }
      case 'q':
        return;
      default:
        FAIL("unknown command");
    }
}

TEST_CASE("two processes write, notify and read") {
  Child child("child: a peer that does as it is told");
  End end({});
  const Card peer = exchange(end, child.fd);
  REQUIRE(hear(child.fd) == 'r');
  std::fill(end.memory.begin(), end.memory.end(), std::byte{7});
  ibv_send_wr wr = write_to(peer, end, 40'000);
  wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  REQUIRE(end.post(wr) == 0);
  CHECK(end.await().status == IBV_WC_SUCCESS);
  say(child.fd, 'n');
  CHECK(hear(child.fd) == 'y');
  REQUIRE(end.receive(1, end.sge(0, 0)) == 0);
  say(child.fd, 'w');
  CHECK(end.await().opcode == IBV_WC_RECV_RDMA_WITH_IMM);  // only then may one look
  const std::vector<std::byte> written(end.memory.begin(), end.memory.begin() + 40'000);
  std::fill(end.memory.begin(), end.memory.end(), std::byte{0});
  wr.opcode = IBV_WR_RDMA_READ;
  REQUIRE(end.post(wr) == 0);
  CHECK(end.await().status == IBV_WC_SUCCESS);
  CHECK(std::memcmp(written.data(), end.memory.data(), 40'000) == 0);
  say(child.fd, 'q');
  CHECK(child.wait() == 0);
}

TEST_CASE("a peer that was killed, or is stopped for too long, is given up") {
  Setup impatient;
  impatient.timeout = 14;  // 67 ms
  impatient.retry_cnt = 2;
  Child child("child: a peer that does as it is told");
  End end(impatient);
  const Card peer = exchange(end, child.fd);
  REQUIRE(hear(child.fd) == 'r');
  ibv_send_wr wr = write_to(peer, end, 1000);
  REQUIRE(end.post(wr) == 0);
  REQUIRE(end.await().status == IBV_WC_SUCCESS);
  SUBCASE("killed") {
    REQUIRE(::kill(child.pid, SIGKILL) == 0);
    CHECK(child.wait() == -SIGKILL);
  }
  SUBCASE("stopped") { child.stop(); }
  // Some of the later ones only fill the socket of a peer that does not read.
  for (int i = 0; i < 50; ++i) REQUIRE(end.post(wr) == 0);
  CHECK(end.await().status == IBV_WC_RETRY_EXC_ERR);
  for (int i = 0; i < 49; ++i) CHECK(end.await().status == IBV_WC_WR_FLUSH_ERR);
}

TEST_CASE("a peer that was stopped for a moment goes on") {
  Child child("child: a peer that does as it is told");
  End end({});
  const Card peer = exchange(end, child.fd);
  REQUIRE(hear(child.fd) == 'r');
  child.stop();
  for (uint64_t i = 0; i < 20; ++i) {
    ibv_send_wr wr = write_to(peer, end, 20'000);
    wr.wr_id = i;
    REQUIRE(end.post(wr) == 0);
  }
  pause_ms(50);
  ibv_wc wc{};
  CHECK_FALSE(end.poll(wc));
  REQUIRE(::kill(child.pid, SIGCONT) == 0);
  for (uint64_t i = 0; i < 20; ++i) {
    wc = end.await();
    CHECK(wc.status == IBV_WC_SUCCESS);
    CHECK(wc.wr_id == i);
  }
}

TEST_CASE("child: rails" * doctest::skip()) {
  const std::vector<ibv_context*> contexts = open_all();
  REQUIRE(contexts.size() == 2);
  CHECK(std::string(ibv_get_device_name(contexts[1]->device)) == "fake1");
  CHECK(ibv_get_device_guid(contexts[0]->device) != ibv_get_device_guid(contexts[1]->device));
  CHECK(std::string(contexts[1]->device->ibdev_path) == "/nowhere/fake1");
  ibv_port_attr attr{};
  REQUIRE(ibv_query_port(contexts[1], 2, &attr) == 0);
  CHECK(attr.state == IBV_PORT_DOWN);  // rail 3 by the plan
  REQUIRE(ibv_query_port(contexts[1], 1, &attr) == 0);
  CHECK(attr.state == IBV_PORT_ACTIVE);
  for (ibv_context* context : contexts) CHECK(ibv_close_device(context) == 0);
  const auto ends = [](int left, int right) {
    Pair p(on_device(left), on_device(right));
    ibv_send_wr wr = p.a.write(p.b, 100);
    REQUIRE(p.a.post(wr) == 0);
    return p.a.await().status;
  };
  CHECK(ends(0, 0) == IBV_WC_SUCCESS);
  CHECK(ends(1, 1) == IBV_WC_SUCCESS);
  CHECK(ends(0, 1) == IBV_WC_RETRY_EXC_ERR);  // each rail is a subnet of its own
}

TEST_CASE("devices and ports are rails of their own") {
  CHECK(Child("child: rails", "devices=2 ports=2 down=3 sysfs=/nowhere").wait() == 0);
}

TEST_CASE("child: a removed device" * doctest::skip()) {
  Pair p(on_device(0));
  End other(on_device(1));
  ibv_mw* mw = ibv_alloc_mw(p.a.pd, IBV_MW_TYPE_2);
  REQUIRE(mw);
  ibv_wc wc{};
  if (p.a.setup.plan.find("remove") == std::string::npos) {
    fake_verbs_hold(p.b.qp->qp_num);
    ibv_send_wr wr = p.a.write(p.b, 10);
    REQUIRE(p.a.post(wr) == 0);
    REQUIRE(fake_verbs_remove_device("fake0") == 0);
    fake_verbs_release(p.b.qp->qp_num);
  } else {
    for (int i = 1; i < 5; ++i) CHECK(ibv_poll_cq(p.a.cq, 1, &wc) == 0);
  }
  CHECK(ibv_poll_cq(p.a.cq, 1, &wc) < 0);
  CHECK(p.a.await_event() == IBV_EVENT_DEVICE_FATAL);
  CHECK(p.b.await_event() == IBV_EVENT_DEVICE_FATAL);
  ibv_send_wr wr = p.a.write(p.b, 10), *bad = nullptr;
  CHECK(ibv_post_send(p.a.qp, &wr, &bad) == EIO);
  CHECK(bad == &wr);
  CHECK(p.a.receive(1, p.a.sge(0, 10)) == EIO);
  CHECK(ibv_req_notify_cq(p.a.cq, 0) == EIO);
  CHECK(p.a.to(p.a.qp, IBV_QPS_ERR) == EIO);
  ibv_device_attr device{};
  CHECK(ibv_query_device(p.a.context, &device) == EIO);
  ibv_port_attr port{};
  CHECK(ibv_query_port(p.a.context, 1, &port) == EIO);
  CHECK_FALSE(ibv_alloc_pd(p.a.context));
  CHECK(errno == EIO);
  CHECK_FALSE(ibv_reg_mr(p.a.pd, p.a.memory.data(), 10, 0));
  CHECK(ibv_dealloc_mw(mw) == EIO);
  for (End* end : {&p.a, &p.b}) {
    CHECK(ibv_destroy_qp(end->qp) == EIO);
    CHECK(ibv_dereg_mr(end->mr) == EIO);
    CHECK(ibv_destroy_cq(end->cq) == EIO);
    CHECK(ibv_dealloc_pd(end->pd) == EIO);
    end->qp = nullptr;  // closing the device is all that is left
    end->mr = nullptr;
    end->cq = nullptr;
    end->pd = nullptr;
  }
  pause_ms(5);
  for (const std::byte byte : p.b.memory) REQUIRE(byte == std::byte{0});
  int n = 0;
  ibv_free_device_list(ibv_get_device_list(&n));
  CHECK(n == 1);
  CHECK(ibv_query_device(other.context, &device) == 0);
  // Another one may be plugged in; what was opened of the old one stays dead.
  REQUIRE(fake_verbs_restore_device("fake0") == 0);
  CHECK(fake_verbs_restore_device("fake0") == ENODEV);
  Setup once_more = on_device(0);
  once_more.plan = "devices=2";
  Pair fresh(once_more);
  ibv_send_wr again = fresh.a.write(fresh.b, 10);
  REQUIRE(fresh.a.post(again) == 0);
  CHECK(fresh.a.await().status == IBV_WC_SUCCESS);
  CHECK(ibv_query_device(p.a.context, &device) == EIO);
}

TEST_CASE("a device that is removed fails every verb, and another does not") {
  SUBCASE("when told") { CHECK(Child("child: a removed device", "devices=2").wait() == 0); }
  SUBCASE("during a poll") {
    CHECK(Child("child: a removed device", "devices=2 remove=5").wait() == 0);
  }
}

TEST_CASE("child: an InfiniBand link" * doctest::skip()) {
  Setup setup = on_device(0);
  setup.sgid_index = 0;
  End a(setup), b(setup);
  ibv_port_attr port{};
  REQUIRE(ibv_query_port(a.context, 1, &port) == 0);
  CHECK(port.link_layer == IBV_LINK_LAYER_INFINIBAND);
  CHECK(port.lid != 0);
  const auto connect_by = [&](const End& from, uint32_t peer, uint16_t lid) {
    ibv_qp_attr attr{};
    attr.qp_state = IBV_QPS_RTR;
    attr.path_mtu = IBV_MTU_4096;
    attr.dest_qp_num = peer;
    attr.rq_psn = peer & 0xffffff;
    attr.max_dest_rd_atomic = 1;
    attr.ah_attr.dlid = lid;  // and no GID
    attr.ah_attr.port_num = 1;
    REQUIRE(from.to_init(from.qp) == 0);
    REQUIRE(ibv_modify_qp(from.qp, &attr,
                          IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                              IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) ==
            0);
    REQUIRE(from.to_rts(from.qp) == 0);
  };
  const auto write = [&] {
    ibv_send_wr wr = a.write(b, 10'000);
    REQUIRE(a.post(wr) == 0);
    return a.await().status;
  };
  connect_by(a, b.qp->qp_num, port.lid);
  connect_by(b, a.qp->qp_num, port.lid);
  CHECK(write() == IBV_WC_SUCCESS);
  for (End* end : {&a, &b}) REQUIRE(end->to(end->qp, IBV_QPS_RESET) == 0);
  connect_by(a, b.qp->qp_num, static_cast<uint16_t>(port.lid + 1));
  connect_by(b, a.qp->qp_num, port.lid);
  CHECK(write() == IBV_WC_RETRY_EXC_ERR);
}

TEST_CASE("an InfiniBand link is addressed by LID") {
  CHECK(Child("child: an InfiniBand link", "link=ib").wait() == 0);
}

TEST_CASE("child: a fork" * doctest::skip()) {
  Pair p;
  const pid_t pid = ::fork();
  if (pid == 0) {
    ibv_send_wr wr = p.a.write(p.b, 10), *bad = nullptr;
    bool good = ibv_post_send(p.a.qp, &wr, &bad) == EIO;
    {
      Pair own;  // of its own, and on a NIC of its own
      wr = own.a.write(own.b, 1000);
      good = good && own.a.post(wr) == 0 && own.a.await().status == IBV_WC_SUCCESS;
    }
    ::_exit(good ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(pid, &status, 0) == pid);
  CHECK(status == 0);
  ibv_send_wr wr = p.a.write(p.b, 10);
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
}

TEST_CASE("what a forked child inherits is dead, and it may begin anew") {
  if (kThreadSanitizer) return;  // it does not allow threads after a fork
  CHECK(Child("child: a fork").wait() == 0);
}

TEST_CASE("child: no devices" * doctest::skip()) {
  int n = -1;
  ibv_device** list = ibv_get_device_list(&n);
  REQUIRE(list);
  CHECK(n == 0);
  CHECK_FALSE(list[0]);
  ibv_free_device_list(list);
}

TEST_CASE("there may be no device at all, but not a plan that is wrong") {
  CHECK(Child("child: no devices", "devices=0").wait() == 0);
  CHECK(Child("child: no devices", "devices=many").wait() == 2);
}

TEST_CASE("child: a port that loses its link" * doctest::skip()) {
  Setup setup = on_device(0);
  setup.timeout = 12;
  setup.retry_cnt = 7;
  Pair p(setup);
  for (uint64_t i = 0; i < 30; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 5000, i);
    REQUIRE(p.a.post(wr) == 0);
  }
  CHECK(p.a.await_event() == IBV_EVENT_PORT_ERR);
  CHECK(p.a.await_event() == IBV_EVENT_PORT_ACTIVE);
  for (uint64_t i = 0; i < 30; ++i) CHECK(p.a.await().status == IBV_WC_SUCCESS);
}

TEST_CASE("a planned loss of the link comes and goes") {
  CHECK(Child("child: a port that loses its link", "port_down=20:20ms").wait() == 0);
}
