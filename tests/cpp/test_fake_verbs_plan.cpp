// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What there is and what goes wrong is what the plan says.
#include <sys/mman.h>
#include <unistd.h>

#include "fake_verbs_pair.hpp"

using namespace fake_verbs_test;

TEST_CASE("a plan that is not understood is refused") {
  for (const char* wrong :
       {"devices", "devices=17", "seed=x", "drop=2", "delay=0.5", "delay=0.5:3h", "gids=v5r2",
        "error=0.5:nonsense", "read_error=1:nonsense", "fail=reg_mr", "fail=reg_mr@1:EWHAT",
        "seed=1 seed=2", "typo=1", "mtu=1500", "windows=4"})
    CHECK_MESSAGE(fake_verbs_plan(wrong) == EINVAL, wrong);
  CHECK(fake_verbs_plan("") == 0);
}

TEST_CASE("the planned call of a verb fails with the planned errno, the others do not") {
  End end({});
  REQUIRE(fake_verbs_plan("fail=reg_mr@2:ENOMEM,create_qp@1:EINVAL,create_cq@1:ENOSPC") == 0);
  ibv_mr* first = ibv_reg_mr(end.pd, end.memory.data(), 10, 0);
  REQUIRE(first);
  CHECK_FALSE(ibv_reg_mr(end.pd, end.memory.data(), 10, 0));
  CHECK(errno == ENOMEM);
  ibv_mr* third = ibv_reg_mr(end.pd, end.memory.data(), 10, 0);
  REQUIRE(third);
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = end.cq;
  init.qp_type = IBV_QPT_RC;
  CHECK_FALSE(ibv_create_qp(end.pd, &init));
  CHECK(errno == EINVAL);
  CHECK_FALSE(ibv_create_cq(end.context, 10, nullptr, nullptr, 0));
  CHECK(errno == ENOSPC);
  CHECK(ibv_dereg_mr(first) == 0);
  CHECK(ibv_dereg_mr(third) == 0);
}

TEST_CASE("a device that lies has less than it says") {
  End end({});
  REQUIRE(fake_verbs_plan("max_qp_wr=100 max_cqe=1000 max_sge=20 lie=0.5") == 0);
  ibv_device_attr attr{};
  REQUIRE(ibv_query_device(end.context, &attr) == 0);
  CHECK(attr.max_qp_wr == 100);
  ibv_qp_init_attr init{};
  init.send_cq = init.recv_cq = end.cq;
  init.qp_type = IBV_QPT_RC;
  init.cap.max_send_wr = 51;
  CHECK_FALSE(ibv_create_qp(end.pd, &init));
  CHECK(errno == ENOMEM);
  init.cap.max_send_wr = 50;
  init.cap.max_send_sge = 11;
  CHECK_FALSE(ibv_create_qp(end.pd, &init));
  CHECK(errno == EINVAL);
  init.cap.max_send_sge = 10;
  ibv_qp* qp = ibv_create_qp(end.pd, &init);
  REQUIRE(qp);
  CHECK(ibv_destroy_qp(qp) == 0);
  CHECK_FALSE(ibv_create_cq(end.context, 501, nullptr, nullptr, 0));
  CHECK(errno == ENOMEM);
}

