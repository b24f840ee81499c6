// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Entry points: devices, ports, addresses, asynchronous events.
#include <endian.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "exports.hpp"
#include "nic.hpp"

using namespace fake_verbs;

namespace {

int fill_device(Context& context, ibv_device_attr* out) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  if (const int err = nic.refuse("query_device", *context.of)) return fail_int(err);
  const Plan& plan = nic.plan;
  *out = {};
  std::snprintf(out->fw_ver, sizeof out->fw_ver, "fake 1.0");
  out->node_guid = out->sys_image_guid = htobe64(context.of->guid);
  out->max_mr_size = plan.max_mr_size;
  out->page_size_cap = ~uint64_t{0xfff};
  out->vendor_id = plan.soft_roce ? 0xffffff : 0xfacade;
  out->max_qp = plan.max_qp;
  out->max_qp_wr = plan.max_qp_wr;
  out->device_cap_flags = IBV_DEVICE_RC_RNR_NAK_GEN | IBV_DEVICE_PORT_ACTIVE_EVENT;
  if (plan.windows & 1) out->device_cap_flags |= IBV_DEVICE_MEM_WINDOW;
  if (plan.windows & 2)
    out->device_cap_flags |= IBV_DEVICE_MEM_WINDOW_TYPE_2B | IBV_DEVICE_MEM_MGT_EXTENSIONS;
  out->max_sge = out->max_sge_rd = plan.max_sge;
  out->max_cq = 1 << 16;
  out->max_cqe = plan.max_cqe;
  out->max_mr = plan.max_mr;
  out->max_mw = plan.windows ? 1 << 16 : 0;
  out->max_pd = 1 << 15;
  out->max_qp_rd_atom = out->max_qp_init_rd_atom = plan.max_rd_atomic;
  out->max_res_rd_atom = plan.max_rd_atomic * plan.max_qp;
  out->atomic_cap = IBV_ATOMIC_HCA;
  out->max_pkeys = 1;
  out->local_ca_ack_delay = 15;
  out->phys_port_cnt = static_cast<uint8_t>(context.of->ports.size());
  return 0;
}

int fill_port(ibv_context* base, uint8_t number, ibv_port_attr* out, size_t room) {
  Context& context = context_of(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  if (const int err = nic.refuse("query_port", *context.of)) return fail_int(err);
  const Port* port = context.of->port(number);
  if (!port) return fail_int(EINVAL);
  ibv_port_attr attr{};
  attr.state = port->up ? IBV_PORT_ACTIVE : IBV_PORT_DOWN;
  attr.max_mtu = IBV_MTU_4096;
  attr.active_mtu = static_cast<ibv_mtu>(__builtin_ctz(static_cast<unsigned>(nic.plan.mtu)) - 7);
  attr.gid_tbl_len = static_cast<int>(port->gids.size());
  attr.max_msg_sz = 1u << 31;
  attr.pkey_tbl_len = 1;
  attr.lid = port->lid;
  attr.sm_lid = context.of->infiniband ? 1 : 0;
  attr.max_vl_num = 1;
  attr.active_width = 2;   // 4x
  attr.active_speed = 64;  // HDR
  attr.phys_state = port->up ? 5 : 3;
  attr.link_layer = context.of->infiniband ? IBV_LINK_LAYER_INFINIBAND : IBV_LINK_LAYER_ETHERNET;
  attr.port_cap_flags = IBV_PORT_CM_SUP | (context.of->infiniband ? 0 : IBV_PORT_IP_BASED_GIDS);
  std::memcpy(out, &attr, std::min(room, sizeof attr));
  return 0;
}

int query_device_ex(ibv_context* base, const ibv_query_device_ex_input*, ibv_device_attr_ex* out,
                    size_t room) {
  if (room < sizeof out->orig_attr) return fail_int(EINVAL);
  std::memset(out, 0, room);
  const int err = fill_device(context_of(base), &out->orig_attr);
  if (err == 0 && room >= sizeof *out) out->phys_port_cnt_ex = out->orig_attr.phys_port_cnt;
  return err;
}

}  // namespace

