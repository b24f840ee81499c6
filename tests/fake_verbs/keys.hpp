// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The translation table: memory regions and windows by key, asked at the moment of each access.
//
// A key is an index (24 bits, given out upwards, so that none comes back soon) and a variant (the
// low 8 bits). A region's lkey and rkey differ in the variant, as they do on some devices: one is
// not accepted for the other. A window's variant is chosen by whoever binds it.
#pragma once

#include <infiniband/verbs.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace fake_verbs {

struct QueuePair;

inline constexpr uint32_t kVariant = 0xff;

struct Key {
  enum class What { kRegion, kWindow1, kWindow2 } what = What::kRegion;
  uint32_t rkey = 0, lkey = 0;  // of a window lkey is not used
  bool valid = false;           // a window is only while it is bound
  const ibv_pd* pd = nullptr;
  uint64_t iova = 0, length = 0;  // what remote and local addresses mean
  std::byte* memory = nullptr;    // where they lie
  unsigned access = 0;
  Key* region = nullptr;          // of a bound window
  const QueuePair* qp = nullptr;  // of a bound window of type 2
  int windows = 0;                // bound to this region
};

class Keys {
 public:
  Keys();
  Key& add(Key::What what, const ibv_pd* pd);
  void remove(const Key& key);
  // By index; the variant may be another. Null: no such.
  Key* at(uint32_t key);

  // Where [address, address + length) lies, for `qp`, or null. `access` is what is asked of it.
  std::byte* remote(const QueuePair& qp, uint32_t rkey, uint64_t address, uint64_t length,
                    unsigned access);
  std::byte* local(const ibv_pd* pd, uint32_t lkey, uint64_t address, uint64_t length, bool write);

  // Windows. False: refused, and nothing has changed. A window's key before the bind has to be
  // `old_rkey` exactly: whoever keeps a stale one in ibv_mw is found out.
  bool bind(const QueuePair& qp, uint32_t old_rkey, uint32_t new_rkey, const ibv_mw_bind_info& info,
            uint32_t region);
  bool invalidate(const QueuePair& qp, uint32_t rkey);
  void unbind_all(const QueuePair& qp);  // it is destroyed

 private:
  static void unbind(Key& window);
  std::unordered_map<uint32_t, std::unique_ptr<Key>> keys_;  // by index
  uint32_t next_;
};

}  // namespace fake_verbs
