// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Two connected RC queue pairs of one device in one process, for programs that ask a device what it
// does.
#pragma once

#include <infiniband/verbs.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace facts {

inline constexpr int kGid = 1;  // Soft-RoCE: 0 is the link-local GID, 1 the IPv4 one
inline constexpr size_t kBytes = 1 << 20;

[[noreturn]] inline void fail(const std::string& call, int error = errno) {
  throw std::runtime_error(call + ": " + std::strerror(error));
}

struct Device {
  ibv_context* context = nullptr;
  ibv_pd* pd = nullptr;
  ibv_device_attr attributes{};
  ibv_gid gid{};

  explicit Device(const char* name) {
    int count = 0;
    ibv_device** list = ibv_get_device_list(&count);
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(ibv_get_device_name(list[i]), name) == 0) context = ibv_open_device(list[i]);
    }
    ibv_free_device_list(list);
    if (context == nullptr) fail(std::string("ibv_open_device ") + name, ENODEV);
    if (ibv_query_device(context, &attributes) != 0) fail("ibv_query_device");
    if (ibv_query_gid(context, 1, kGid, &gid) != 0) fail("ibv_query_gid");
    pd = ibv_alloc_pd(context);
    if (pd == nullptr) fail("ibv_alloc_pd");
  }
  Device(const Device&) = delete;
};

// Bytes that the device may reach, page-aligned.
struct Memory {
  std::vector<unsigned char> storage;
  unsigned char* bytes;
  ibv_mr* mr;

  explicit Memory(Device& device, unsigned char fill = 0) : storage(kBytes + 4096, fill) {
    bytes = storage.data() + (4096 - reinterpret_cast<uintptr_t>(storage.data()) % 4096);
    mr = ibv_reg_mr(device.pd, bytes, kBytes,
                    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
                        IBV_ACCESS_MW_BIND);
    if (mr == nullptr) fail("ibv_reg_mr");
  }
  ~Memory() {
    if (mr != nullptr) ibv_dereg_mr(mr);
  }
  Memory(const Memory&) = delete;

  uint64_t address(size_t offset = 0) const { return reinterpret_cast<uint64_t>(bytes) + offset; }
  ibv_sge sge(size_t offset, size_t nbytes) const {
    return {.addr = address(offset), .length = static_cast<uint32_t>(nbytes), .lkey = mr->lkey};
  }
};

struct Limits {
  uint32_t send = 64, receive = 64, sge = 1, inline_bytes = 0;
  int cqe = 256;
  uint8_t reads = 16, timeout = 14, retries = 7, rnr_retries = 3;
};

// One side: a queue pair and its completion queue.
struct Side {
  ibv_cq* cq;
  ibv_qp* qp;
  Limits limits;

  Side(Device& device, const Limits& given) : limits(given) {
    cq = ibv_create_cq(device.context, limits.cqe, nullptr, nullptr, 0);
    if (cq == nullptr) fail("ibv_create_cq");
    ibv_qp_init_attr init{};
    init.send_cq = init.recv_cq = cq;
    init.qp_type = IBV_QPT_RC;
    init.cap = {limits.send, limits.receive, limits.sge, limits.sge, limits.inline_bytes};
    qp = ibv_create_qp(device.pd, &init);
    if (qp == nullptr) fail("ibv_create_qp");
    to_init();
  }
  ~Side() {
    ibv_destroy_qp(qp);
    ibv_destroy_cq(cq);
  }
  Side(const Side&) = delete;