TEST_CASE("memory that cannot be pinned cannot be registered") {
  End end({});
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  void* two = ::mmap(nullptr, 2 * page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(two != MAP_FAILED);
  ibv_mr* mr = ibv_reg_mr(end.pd, two, 2 * page, IBV_ACCESS_REMOTE_READ);
  CHECK(mr);
  if (mr) CHECK(ibv_dereg_mr(mr) == 0);
  REQUIRE(::munmap(static_cast<char*>(two) + page, page) == 0);
  CHECK_FALSE(ibv_reg_mr(end.pd, two, 2 * page, IBV_ACCESS_REMOTE_READ));
  CHECK(errno == EFAULT);
  ::munmap(two, page);
  CHECK_FALSE(ibv_reg_mr(end.pd, end.memory.data(), 0, 0));
  CHECK(errno == EINVAL);
  CHECK_FALSE(ibv_reg_mr(end.pd, end.memory.data(), 10, IBV_ACCESS_REMOTE_WRITE));
  CHECK(errno == EINVAL);  // without LOCAL_WRITE
  SUBCASE("more than may be locked") {
    const int64_t locked = fake_verbs_count("locked_bytes");
    REQUIRE(fake_verbs_plan(("memlock=" + std::to_string(locked + 1000)).c_str()) == 0);
    CHECK_FALSE(ibv_reg_mr(end.pd, end.memory.data(), 1001, 0));
    CHECK(errno == ENOMEM);
    mr = ibv_reg_mr(end.pd, end.memory.data(), 1000, 0);
    REQUIRE(mr);
    CHECK(ibv_dereg_mr(mr) == 0);
    CHECK(fake_verbs_count("locked_bytes") == locked);
  }
}

TEST_CASE("a descriptor that can be mapped stands for a dma-buf") {
  Pair p;
  const int fd = ::memfd_create("dmabuf", MFD_CLOEXEC);
  REQUIRE(::ftruncate(fd, 3 * 4096) == 0);
  const uint64_t iova = 0x7000'0000'0000 + 5000 % 4096;  // within its page like the offset
  CHECK_FALSE(ibv_reg_dmabuf_mr(p.b.pd, 5000, 4096, iova + 1, fd, 0));
  CHECK_FALSE(ibv_reg_dmabuf_mr(p.b.pd, 5000, 3 * 4096, iova, fd, 0));
  ibv_mr* mr = ibv_reg_dmabuf_mr(p.b.pd, 5000, 4096, iova, fd,
                                 IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
  REQUIRE(mr);
  p.a.fill(6);
  ibv_send_wr wr = p.a.write(p.b, 4096);
  wr.wr.rdma.remote_addr = iova;
  wr.wr.rdma.rkey = mr->rkey;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  std::vector<std::byte> file(4096);
  REQUIRE(::pread(fd, file.data(), 4096, 5000) == 4096);
  CHECK(std::memcmp(file.data(), p.a.memory.data(), 4096) == 0);
  CHECK(ibv_dereg_mr(mr) == 0);
  REQUIRE(fake_verbs_plan("dmabuf=0") == 0);
  CHECK_FALSE(ibv_reg_dmabuf_mr(p.b.pd, 0, 4096, iova, fd, 0));
  CHECK(errno == EOPNOTSUPP);
  ::close(fd);
}

TEST_CASE("a region may have an address of its own") {
  Pair p;
  const uint64_t iova = 0x1000;
  ibv_mr* mr = ibv_reg_mr_iova2(
      p.b.pd, p.b.memory.data() + 64, 1000, iova,
      IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_RELAXED_ORDERING);
  REQUIRE(mr);
  p.a.fill(6);
  ibv_send_wr wr = p.a.write(p.b, 1000);
  wr.wr.rdma.remote_addr = iova;
  wr.wr.rdma.rkey = mr->rkey;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  CHECK(std::memcmp(p.b.memory.data() + 64, p.a.memory.data(), 1000) == 0);
  CHECK(ibv_dereg_mr(mr) == 0);
}

TEST_CASE("the GID table has what real ones have") {
  End end({});
  ibv_port_attr port{};
  REQUIRE(ibv_query_port(end.context, 1, &port) == 0);
  CHECK(port.state == IBV_PORT_ACTIVE);
  CHECK(port.link_layer == IBV_LINK_LAYER_ETHERNET);
  CHECK(port.gid_tbl_len == 4);
  ibv_gid_entry entries[8];
  CHECK(ibv_query_gid_table(end.context, entries, 8, 0) == 4);
  CHECK(entries[0].gid_type == IBV_GID_TYPE_ROCE_V1);
  CHECK(entries[0].gid.raw[0] == 0xfe);
  CHECK(entries[3].gid_type == IBV_GID_TYPE_ROCE_V2);
  CHECK(entries[3].gid.raw[10] == 0xff);
  ibv_gid_entry entry{};
  CHECK(ibv_query_gid_ex(end.context, 1, 4, &entry, 0) == EINVAL);
  ibv_gid gid{};
  CHECK(ibv_query_gid(end.context, 1, 4, &gid) == -1);
  CHECK(ibv_query_port(end.context, 2, &port) == EINVAL);
  __be16 pkey = 0;
  CHECK(ibv_query_pkey(end.context, 1, 0, &pkey) == 0);
  CHECK(pkey == 0xffff);
}

TEST_CASE("a planned share of requests fails") {
  int failed = 0, done = 0;
  for (int round = 0; round < 20; ++round) {
    Setup setup;
    setup.plan = "error=0.5:rem_op seed=" + std::to_string(round);
    Pair p(setup);
    ibv_send_wr wr = p.a.write(p.b, 10);
    REQUIRE(p.a.post(wr) == 0);
    const ibv_wc_status status = p.a.await().status;
    CHECK((status == IBV_WC_SUCCESS || status == IBV_WC_REM_OP_ERR));
    (status == IBV_WC_SUCCESS ? done : failed) += 1;
  }
  CHECK(failed > 0);
  CHECK(done > 0);
}

TEST_CASE("reads alone can be made to fail") {
  Setup setup;
  setup.plan = "read_error=1:retry_exc";
  Pair p(setup);
  ibv_send_wr wr = p.a.write(p.b, 10);
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_SUCCESS);
  wr.opcode = IBV_WR_RDMA_READ;
  REQUIRE(p.a.post(wr) == 0);
  CHECK(p.a.await().status == IBV_WC_RETRY_EXC_ERR);
}

TEST_CASE("as many devices are listed as the plan says") {
  const auto listed = [](const char* plan) {
    REQUIRE(fake_verbs_plan(plan) == 0);
    int n = 0;
    ibv_free_device_list(ibv_get_device_list(&n));
    return n;
  };
  CHECK(listed("") == 1);
  CHECK(listed("devices=3") == 3);
  CHECK(listed("devices=2") == 2);
  CHECK(listed("seed=1") == 1);
}

TEST_CASE("the queue pair of the planned request breaks") {
  Pair p;
  REQUIRE(fake_verbs_plan("qp_fatal=3") == 0);
  for (uint64_t i = 0; i < 3; ++i) {
    CHECK(p.a.state(p.a.qp) == IBV_QPS_RTS);
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    REQUIRE(p.a.post(wr) == 0);
    CHECK(p.a.await().status == (i < 2 ? IBV_WC_SUCCESS : IBV_WC_WR_FLUSH_ERR));
  }
  CHECK(p.a.await_event() == IBV_EVENT_QP_FATAL);
}

TEST_CASE("a completion queue can be made longer, not shorter than what is in it") {
  Setup small;
  small.cqe = 2;
  Pair p(small, {});
  int64_t before = fake_verbs_count("completions");
  for (uint64_t i = 0; i < 2; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    REQUIRE(p.a.post(wr) == 0);
  }
  REQUIRE(eventually([&] { return fake_verbs_count("completions") == before + 2; }));
  CHECK(ibv_resize_cq(p.a.cq, 1) == EINVAL);
  before += 2;
  REQUIRE(ibv_resize_cq(p.a.cq, 4) == 0);
  CHECK(p.a.cq->cqe == 4);
  for (uint64_t i = 2; i < 4; ++i) {
    ibv_send_wr wr = p.a.write(p.b, 10, i);
    REQUIRE(p.a.post(wr) == 0);
  }
  REQUIRE(eventually([&] { return fake_verbs_count("completions") == before + 2; }));
  for (uint64_t i = 0; i < 4; ++i) CHECK(p.a.await().wr_id == i);
}

TEST_CASE("numbers have words") {
  CHECK(std::string(ibv_wc_status_str(IBV_WC_RETRY_EXC_ERR)) == "transport retry counter exceeded");
  CHECK(std::string(ibv_port_state_str(IBV_PORT_DOWN)) == "down");
  CHECK(std::string(ibv_event_type_str(IBV_EVENT_DEVICE_FATAL)) == "device fatal error");
  CHECK(std::string(ibv_node_type_str(IBV_NODE_CA)) == "channel adapter");
}