FAKE_VERBS_EXPORT ibv_device** ibv_get_device_list(int* num_devices) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  std::vector<ibv_device*> found;
  for (const auto& device : nic.devices())
    if (!device->removed && device->index < nic.plan.devices) found.push_back(device.get());
  if (num_devices) *num_devices = static_cast<int>(found.size());
  auto** const out = new ibv_device*[found.size() + 1]();
  std::copy(found.begin(), found.end(), out);
  return out;
}

FAKE_VERBS_EXPORT void ibv_free_device_list(ibv_device** list) { delete[] list; }

FAKE_VERBS_EXPORT const char* ibv_get_device_name(ibv_device* device) { return device->name; }

FAKE_VERBS_EXPORT int ibv_get_device_index(ibv_device* device) {
  return static_cast<Device*>(device)->index;
}

FAKE_VERBS_EXPORT __be64 ibv_get_device_guid(ibv_device* device) {
  return htobe64(static_cast<Device*>(device)->guid);
}

FAKE_VERBS_EXPORT ibv_context* ibv_open_device(ibv_device* device) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  auto& of = *static_cast<Device*>(device);
  if (const int err = nic.refuse("open_device", of)) return fail_pointer<ibv_context>(err);
  auto context = std::make_unique<Context>();
  context->of = &of;
  context->sz = sizeof(verbs_context);
  context->verbs_context::query_port = fill_port;
  context->verbs_context::query_device_ex = query_device_ex;
  ibv_context& base = context->context;
  base.device = device;
  base.abi_compat = __VERBS_ABI_IS_EXTENDED;
  base.cmd_fd = -1;
  base.async_fd = context->async.fd();
  base.num_comp_vectors = 1;
  pthread_mutex_init(&base.mutex, nullptr);
  base.ops.post_send = post_send;
  base.ops.post_recv = post_recv;
  base.ops.poll_cq = poll_cq;
  base.ops.req_notify_cq = req_notify_cq;
  base.ops.alloc_mw = alloc_mw;
  base.ops.bind_mw = bind_mw;
  base.ops.dealloc_mw = dealloc_mw;
  ibv_context* const out = &base;
  nic.contexts[out] = std::move(context);
  return out;
}

FAKE_VERBS_EXPORT int ibv_close_device(ibv_context* base) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  const auto it = nic.contexts.find(base);
  if (it == nic.contexts.end()) return fail_int(EINVAL);
  // As the kernel does when the file is closed: what was forgotten goes with it.
  Context& context = *it->second;
  for (const auto& [key, qp] : context.qps) nic.remove(*qp), context.of->keys.unbind_all(*qp);
  for (const auto& [key, window] : context.windows) context.of->keys.remove(*window->key);
  for (const auto& [key, region] : context.regions) release(*region);
  pthread_mutex_destroy(&base->mutex);
  nic.contexts.erase(it);
  return 0;
}

FAKE_VERBS_EXPORT int ibv_query_device(ibv_context* context, ibv_device_attr* attr) {
  return fill_device(context_of(context), attr);
}

// The symbol's own signature is the one of old: a struct that ends before port_cap_flags2.
FAKE_VERBS_EXPORT int ibv_query_port(ibv_context* context, uint8_t port,
                                     _compat_ibv_port_attr* attr) {
  return fill_port(context, port, reinterpret_cast<ibv_port_attr*>(attr),
                   offsetof(ibv_port_attr, port_cap_flags2));
}

