// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/api.hpp"

#include "common/dynamic_library.hpp"

namespace kvxfer::verbs {
namespace {

// 0: nothing is known. Its enum is written as int (api.hpp), which clang's sanitizer knows apart.
#ifdef __clang__
__attribute__((no_sanitize("function")))
#endif
int ask_fork(int (*is_fork_initialized)()) {
  return is_fork_initialized != nullptr ? is_fork_initialized() : 0;
}

struct Loaded {
  Api api{};
  std::string reason;

  Loaded() {
    // Never closed: its threads and its providers do not expect that.
    DynamicLibrary library("KVXFER_LIBIBVERBS", "libibverbs.so.1",
                           "rdma-core (Debian: libibverbs1)");
    library.find(api.get_device_list, "ibv_get_device_list");
    library.find(api.free_device_list, "ibv_free_device_list");
    library.find(api.get_device_name, "ibv_get_device_name");
    library.find(api.open_device, "ibv_open_device");
    library.find(api.close_device, "ibv_close_device");
    library.find(api.query_device, "ibv_query_device");
    library.find(api.query_port, "ibv_query_port");
    library.find(api.query_gid, "ibv_query_gid");
    library.find(api.alloc_pd, "ibv_alloc_pd");
    library.find(api.dealloc_pd, "ibv_dealloc_pd");
    library.find(api.reg_mr, "ibv_reg_mr");
    library.find(api.dereg_mr, "ibv_dereg_mr");
    library.find(api.create_comp_channel, "ibv_create_comp_channel");
    library.find(api.destroy_comp_channel, "ibv_destroy_comp_channel");
    library.find(api.create_cq, "ibv_create_cq");
    library.find(api.destroy_cq, "ibv_destroy_cq");
    library.find(api.get_cq_event, "ibv_get_cq_event");
    library.find(api.ack_cq_events, "ibv_ack_cq_events");
    library.find(api.create_qp, "ibv_create_qp");
    library.find(api.modify_qp, "ibv_modify_qp");
    library.find(api.destroy_qp, "ibv_destroy_qp");
    library.find(api.get_async_event, "ibv_get_async_event");
    library.find(api.ack_async_event, "ibv_ack_async_event");
    library.find(api.wc_status_str, "ibv_wc_status_str");
    library.find(api.event_type_str, "ibv_event_type_str");
    library.find(api.fork_init, "ibv_fork_init", false);
    library.find(api.query_gid_ex, "_ibv_query_gid_ex", false);
    library.find(api.reg_dmabuf_mr, "ibv_reg_dmabuf_mr", false);
    library.find(api.is_fork_initialized, "ibv_is_fork_initialized", false);
    reason = library.reason();
    // Keeps pinned pages out of children, whose writes would otherwise part us from what the NIC
    // sees. Not where the kernel copies such pages at a fork (5.12 on): a page is kept out with all
    // that the heap has put beside the pinned bytes, and the child dies when it touches that.
    const bool copied = ask_fork(api.is_fork_initialized) == 2;
    if (reason.empty() && !copied && api.fork_init != nullptr) (void)api.fork_init();
  }
};

const Loaded& loaded() {
  static const Loaded once;
  return once;
}

}  // namespace

const Api* load_api(std::string& reason) {
  const Loaded& library = loaded();
  reason = library.reason;
  return reason.empty() ? &library.api : nullptr;
}

const Api& api() noexcept { return loaded().api; }

}  // namespace kvxfer::verbs