  void modify(ibv_qp_attr& attributes, int mask, const char* what) {
    if (const int error = ibv_modify_qp(qp, &attributes, mask); error != 0) fail(what, error);
  }
  void to(ibv_qp_state state) {
    ibv_qp_attr attributes{};
    attributes.qp_state = state;
    modify(attributes, IBV_QP_STATE, "ibv_modify_qp");
  }
  void to_init() {
    ibv_qp_attr attributes{};
    attributes.qp_state = IBV_QPS_INIT;
    attributes.port_num = 1;
    attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
    modify(attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
           "to INIT");
  }
  void connect(const Device& peer_device, const Side& peer) {
    ibv_qp_attr to_receive{};
    to_receive.qp_state = IBV_QPS_RTR;
    to_receive.path_mtu = IBV_MTU_4096;
    to_receive.dest_qp_num = peer.qp->qp_num;
    to_receive.max_dest_rd_atomic = limits.reads;
    to_receive.min_rnr_timer = 1;  // 10 us
    to_receive.ah_attr.is_global = 1;
    to_receive.ah_attr.grh.dgid = peer_device.gid;
    to_receive.ah_attr.grh.sgid_index = kGid;
    to_receive.ah_attr.grh.hop_limit = 64;
    to_receive.ah_attr.port_num = 1;
    modify(to_receive,
           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
               IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
           "to RTR");
    ibv_qp_attr to_send{};
    to_send.qp_state = IBV_QPS_RTS;
    to_send.timeout = limits.timeout;
    to_send.retry_cnt = limits.retries;
    to_send.rnr_retry = limits.rnr_retries;
    to_send.max_rd_atomic = limits.reads;
    modify(to_send,
           IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
               IBV_QP_MAX_QP_RD_ATOMIC,
           "to RTS");
  }
  // The state, once it is `awaited` or for a while has not become it: it changes after the
  // completion that tells of it.
  ibv_qp_state settled(ibv_qp_state awaited = IBV_QPS_ERR) {
    for (int tries = 0; tries < 50 && state() != awaited; ++tries) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return state();
  }
  ibv_qp_state state() {
    ibv_qp_attr attributes{};
    ibv_qp_init_attr init{};
    if (ibv_query_qp(qp, &attributes, IBV_QP_STATE, &init) != 0) fail("ibv_query_qp");
    return attributes.qp_state;
  }

  // Posts one request or a chain; returns errno of ibv_post_send.
  int post(ibv_send_wr& request) {
    ibv_send_wr* bad = nullptr;
    return ibv_post_send(qp, &request, &bad);
  }
  int post_receive(uint64_t id, ibv_sge* sge = nullptr) {
    ibv_recv_wr request{
        .wr_id = id, .next = nullptr, .sg_list = sge, .num_sge = sge == nullptr ? 0 : 1};
    ibv_recv_wr* bad = nullptr;
    return ibv_post_recv(qp, &request, &bad);
  }
  std::optional<ibv_wc> next(std::chrono::milliseconds patience = std::chrono::seconds(20)) {
    const auto end = std::chrono::steady_clock::now() + patience;
    ibv_wc completion{};
    do {
      const int count = ibv_poll_cq(cq, 1, &completion);
      if (count < 0) fail("ibv_poll_cq");
      if (count == 1) return completion;
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < end);
    return std::nullopt;
  }
  std::string status(std::chrono::milliseconds patience = std::chrono::seconds(20)) {
    const auto completion = next(patience);
    return completion ? ibv_wc_status_str(completion->status) : "no completion";
  }
};

// Two devices that reach each other, or one that reaches itself.
struct World {
  Device& here;
  Device& there;
};

struct Pair {
  Side initiator, target;
  Pair(World& world, const Limits& limits = {})
      : initiator(world.here, limits), target(world.there, limits) {
    initiator.connect(world.there, target);
    target.connect(world.here, initiator);
  }
};

inline ibv_send_wr write_of(ibv_sge* sge, int count, uint64_t address, uint32_t rkey,
                            uint64_t id = 0) {
  ibv_send_wr request{};
  request.wr_id = id;
  request.sg_list = sge;
  request.num_sge = count;
  request.opcode = IBV_WR_RDMA_WRITE;
  request.send_flags = IBV_SEND_SIGNALED;
  request.wr.rdma = {.remote_addr = address, .rkey = rkey};
  return request;
}

inline ibv_send_wr read_of(ibv_sge* sge, int count, uint64_t address, uint32_t rkey,
                           uint64_t id = 0) {
  ibv_send_wr request = write_of(sge, count, address, rkey, id);
  request.opcode = IBV_WR_RDMA_READ;
  return request;
}

inline const char* name_of(ibv_qp_state state) {
  static constexpr std::array kNames{"RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"};
  return static_cast<size_t>(state) < kNames.size() ? kNames[state] : "unknown";
}

}  // namespace facts