FAKE_VERBS_EXPORT int ibv_query_gid(ibv_context* base, uint8_t number, int index, ibv_gid* gid) {
  Context& context = context_of(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  int err = nic.refuse("query_gid", *context.of);
  const Port* port = context.of->port(number);
  if (!err && (!port || index < 0 || index >= static_cast<int>(port->gids.size()))) err = EINVAL;
  if (err) return fail_int(err), -1;
  *gid = port->gids[index].gid;
  return 0;
}

FAKE_VERBS_EXPORT int _ibv_query_gid_ex(ibv_context* base, uint32_t number, uint32_t index,
                                        ibv_gid_entry* entry, uint32_t flags, size_t size) {
  Context& context = context_of(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  if (const int err = nic.refuse("query_gid_ex", *context.of)) return fail_int(err);
  const Port* port = context.of->port(static_cast<int>(number));
  if (!port || index >= port->gids.size() || flags != 0 || size < sizeof *entry)
    return fail_int(EINVAL);
  const Gid& gid = port->gids[index];
  if (gid.empty()) return fail_int(ENODATA);
  // No interface is behind it: 0.
  *entry = {gid.gid, index, number, static_cast<uint32_t>(gid.type), 0};
  return 0;
}

FAKE_VERBS_EXPORT ssize_t _ibv_query_gid_table(ibv_context* base, ibv_gid_entry* entries,
                                               size_t room, uint32_t flags, size_t size) {
  Context& context = context_of(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  if (const int err = nic.refuse("query_gid_table", *context.of)) return -fail_int(err);
  if (flags != 0 || size < sizeof *entries) return -fail_int(EINVAL);
  size_t n = 0;
  for (const Port& port : context.of->ports)
    for (uint32_t i = 0; i < port.gids.size(); ++i) {
      if (port.gids[i].empty()) continue;
      if (n == room) return -fail_int(EINVAL);
      entries[n++] = {port.gids[i].gid, i, static_cast<uint32_t>(port.number),
                      static_cast<uint32_t>(port.gids[i].type), 0};
    }
  return static_cast<ssize_t>(n);
}

FAKE_VERBS_EXPORT int ibv_query_pkey(ibv_context* base, uint8_t number, int index, __be16* pkey) {
  Context& context = context_of(base);
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  int err = nic.refuse("query_pkey", *context.of);
  if (!err && (!context.of->port(number) || index != 0)) err = EINVAL;
  if (err) return fail_int(err), -1;
  *pkey = htobe16(0xffff);
  return 0;
}

FAKE_VERBS_EXPORT int ibv_get_pkey_index(ibv_context* base, uint8_t number, __be16 pkey) {
  if (!context_of(base).of->port(number) || pkey != htobe16(0xffff)) return fail_int(EINVAL), -1;
  return 0;
}

FAKE_VERBS_EXPORT int ibv_get_async_event(ibv_context* base, ibv_async_event* out) {
  Context& context = context_of(base);
  Nic& nic = Nic::get();
  const int err = context.async.pop([&] { return nic.lock(); }, *out,
                                    [](ibv_async_event& event) {
                                      if (is_of_cq(event))
                                        ++cq_of(event).async_events_given;
                                      else if (is_of_qp(event))
                                        ++qp_of(event).async_events_given;
                                    });
  return err ? (fail_int(err), -1) : 0;
}

FAKE_VERBS_EXPORT void ibv_ack_async_event(ibv_async_event* event) {
  const auto acknowledge = [](auto& object, uint32_t& completed) {
    pthread_mutex_lock(&object.mutex);
    ++completed;
    pthread_cond_signal(&object.cond);
    pthread_mutex_unlock(&object.mutex);
  };
  if (is_of_cq(*event)) acknowledge(*event->element.cq, event->element.cq->async_events_completed);
  if (is_of_qp(*event)) acknowledge(*event->element.qp, event->element.qp->events_completed);
}

FAKE_VERBS_EXPORT int ibv_fork_init() { return 0; }
FAKE_VERBS_EXPORT ibv_fork_status ibv_is_fork_initialized() { return IBV_FORK_UNNEEDED; }
