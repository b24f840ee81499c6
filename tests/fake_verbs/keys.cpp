// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "keys.hpp"

#include <random>
#include <utility>

#include "queue_pair.hpp"

namespace fake_verbs {
namespace {

bool inside(const Key& key, uint64_t address, uint64_t length) {
  return address >= key.iova && length <= key.length && address - key.iova <= key.length - length;
}

}  // namespace

Keys::Keys() : next_(std::random_device{}() & 0x3fffff) {}

Key& Keys::add(Key::What what, const ibv_pd* pd) {
  do next_ = (next_ + 1) & 0xffffff;
  while (next_ == 0 || keys_.contains(next_));
  auto key = std::make_unique<Key>();
  key->what = what;
  key->pd = pd;
  key->rkey = next_ << 8 | 0x11;
  key->lkey = next_ << 8 | 0xee;
  return *(keys_[next_] = std::move(key));
}

void Keys::remove(const Key& key) {
  if (Key* known = at(key.rkey); known->what != Key::What::kRegion) unbind(*known);
  keys_.erase(key.rkey >> 8);
}

Key* Keys::at(uint32_t key) {
  const auto it = keys_.find(key >> 8);
  return it == keys_.end() ? nullptr : it->second.get();
}

std::byte* Keys::remote(const QueuePair& qp, uint32_t rkey, uint64_t address, uint64_t length,
                        unsigned access) {
  const Key* key = at(rkey);
  if (!key || !key->valid || key->rkey != rkey || key->pd != qp.pd) return nullptr;
  if ((key->access & access) != access || !inside(*key, address, length)) return nullptr;
  if (key->what == Key::What::kWindow2 && key->qp != &qp) return nullptr;
  return key->memory + (address - key->iova);
}

std::byte* Keys::local(const ibv_pd* pd, uint32_t lkey, uint64_t address, uint64_t length,
                       bool write) {
  const Key* key = at(lkey);
  if (!key || key->what != Key::What::kRegion || key->lkey != lkey || key->pd != pd) return nullptr;
  if (write && !(key->access & IBV_ACCESS_LOCAL_WRITE)) return nullptr;
  if (!inside(*key, address, length)) return nullptr;
  return key->memory + (address - key->iova);
}

void Keys::unbind(Key& window) {
  if (window.region) --window.region->windows;
  window.region = nullptr;
  window.qp = nullptr;
  window.valid = false;
}

bool Keys::bind(const QueuePair& qp, uint32_t old_rkey, uint32_t new_rkey,
                const ibv_mw_bind_info& info, uint32_t region) {
  Key* window = at(old_rkey);
  if (!window || window->what == Key::What::kRegion || window->rkey != old_rkey ||
      window->pd != qp.pd)
    return false;
  if ((new_rkey & kVariant) == (old_rkey & kVariant)) return false;
  if (window->what == Key::What::kWindow2 && (window->valid || info.length == 0)) return false;
  if (info.length == 0) {  // type 1: this is how it is taken back
    unbind(*window);
    window->rkey = (old_rkey & ~kVariant) | (new_rkey & kVariant);
    return true;
  }
  const unsigned access = info.mw_access_flags;
  Key* under = at(region);
  if (!under || under->what != Key::What::kRegion || under->pd != qp.pd) return false;
  if (!(under->access & IBV_ACCESS_MW_BIND)) return false;
  if ((access & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)) &&
      !(under->access & IBV_ACCESS_LOCAL_WRITE))
    return false;
  if (!inside(*under, info.addr, info.length)) return false;
  unbind(*window);
  window->rkey = (old_rkey & ~kVariant) | (new_rkey & kVariant);
  window->memory = under->memory + (info.addr - under->iova);
  window->iova = access & IBV_ACCESS_ZERO_BASED ? 0 : info.addr;
  window->length = info.length;
  window->access = access;
  window->region = under;
  window->qp = window->what == Key::What::kWindow2 ? &qp : nullptr;
  window->valid = true;
  ++under->windows;
  return true;
}

bool Keys::invalidate(const QueuePair& qp, uint32_t rkey) {
  Key* window = at(rkey);
  if (!window || window->what != Key::What::kWindow2 || !window->valid || window->rkey != rkey ||
      window->qp != &qp)
    return false;
  unbind(*window);
  return true;
}

void Keys::unbind_all(const QueuePair& qp) {
  for (auto& [index, key] : keys_)
    if (key->qp == &qp) unbind(*key);
}

}  // namespace fake_verbs
