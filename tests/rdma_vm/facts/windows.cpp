// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory windows: what a bind allows, what an invalidation stops, and when.
#include <algorithm>

#include "facts.hpp"

namespace facts {
namespace {

struct Window {
  ibv_mw* mw;
  explicit Window(Device& device) : mw(ibv_alloc_mw(device.pd, IBV_MW_TYPE_2)) {
    if (mw == nullptr) fail("ibv_alloc_mw");
  }
  ~Window() { ibv_dealloc_mw(mw); }
  Window(const Window&) = delete;

  // Binds to part of `memory` under the next key, by a request on `side`.
  int post_bind(Side& side, Memory& memory, size_t offset, size_t nbytes) {
    ibv_send_wr request{};
    request.opcode = IBV_WR_BIND_MW;
    request.send_flags = IBV_SEND_SIGNALED;
    request.bind_mw.mw = mw;
    request.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
    request.bind_mw.bind_info = {.mr = memory.mr,
                                 .addr = memory.address(offset),
                                 .length = nbytes,
                                 .mw_access_flags = IBV_ACCESS_REMOTE_WRITE};
    const int error = side.post(request);
    if (error == 0) mw->rkey = request.bind_mw.rkey;
    return error;
  }
  int post_invalidate(Side& side) {
    ibv_send_wr request{};
    request.opcode = IBV_WR_LOCAL_INV;
    request.send_flags = IBV_SEND_SIGNALED;
    request.invalidate_rkey = mw->rkey;
    return side.post(request);
  }
};

std::string bound(Window& window, Side& side, Memory& memory, size_t offset = 0,
                  size_t nbytes = 65536) {
  if (const int error = window.post_bind(side, memory, offset, nbytes); error != 0)
    return std::strerror(error);
  return side.status();
}

// Whether bytes of a write that had begun land after the completion of LOCAL_INV, or of the QP's
// move to ERR.
std::string landed_after(World& world, bool invalidate) {
  constexpr int kRounds = 40;
  constexpr size_t kLong = 512 << 10;
  Memory from(world.here, 7), to(world.there, 0);
  int begun = 0, late = 0;
  ptrdiff_t most = 0;
  for (int round = 0; round < kRounds; ++round) {
    Limits limits;
    limits.retries = 1;
    Pair pair(world, limits);
    Window window(world.there);
    bound(window, pair.target, to, 0, kLong);
    std::fill_n(to.bytes, kBytes, 0);
    std::thread writer([&] { written(pair, from, to.address(), window.mw->rkey, kLong); });
    const volatile unsigned char* first = to.bytes;
    const volatile unsigned char* last = to.bytes + kLong - 1;
    while (*first == 0) {
    }
    if (invalidate) {
      window.post_invalidate(pair.target);
      pair.target.status();
    } else {
      pair.target.to(IBV_QPS_ERR);
    }
    const std::vector<unsigned char> then(to.bytes, to.bytes + kLong);
    begun += *last == 0;
    writer.join();
    std::this_thread::sleep_for(10ms);
    ptrdiff_t differ = 0;
    for (size_t i = 0; i < kLong; ++i) differ += then[i] != to.bytes[i];
    late += differ != 0;
    most = std::max(most, differ);
  }
  return std::to_string(late) + " of " + std::to_string(kRounds) + " times (" +
         std::to_string(begun) + " times the write was still under way; at most " +
         std::to_string(most) + " bytes)";
}

}  // namespace

void window_facts(World& world) {
  Memory from(world.here, 7), to(world.there, 0);
  {
    Pair pair(world);
    Window window(world.there);
    const std::string bind = bound(window, pair.target, to);
    say("bind a 2B window by ibv_post_send on the target's QP", bind);
    const std::string status = written(pair, from, to.address(64), window.mw->rkey);
    say("write through it",
        status +
            (to.bytes[64] == 7 && to.bytes[4159] == 7 ? ", bytes there" : ", bytes NOT there"));
    say("read through it, bound for writes only", [&] {
      ibv_sge sge = from.sge(0, 64);
      ibv_send_wr request = read_of(&sge, 1, to.address(), window.mw->rkey);
      if (const int error = pair.initiator.post(request); error != 0)
        return std::string(std::strerror(error));
      const std::string read = pair.initiator.status();
      return read + states(pair);
    }());
  }
  std::fill_n(to.bytes, kBytes, 0);
  {
    Pair pair(world);
    Window window(world.there);
    bound(window, pair.target, to);
    if (const int error = window.post_invalidate(pair.target); error != 0) fail("LOCAL_INV", error);
    say("LOCAL_INV of a window", pair.target.status());
    const std::string status = written(pair, from, to.address(), window.mw->rkey);
    say("write under the invalidated key",
        status + (to.bytes[0] == 0 ? ", nothing landed" : ", bytes LANDED") + states(pair));
  }
  {
    Pair pair(world);
    Window window(world.there);
    bound(window, pair.target, to);
    const uint32_t old = window.mw->rkey;
    window.post_invalidate(pair.target);
    pair.target.status();
    say("bind again after LOCAL_INV", bound(window, pair.target, to));
    say("write under the key of the earlier bind",
        written_then_states(pair, from, to.address(), old));
  }
  {
    Pair pair(world);
    Window window(world.there);
    bound(window, pair.target, to);
    const std::string again = bound(window, pair.target, to);
    say("bind again without LOCAL_INV", again + states(pair));
  }
  {
    Pair pair(world), other(world);
    Window window(world.there);
    bound(window, pair.target, to);
    say("write through another QP than the one it was bound on",
        written_then_states(other, from, to.address(), window.mw->rkey));
    const std::string status = written(pair, from, to.address(65536 - 64), window.mw->rkey);
    say("write past the window's end, inside its region",
        status + (to.bytes[65536] == 7 ? ", bytes LANDED outside" : ", nothing outside") +
            states(pair));
  }
  {
    Pair pair(world);
    Window window(world.there);
    bound(window, pair.target, to);
    pair.target.post_receive(1);
    ibv_send_wr request{};
    request.opcode = IBV_WR_SEND_WITH_INV;
    request.send_flags = IBV_SEND_SIGNALED;
    request.invalidate_rkey = window.mw->rkey;
    pair.initiator.post(request);
    const std::string sent = pair.initiator.status();
    say("SEND_WITH_INV by the initiator",
        sent + "; a write afterwards: " + written(pair, from, to.address(), window.mw->rkey));
  }
  {
    Pair pair(world);
    Window window(world.there);
    bound(window, pair.target, to);
    const int refused = ibv_dereg_mr(to.mr);
    say("deregister a region with a window bound to it",
        refused == 0 ? "allowed" : std::strerror(refused));
    if (refused == 0) to.mr = nullptr;
  }
  {
    Memory fresh(world.there);
    Pair pair(world);
    Window window(world.there);
    const uint32_t first = window.mw->rkey;
    int binds = 0;
    std::string status = "success";
    do {
      status = bound(window, pair.target, fresh);
      if (status != "success") break;
      ++binds;
      window.post_invalidate(pair.target);
      status = pair.target.status();
    } while (status == "success" && window.mw->rkey != first && binds < 300);
    say("binds until the key is the first again", std::to_string(binds) + " (" + status + ")");
  }
  {
    Memory fresh(world.there);
    Pair pair(world);
    Window window(world.there);
    bound(window, pair.target, fresh);
    pair.target.to(IBV_QPS_ERR);
    say("LOCAL_INV on a QP in ERR", [&] {
      const int error = window.post_invalidate(pair.target);
      return error != 0 ? std::string(std::strerror(error)) : pair.target.status();
    }());
    const int freed = ibv_dealloc_mw(window.mw);
    say("free a window whose QP is in ERR", freed == 0 ? "success" : std::strerror(freed));
    const int dropped = freed == 0 ? ibv_dereg_mr(fresh.mr) : -1;
    say("deregister the region then", dropped == 0 ? "success" : std::strerror(dropped));
    if (dropped == 0) fresh.mr = nullptr;
    window.mw = ibv_alloc_mw(world.there.pd, IBV_MW_TYPE_2);  // for its destructor
  }
}

void fence_facts(World& world) {
  say("bytes of a write of 512 KiB land after the completion of LOCAL_INV",
      landed_after(world, true));
  say("bytes of a write of 512 KiB land after ibv_modify_qp to ERR by the owner",
      landed_after(world, false));
}

}  // namespace facts
