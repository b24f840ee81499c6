// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Entry points: protection domains, memory regions and windows.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "device_memory.hpp"
#include "exports.hpp"
#include "nic.hpp"

namespace fake_verbs {
namespace {

constexpr unsigned kKnownAccess = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |
                                  IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC |
                                  IBV_ACCESS_MW_BIND | IBV_ACCESS_OPTIONAL_RANGE;
constexpr unsigned kNeedsLocalWrite = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC;

// Pinning faults every page in; 0, or EFAULT where there is no memory, or none that may be written.
int pin(void* address, size_t length, bool write) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + length + page - 1) & ~(page - 1);
  if (end <= first) return EINVAL;
  constexpr int kPopulateRead = 22, kPopulateWrite = 23;  // MADV_: Linux 5.14, glibc later
  const int advice = write ? kPopulateWrite : kPopulateRead;
  if (::madvise(reinterpret_cast<void*>(first), end - first, advice) == 0) return 0;
  if (errno != EINVAL) return EFAULT;
  // An older kernel, which says no more than whether something is mapped there.
  std::vector<unsigned char> pages((end - first) / page);
  return ::mincore(reinterpret_cast<void*>(first), end - first, pages.data()) == 0 ? 0 : EFAULT;
}

// Where the plan holds registrations, until there is another: what is pinned may take long.
void wait_for_plan(Nic& nic) {
  uint64_t number = 0;
  for (bool held = false;;) {
    {
      const auto lock = nic.lock();
      if (!held) number = ++nic.num_registered;
      const bool holds = nic.plan.hold_reg != 0 && number >= nic.plan.hold_reg;
      if (holds != held) holds ? ++nic.num_registering : --nic.num_registering;
      held = holds;
    }
    if (!held) return;
    ::usleep(1000);
  }
}

ibv_mr* register_memory(const char* verb, ibv_pd* pd, void* address, size_t length, uint64_t iova,
                        unsigned access, Mapped mapped = {}) {
  Nic& nic = Nic::get();
  Context& context = context_of(pd->context);
  if (length == 0 || access & ~kKnownAccess ||
      (access & kNeedsLocalWrite && !(access & IBV_ACCESS_LOCAL_WRITE)))
    return fail_pointer<ibv_mr>(EINVAL);
  wait_for_plan(nic);
  {
    const auto lock = nic.lock();
    if (const int err = nic.refuse(verb, *context.of)) return fail_pointer<ibv_mr>(err);
    if (length > nic.plan.max_mr_size) return fail_pointer<ibv_mr>(EINVAL);
  }
  // Without the lock: it takes its time with large pools, as pinning does.
  if (const int err = mapped.at ? 0 : pin(address, length, access & IBV_ACCESS_LOCAL_WRITE))
    return fail_pointer<ibv_mr>(err);
  const auto lock = nic.lock();
  if (context.of->removed) return fail_pointer<ibv_mr>(EIO);
  if (context.regions.size() >= static_cast<size_t>(nic.plan.max_mr))
    return fail_pointer<ibv_mr>(ENOMEM);
  if (nic.plan.memlock != 0 && nic.locked_bytes + length > nic.plan.memlock)
    return fail_pointer<ibv_mr>(ENOMEM);
  nic.locked_bytes += length;
  auto region = std::make_unique<Region>();
  Key& key = context.of->keys.add(Key::What::kRegion, pd);
  key.valid = true;
  key.iova = iova;
  key.length = length;
  key.memory = static_cast<std::byte*>(address);
  key.access = access;
  region->key = &key;
  region->mapped = mapped.at;
  region->mapped_bytes = mapped.nbytes;
  region->context = pd->context;
  region->pd = pd;
  region->addr = reinterpret_cast<void*>(iova);
  region->length = length;
  region->lkey = key.lkey;
  region->rkey = key.rkey;
  region->handle = key.rkey >> 8;
  ++static_cast<Domain*>(pd)->users;
  ibv_mr* const out = region.get();
  context.regions[out] = std::move(region);
  return out;
}

// What is behind `fd`, which may be closed afterwards.
ibv_mr* register_mapped(const char* verb, ibv_pd* pd, int fd, uint64_t offset, size_t length,
                        uint64_t iova, int access) {
  Mapped mapped;
  if (!map_dmabuf(fd, offset, length, mapped)) return nullptr;
  ibv_mr* const out = register_memory(verb, pd, static_cast<std::byte*>(mapped.at) + mapped.before,
                                      length, iova, static_cast<unsigned>(access), mapped);
  if (!out) {
    const int err = errno;
    ::munmap(mapped.at, mapped.nbytes);
    errno = err;
  }
  return out;
}

}  // namespace

void release(Region& region) {
  Nic& nic = Nic::get();
  nic.locked_bytes -= region.length;
  --static_cast<Domain*>(region.pd)->users;
  context_of(region.context).of->keys.remove(*region.key);
  if (region.mapped) ::munmap(region.mapped, region.mapped_bytes);
}

