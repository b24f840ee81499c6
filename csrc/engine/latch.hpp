// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What `after=` waits for: opened once, by the application (a Signal) or by the
// end of a transfer.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace kvxfer {

struct Transfer;

class Latch {
 public:
  // True: it is shut, and `transfer` hears of it when it opens. The engine owns
  // what is held; a transfer that has ended meanwhile is not called.
  bool hold(const std::shared_ptr<Transfer>& transfer);
  // Any thread, also a CUDA host callback: a short lock, and a wake-up of the
  // progress thread. Who is second to open it changes nothing.
  void open() { settle({}); }
  // What was waited for will never come: all that is held ends as cancelled,
  // because of `why`.
  void fail(std::string why) { settle(std::move(why)); }

  bool settled() const;
  std::optional<std::string> failed() const;

 private:
  void settle(std::optional<std::string> why);

  mutable std::mutex mutex_;  // over all below; innermost
  bool settled_ = false;
  std::optional<std::string> failed_;
  std::vector<std::weak_ptr<Transfer>> held_;
};
using LatchPtr = std::shared_ptr<Latch>;

}  // namespace kvxfer
