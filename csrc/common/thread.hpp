// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A thread of ours: it takes no signals, which belong to the application's threads (a handler must
// interrupt a waiting main thread), and has a name.
#pragma once

#include <pthread.h>

#include <csignal>
#include <thread>
#include <utility>

namespace kvxfer {

// `name`: 15 bytes at most. Throws as std::thread does.
template <typename Run>
std::thread start_thread(const char* name, Run&& run) {
  struct NoSignals {
    NoSignals() {
      sigset_t all;
      sigfillset(&all);
      pthread_sigmask(SIG_BLOCK, &all, &old);
    }
    ~NoSignals() { pthread_sigmask(SIG_SETMASK, &old, nullptr); }
    sigset_t old;
  } const inherited;
  std::thread thread(std::forward<Run>(run));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace kvxfer
