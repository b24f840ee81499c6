// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// libibverbs, opened at run time: nothing of ours links it, so one build serves machines with and
// without it. Only what the data path uses is called through the context's own table of functions,
// by the header's inline ibv_post_send, ibv_post_recv, ibv_poll_cq and ibv_req_notify_cq.
#pragma once

#include <infiniband/verbs.h>

#include <memory>
#include <string>

#include "common/fork.hpp"

// Macros of the header whose names we want for the plain functions.
#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr

namespace kvxfer::verbs {

struct Api {
  decltype(&::ibv_get_device_list) get_device_list;
  decltype(&::ibv_free_device_list) free_device_list;
  decltype(&::ibv_get_device_name) get_device_name;
  decltype(&::ibv_open_device) open_device;
  decltype(&::ibv_close_device) close_device;
  decltype(&::ibv_query_device) query_device;
  decltype(&::ibv_query_port) query_port;
  decltype(&::ibv_query_gid) query_gid;
  decltype(&::ibv_alloc_pd) alloc_pd;
  decltype(&::ibv_dealloc_pd) dealloc_pd;
  decltype(&::ibv_reg_mr) reg_mr;
  decltype(&::ibv_dereg_mr) dereg_mr;
  decltype(&::ibv_create_comp_channel) create_comp_channel;
  decltype(&::ibv_destroy_comp_channel) destroy_comp_channel;
  decltype(&::ibv_create_cq) create_cq;
  decltype(&::ibv_destroy_cq) destroy_cq;
  decltype(&::ibv_get_cq_event) get_cq_event;
  decltype(&::ibv_ack_cq_events) ack_cq_events;
  decltype(&::ibv_create_qp) create_qp;
  decltype(&::ibv_modify_qp) modify_qp;
  decltype(&::ibv_destroy_qp) destroy_qp;
  decltype(&::ibv_get_async_event) get_async_event;
  decltype(&::ibv_ack_async_event) ack_async_event;
  decltype(&::ibv_wc_status_str) wc_status_str;
  decltype(&::ibv_event_type_str) event_type_str;
  // May be null: older libraries do not have it.
  decltype(&::ibv_fork_init) fork_init;
  int (*is_fork_initialized)();  // 2: the kernel copies pinned pages at a fork
  decltype(&::_ibv_query_gid_ex) query_gid_ex;
  // Written out, since older headers do not have it either.
  ibv_mr* (*reg_dmabuf_mr)(ibv_pd*, uint64_t offset, size_t length, uint64_t iova, int fd,
                           int access);
};

// Opens the library named by KVXFER_LIBIBVERBS, else libibverbs.so.1; once a process, whose answer
// stays. Null, with the reason, where that fails.
const Api* load_api(std::string& reason);
// After load_api() has succeeded.
const Api& api() noexcept;

template <auto Function>
struct Closer {
  template <typename T>
  void operator()(T* object) const noexcept {
    // In a forked child the device's descriptor is closed: what it names is the parent's.
    if (birth.here()) (api().*Function)(object);  // an error means a leak: nobody to tell
  }
  Birth birth;
};
using PdPtr = std::unique_ptr<ibv_pd, Closer<&Api::dealloc_pd>>;
using MrPtr = std::unique_ptr<ibv_mr, Closer<&Api::dereg_mr>>;
using CqPtr = std::unique_ptr<ibv_cq, Closer<&Api::destroy_cq>>;
using QpPtr = std::unique_ptr<ibv_qp, Closer<&Api::destroy_qp>>;

}  // namespace kvxfer::verbs
