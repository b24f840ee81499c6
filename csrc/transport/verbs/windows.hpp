// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The windows that this engine, as an owner, has given to one peer, from the question to the moment
// when their keys may be used again. window.hpp has what each of them is. Progress thread only.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/verbs/channel.hpp"
#include "transport/verbs/memory.hpp"
#include "transport/verbs/rail.hpp"
#include "transport/verbs/window.hpp"

namespace kvxfer::verbs {

class Windows {
 public:
  // How long the peer may take to drain, and the NIC to invalidate, until we go on without them.
  static constexpr int64_t kPatienceNs = 250'000'000;

  // `stopped`: the lease's requests are to be refused with this.
  using Stopped = std::function<void(const Lease&, const Failure&)>;
  Windows(Channel& channel, Rails& rails, MemoryTable& memory, Connection& connection, Host& host,
          Stopped stopped)
      : channel_(channel),
        rails_(rails),
        memory_(memory),
        connection_(connection),
        host_(host),
        stopped_(std::move(stopped)) {}

  // False from on_…: the peer broke the protocol. `why_not`: none can be had at all; or empty.
  bool on_ask(ByteView body, const std::string& why_not);
  bool on_drained(ByteView body);

  // The sink of this rail has been connected: everything that is open is bound there.
  void bind_all(Rail& rail);
  // A bind or an invalidation is through. False: the sink must be replaced.
  bool on_op(Rail& rail, const ibv_wc& completion);
  // The sink of this rail is in ERR and drained: what was bound there is freed. Once it is
  // destroyed, settle().
  void free_all(Rail& rail);
  void settle();

  // Gates may have been closed: their windows are on their way out.
  void look_at_gates();
  // What has waited too long goes on without its peer, and `stuck` names each rail whose NIC does
  // not answer. When to call it again; kNever.
  int64_t check(int64_t now_ns, const std::function<void(Rail&)>& stuck);
  bool is_open(uint64_t lease) const;
  void clear();  // when no sink is left

  size_t num() const noexcept { return num_.load(std::memory_order_relaxed); }

 private:
  std::optional<std::string> refusal(const Lease& lease, Window& window) const;
  void refuse(const NoWindowHead& head, const std::string& text);
  void tell(const Window& window);
  void bind(const WindowPtr& window, Rail& rail);
  void give_up_if_unbound(const WindowPtr& window);
  void ask(Window& window);
  void close(const WindowPtr& window);
  void leave(Window& window);
  bool settle(const WindowPtr& window);  // true: it may be forgotten
  void count() noexcept { num_.store(windows_.size(), std::memory_order_relaxed); }

  Channel& channel_;
  Rails& rails_;
  MemoryTable& memory_;
  Connection& connection_;
  Host& host_;
  const Stopped stopped_;
  std::unordered_map<uint64_t, WindowPtr> windows_;  // by lease
  std::vector<WindowPtr> scratch_;
  uint32_t num_failed_ = 0;     // binds in a row
  std::atomic<size_t> num_{0};  // for reports; relaxed
};

}  // namespace kvxfer::verbs
