// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Devices, their ports and GID tables, and what a user has opened of them.
#pragma once

#include <infiniband/verbs.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "completion_queue.hpp"
#include "events.hpp"
#include "keys.hpp"
#include "plan.hpp"
#include "queue_pair.hpp"

namespace fake_verbs {

struct Device;

struct Gid {
  ibv_gid gid{};
  ibv_gid_type type = IBV_GID_TYPE_IB;
  bool empty() const;
  // Whether packets get from one to the other: the same kind and version, and the same subnet.
  bool reaches(const ibv_gid& other) const;
};

struct Port {
  Device* device = nullptr;
  int number = 1;  // as verbs count
  int rail = 0;    // of all ports of the machine
  bool up = true;
  bool cut = false;  // far away: nothing gets through, and nobody is told
  int64_t up_again_ns = kvxfer::kNever;
  uint16_t lid = 0;
  std::vector<Gid> gids;
};

struct Device : ibv_device {
  Device(const Plan& plan, int index);
  int index = 0;
  uint64_t guid = 0;
  bool infiniband = false;
  bool removed = false;
  std::vector<Port> ports;
  Keys keys;
  Port* port(int number) {
    return number >= 1 && number <= static_cast<int>(ports.size()) ? &ports[number - 1] : nullptr;
  }
};

struct Domain : ibv_pd {
  int users = 0;
};
struct Region : ibv_mr {
  Key* key = nullptr;
  void* mapped = nullptr;  // of a dma-buf
  size_t mapped_bytes = 0;
};
struct Window : ibv_mw {
  Key* key = nullptr;
};

template <typename T>
using Owned = std::unordered_map<const void*, std::unique_ptr<T>>;

struct Context : verbs_context {
  Device* of = nullptr;
  Owned<Domain> domains;
  Owned<Region> regions;
  Owned<Window> windows;
  Owned<Channel> channels;
  Owned<CompletionQueue> cqs;
  Owned<QueuePair> qps;
  EventQueue<ibv_async_event> async;
};

// Ends the registration; its user forgets the object. (verbs_memory.cpp)
void release(Region& region);

// Which object an event belongs to.
inline bool is_of_cq(const ibv_async_event& event) { return event.event_type == IBV_EVENT_CQ_ERR; }
inline bool is_of_qp(const ibv_async_event& event) {
  switch (event.event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_COMM_EST:
    case IBV_EVENT_SQ_DRAINED:
      return true;
    default:
      return false;
  }
}
inline CompletionQueue& cq_of(const ibv_async_event& event) {
  return *static_cast<CompletionQueue*>(event.element.cq);
}
inline QueuePair& qp_of(const ibv_async_event& event) {
  return *static_cast<QueuePair*>(event.element.qp);
}

inline Context& context_of(ibv_context* context) {
  return *static_cast<Context*>(verbs_get_ctx(context));
}

inline Keys& keys_of(const QueuePair& qp) { return context_of(qp.context).of->keys; }

}  // namespace fake_verbs
