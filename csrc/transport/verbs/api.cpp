// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/api.hpp"

#include <dlfcn.h>

#include <cstdlib>

#include "common/error.hpp"

namespace kvxfer::verbs {
namespace {

struct Loaded {
  Api api{};
  std::string reason;

  Loaded() {
    const char* name = std::getenv("KVXFER_LIBIBVERBS");
    if (name == nullptr || *name == '\0') name = "libibverbs.so.1";
    // Never closed: its threads and its providers do not expect that.
    void* library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* why = ::dlerror();
      reason = cat(name, " cannot be opened: ", why != nullptr ? why : "no reason given",
                   "; it comes with rdma-core (Debian: libibverbs1)");
      return;
    }
    const auto find = [&](auto& function, const char* symbol, bool needed) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, symbol));
      if (function == nullptr && needed && reason.empty())
        reason = cat(name, " has no ", symbol, ": it is too old, or another library");
    };
    find(api.get_device_list, "ibv_get_device_list", true);
    find(api.free_device_list, "ibv_free_device_list", true);
    find(api.get_device_name, "ibv_get_device_name", true);
    find(api.open_device, "ibv_open_device", true);
    find(api.close_device, "ibv_close_device", true);
    find(api.query_device, "ibv_query_device", true);
    find(api.query_port, "ibv_query_port", true);
    find(api.query_gid, "ibv_query_gid", true);
    find(api.alloc_pd, "ibv_alloc_pd", true);
    find(api.dealloc_pd, "ibv_dealloc_pd", true);
    find(api.reg_mr, "ibv_reg_mr", true);
    find(api.dereg_mr, "ibv_dereg_mr", true);
    find(api.create_comp_channel, "ibv_create_comp_channel", true);
    find(api.destroy_comp_channel, "ibv_destroy_comp_channel", true);
    find(api.create_cq, "ibv_create_cq", true);
    find(api.destroy_cq, "ibv_destroy_cq", true);
    find(api.get_cq_event, "ibv_get_cq_event", true);
    find(api.ack_cq_events, "ibv_ack_cq_events", true);
    find(api.create_qp, "ibv_create_qp", true);
    find(api.modify_qp, "ibv_modify_qp", true);
    find(api.destroy_qp, "ibv_destroy_qp", true);
    find(api.get_async_event, "ibv_get_async_event", true);
    find(api.ack_async_event, "ibv_ack_async_event", true);
    find(api.wc_status_str, "ibv_wc_status_str", true);
    find(api.event_type_str, "ibv_event_type_str", true);
    find(api.fork_init, "ibv_fork_init", false);
    find(api.query_gid_ex, "_ibv_query_gid_ex", false);
    find(api.reg_dmabuf_mr, "ibv_reg_dmabuf_mr", false);
    find(api.is_fork_initialized, "ibv_is_fork_initialized", false);
    // Keeps pinned pages out of children, whose writes would otherwise part us from what the NIC
    // sees. Not where the kernel copies such pages at a fork (5.12 on): a page is kept out with all
    // that the heap has put beside the pinned bytes, and the child dies when it touches that.
    const bool copied = api.is_fork_initialized != nullptr && api.is_fork_initialized() == 2;
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
