// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One shm connection: both halves over one channel, and the Unix socket that carries memfds and
// shows death.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "transport/shm/incoming.hpp"
#include "transport/shm/outgoing.hpp"
#include "transport/shm/unix_socket.hpp"

namespace kvxfer::shm {

class ShmConnection final : public Connection, public Pollable {
 public:
  struct Parts {
    std::shared_ptr<Mapping> control;
    int me = 0;
    Segment staging;
    std::shared_ptr<Mapping> peer_staging;
    Fd my_bell, peer_bell, socket;
    std::unique_ptr<Reach> reach;
  };
  ShmConnection(Host& host, Parts parts);
  void start();  // from here on the reactor drives it

  Status post(const RequestPtr& request) noexcept override;
  Cancelled cancel(const RequestPtr& request) noexcept override;
  void close(const Failure& cause) noexcept override;
  void join() noexcept override;
  std::shared_ptr<Pollable> pollable() noexcept override { return self(); }
  bool poll() override;
  bool doze() override;
  void awake() override { channel_.awake(); }
  std::string describe() const override;

  void withdraw(uint64_t region) noexcept;  // the peer may let go of it; any thread

 private:
  struct BellHandler;
  struct SocketHandler;

  std::shared_ptr<ShmConnection> self() {
    return std::static_pointer_cast<ShmConnection>(shared_from_this());
  }
  static std::shared_ptr<CopyClient> make_copiers(Host& host, ShmConnection* connection);
  // Of the progress thread, which alone stores it (under mutex_, for the others).
  bool is_dead() const noexcept { return dead_; }
  bool step();
  bool take_message();
  bool take_bulk();
  void read_socket();
  void broken(const char* what);
  void die(const Failure& cause);
  bool show(const Region& region) noexcept;
  bool show_words(const ExportedWords& words) noexcept;
  std::shared_ptr<PeerMemory> source(uint64_t region);

  Host& host_;
  Fd socket_;
  const std::unique_ptr<Reach> reach_;
  Channel channel_;
  Outgoing outgoing_;
  Incoming incoming_;

  mutable std::mutex
      mutex_;  // over the next four; held across a non-blocking sendmsg of some 20 bytes
  std::unordered_set<uint64_t> shown_;
  bool words_shown_ = false;
  bool dead_ = false;
  size_t num_taken_ = 0;  // for describe()

  // Progress thread only.
  std::unordered_map<uint64_t, std::shared_ptr<PeerMemory>> taken_;
  Bytes body_;
  bool bulk_held_ = false;  // the record in held_ waits for the spans before it
  uint32_t held_type_ = 0;
  Bytes held_;
  Reactor::Token bell_token_ = 0, socket_token_ = 0;
};

}  // namespace kvxfer::shm
