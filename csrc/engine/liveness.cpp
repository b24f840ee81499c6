// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A pidfd beside the sockets, for peers on this host: a process's sockets may
// be held open by a child that it forked, its pidfd may not. The first of them
// to speak ends the session.
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "engine/engine.hpp"

#ifndef SYS_pidfd_open  // Linux 5.3
#define SYS_pidfd_open 434
#endif

namespace kvxfer {
namespace {
// A peer that leaves in order says so over its socket, which may be read a
// moment later.
constexpr int64_t kLastWordsNs = 20'000'000;
}  // namespace

struct Engine::ProcessHandler final : FdHandler {
  ProcessHandler(Engine& e, const LinkPtr& l) : engine(e), link(l) {}
  void on_events(uint32_t) override {
    auto watched = link.lock();
    if (!watched) return;
    engine.unwatch_process(*watched);
    engine.reactor_.at(now_ns() + kLastWordsNs, [control = watched->control] {
      control->close({.code = Code::kPeerDisconnected, .text = "the peer's process ended"});
    });
  }
  Engine& engine;  // outlives its reactor's thread
  std::weak_ptr<Link> link;
};

// Once, when the session is ready; progress thread.
void Engine::watch_process(const LinkPtr& link) noexcept {
  const HostIdentity &theirs = link->control->session().peer.host, &ours = identity_.host;
  auto sockets_alone = [&](const std::string& why) {
    link->liveness = "its sockets alone: " + why;
  };
  // The boot id is a hint only (cloned machines share it, and namespaces have
  // the same numbers everywhere); two ends of one connection with one address
  // are on one host.
  if (theirs.boot_id != ours.boot_id || !link->control->same_host())
    return sockets_alone("it is on another host or in another network namespace");
  if (theirs.pid_ns != ours.pid_ns) return sockets_alone("it is in another pid namespace");
  if (theirs.pid == ours.pid) return sockets_alone("it is an engine of this process");
  Fd fd(static_cast<int>(::syscall(SYS_pidfd_open, theirs.pid, 0)));
  if (!fd) return sockets_alone(cat("pidfd_open(", theirs.pid, ") failed: ", errno_text(errno)));
  try {
    link->process_token =
        reactor_.add(fd.get(), EPOLLIN, std::make_shared<ProcessHandler>(*this, link));
  } catch (const Error& error) {
    return sockets_alone(error.what());
  }
  link->process = std::move(fd);
  link->liveness = cat("its sockets and its pidfd (process ", theirs.pid, ")");
}

void Engine::unwatch_process(Link& link) noexcept {
  if (link.process_token == 0) return;
  reactor_.remove(std::exchange(link.process_token, 0), link.process.get());
  link.process.reset();
}

}  // namespace kvxfer
