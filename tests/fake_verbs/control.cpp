// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What fake_verbs.h declares.
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "exports.hpp"
#include "fake_verbs.h"
#include "nic.hpp"

using namespace fake_verbs;

namespace {

Device* find_device(Nic& nic, const char* name) {
  for (const auto& device : nic.devices())
    if (std::strcmp(device->name, name) == 0) return device.get();
  return nullptr;
}

}  // namespace

FAKE_VERBS_EXPORT int fake_verbs_plan(const char* text) {
  Nic& nic = Nic::get();
  try {
    const Plan plan = parse_plan(text, nic.devices_at_start);
    const auto lock = nic.lock();
    nic.set_plan(plan);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return EINVAL;
  }
  return 0;
}

FAKE_VERBS_EXPORT void fake_verbs_hold(uint32_t qp_num) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  nic.network.hold(qp_num);
}

FAKE_VERBS_EXPORT void fake_verbs_release(uint32_t qp_num) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  nic.network.release(qp_num);
  nic.arm(0);
}

FAKE_VERBS_EXPORT void fake_verbs_pass(uint32_t qp_num, int num_packets) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  nic.network.pass(qp_num, num_packets);
  nic.arm(0);
}

FAKE_VERBS_EXPORT int fake_verbs_num_held(uint32_t qp_num) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  return nic.network.num_held(qp_num);
}

FAKE_VERBS_EXPORT void fake_verbs_fail_next(uint32_t qp_num, ibv_wc_status status) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  nic.doomed[qp_num] = status;
}

FAKE_VERBS_EXPORT void fake_verbs_tamper(fake_verbs_tamperer tamper) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  nic.tamper = tamper;
}

FAKE_VERBS_EXPORT int fake_verbs_break_qp(uint32_t qp_num) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  QueuePair* const qp = nic.find(qp_num);
  if (!qp) return ENOENT;
  nic.break_qp(*qp, IBV_EVENT_QP_FATAL);
  return 0;
}

FAKE_VERBS_EXPORT int fake_verbs_overrun_cq(uint32_t qp_num) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  QueuePair* const qp = nic.find(qp_num);
  if (!qp) return ENOENT;
  auto& cq = *static_cast<CompletionQueue*>(qp->send_cq);
  cq.cqe = static_cast<int>(cq.entries.size());
  return 0;
}

FAKE_VERBS_EXPORT int fake_verbs_set_port(const char* name, int number, int up) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  Device* const device = find_device(nic, name);
  Port* const port = device ? device->port(number) : nullptr;
  if (!port) return ENODEV;
  nic.set_port(*port, up != 0);
  return 0;
}

FAKE_VERBS_EXPORT int fake_verbs_cut_port(const char* name, int number, int cut) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  Device* const device = find_device(nic, name);
  Port* const port = device ? device->port(number) : nullptr;
  if (!port) return ENODEV;
  port->cut = cut != 0;
  return 0;
}

FAKE_VERBS_EXPORT int fake_verbs_remove_device(const char* name) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  Device* const device = find_device(nic, name);
  if (!device) return ENODEV;
  nic.remove_device(*device);
  return 0;
}

FAKE_VERBS_EXPORT int fake_verbs_restore_device(const char* name) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  Device* const device = find_device(nic, name);
  if (!device || !device->removed) return ENODEV;
  nic.replace_device(*device);
  return 0;
}

FAKE_VERBS_EXPORT int64_t fake_verbs_count(const char* name) {
  Nic& nic = Nic::get();
  const auto lock = nic.lock();
  const Statistics& s = nic.statistics;
  const auto alive = [&](auto member) {
    uint64_t n = 0;
    for (const auto& [key, context] : nic.contexts) n += (context.get()->*member).size();
    return n;
  };
  uint64_t writable = 0;
  for (const auto& [key, context] : nic.contexts)
    for (const auto& [unused, region] : context->regions)
      writable += (region->key->access & IBV_ACCESS_REMOTE_WRITE) != 0;
  const std::pair<const char*, uint64_t> counts[] = {
      {"work_requests", s.work_requests},
      {"doorbells", s.doorbells},
      {"receives", s.receives},
      {"packets", s.packets},
      {"retransmissions", s.retransmissions},
      {"failed_calls", s.failed_calls},
      {"timeouts", s.timeouts},
      {"rnr_naks", s.rnr_naks},
      {"completions", s.completions},
      {"events", s.events},
      {"binds", s.binds},
      {"bytes_placed", s.bytes_placed},
      {"inline", s.inlined},
      {"dirty_destroys", s.dirty_destroys},
      {"writable_regions", writable},
      {"dropped", nic.network.dropped},
      {"duplicated", nic.network.duplicated},
      {"delayed", nic.network.delayed},
      {"acks_lost", nic.network.acks_lost},
      {"qps", alive(&Context::qps)},
      {"regions", alive(&Context::regions)},
      {"windows", alive(&Context::windows)},
      {"cqs", alive(&Context::cqs)},
      {"locked_bytes", nic.locked_bytes},
      {"registering", nic.num_registering},
  };
  for (const auto& [known, count] : counts)
    if (std::strcmp(known, name) == 0) return static_cast<int64_t>(count);
  return -1;
}