ibv_mw* alloc_mw(ibv_pd* pd, ibv_mw_type type) {
  Nic& nic = Nic::get();
  Context& context = context_of(pd->context);
  const auto lock = nic.lock();
  if (const int err = nic.refuse("alloc_mw", *context.of)) return fail_pointer<ibv_mw>(err);
  if (!(nic.plan.windows & type)) return fail_pointer<ibv_mw>(EOPNOTSUPP);
  auto window = std::make_unique<Window>();
  Key& key =
      context.of->keys.add(type == IBV_MW_TYPE_1 ? Key::What::kWindow1 : Key::What::kWindow2, pd);
  window->key = &key;
  window->context = pd->context;
  window->pd = pd;
  window->rkey = key.rkey;
  window->handle = key.rkey >> 8;
  window->type = type;
  ++static_cast<Domain*>(pd)->users;
  ibv_mw* const out = window.get();
  context.windows[out] = std::move(window);
  return out;
}

int bind_mw(ibv_qp* qp, ibv_mw* mw, ibv_mw_bind* bind) {
  ibv_send_wr wr{};
  wr.wr_id = bind->wr_id;
  wr.opcode = IBV_WR_BIND_MW;
  wr.send_flags = bind->send_flags | kBindOfType1;
  wr.bind_mw.mw = mw;
  wr.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
  wr.bind_mw.bind_info = bind->bind_info;
  ibv_send_wr* bad = nullptr;
  const int err = post_send(qp, &wr, &bad);
  if (err == 0) mw->rkey = wr.bind_mw.rkey;
  return err;
}

int dealloc_mw(ibv_mw* mw) {
  Nic& nic = Nic::get();
  Context& context = context_of(mw->context);
  const auto lock = nic.lock();
  if (const int err = nic.refuse("dealloc_mw", *context.of)) return fail_int(err);
  --static_cast<Domain*>(mw->pd)->users;
  context.of->keys.remove(*static_cast<Window*>(mw)->key);
  context.windows.erase(mw);
  return 0;
}

}  // namespace fake_verbs

using namespace fake_verbs;

FAKE_VERBS_EXPORT ibv_pd* ibv_alloc_pd(ibv_context* base) {
  Nic& nic = Nic::get();
  Context& context = context_of(base);
  const auto lock = nic.lock();
  if (const int err = nic.refuse("alloc_pd", *context.of)) return fail_pointer<ibv_pd>(err);
  auto domain = std::make_unique<Domain>();
  domain->context = base;
  ibv_pd* const out = domain.get();
  context.domains[out] = std::move(domain);
  return out;
}

FAKE_VERBS_EXPORT int ibv_dealloc_pd(ibv_pd* pd) {
  Nic& nic = Nic::get();
  Context& context = context_of(pd->context);
  const auto lock = nic.lock();
  if (const int err = nic.refuse("dealloc_pd", *context.of)) return fail_int(err);
  if (static_cast<Domain*>(pd)->users > 0) return fail_int(EBUSY);
  context.domains.erase(pd);
  return 0;
}

FAKE_VERBS_EXPORT ibv_mr* ibv_reg_mr(ibv_pd* pd, void* address, size_t length, int access) {
  int fd = -1;
  uint64_t offset = 0;
  if (!Nic::get().by_hand && find_gpus(address, length, fd, offset)) {
    // A kernel without peermem finds no pages there.
    bool peermem;
    {
      const auto lock = Nic::get().lock();
      peermem = Nic::get().plan.peermem;
    }
    ibv_mr* const out = peermem ? register_mapped("reg_mr", pd, fd, offset, length,
                                                  reinterpret_cast<uintptr_t>(address), access)
                                : fail_pointer<ibv_mr>(EFAULT);
    const int err = errno;
    ::close(fd);
    errno = err;
    return out;
  }
  return register_memory("reg_mr", pd, address, length, reinterpret_cast<uintptr_t>(address),
                         static_cast<unsigned>(access));
}

FAKE_VERBS_EXPORT ibv_mr* ibv_reg_mr_iova(ibv_pd* pd, void* address, size_t length, uint64_t iova,
                                          int access) {
  return register_memory("reg_mr", pd, address, length, iova, static_cast<unsigned>(access));
}

FAKE_VERBS_EXPORT ibv_mr* ibv_reg_mr_iova2(ibv_pd* pd, void* address, size_t length, uint64_t iova,
                                           unsigned access) {
  return register_memory("reg_mr", pd, address, length, iova, access);
}

// Anything that can be mapped stands for a dma-buf: a memfd in tests, or what tests/fake_cuda
// gives.
FAKE_VERBS_EXPORT ibv_mr* ibv_reg_dmabuf_mr(ibv_pd* pd, uint64_t offset, size_t length,
                                            uint64_t iova, int fd, int access) {
  Nic& nic = Nic::get();
  {
    const auto lock = nic.lock();
    if (!nic.plan.dmabuf) return fail_pointer<ibv_mr>(EOPNOTSUPP);
    if (!nic.plan.dmabuf_windows && access & IBV_ACCESS_MW_BIND)
      return fail_pointer<ibv_mr>(EOPNOTSUPP);
  }
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  if (offset % page != iova % page) return fail_pointer<ibv_mr>(EINVAL);
  return register_mapped("reg_dmabuf_mr", pd, fd, offset, length, iova, access);
}

FAKE_VERBS_EXPORT int ibv_dereg_mr(ibv_mr* mr) {
  Nic& nic = Nic::get();
  Context& context = context_of(mr->context);
  const auto lock = nic.lock();
  if (const int err = nic.refuse("dereg_mr", *context.of)) return fail_int(err);
  auto& region = *static_cast<Region*>(mr);
  if (region.key->windows > 0) return fail_int(EBUSY);
  release(region);
  context.regions.erase(mr);
  return 0;
}
