// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The fabric: datagrams between abstract Unix sockets, one socket a process, and what happens to
// packets on their way. Who may reach whom is judged on delivery, by addresses.
//
// A process holds a slot, which is the upper half of its QP numbers and the name of its socket,
// within a network named by KVXFER_FAKE_VERBS_NET (by default the user's uid). The kernel forgets
// the name when the process dies.
#pragma once

#include <poll.h>

#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "packet.hpp"
#include "plan.hpp"

namespace fake_verbs {

inline constexpr int kSlotShift = 12;  // 4096 QPs a process, 4096 processes

// Everything under the NIC's lock.
class Network {
 public:
  // Throws std::system_error.
  void open();
  void abandon() noexcept;  // in a forked child
  uint32_t slot() const noexcept { return slot_; }

  void send(Packet packet, const Plan& plan, std::mt19937_64& random, int64_t now);
  // Hands every waiting datagram to the kernel that it takes.
  void flush();
  // No QP is left here: closes what leads to other processes, which else stayed beyond their end.
  void leave_peers();
  // Up to `most` packets for QPs of this process, in order of arrival.
  void receive(std::deque<Packet>& out, size_t most, int64_t now);
  // When the next delayed packet is due; kNever.
  int64_t next_due() const noexcept;
  // What to sleep on: arrivals, and peers that were full.
  void add_poll(std::vector<pollfd>& out) const;

  // Packets to this QP wait for release().
  void hold(uint32_t qpn) { held_[qpn]; }
  int num_held(uint32_t qpn) const {
    const auto held = held_.find(qpn);
    return held == held_.end() ? 0 : static_cast<int>(held->second.size());
  }
  void release(uint32_t qpn);
  void pass(uint32_t qpn, int num_packets);

  bool alone = false;  // before open(): there is no other process
  uint64_t dropped = 0, duplicated = 0, delayed = 0, acks_lost = 0;

 private:
  struct Peer {
    int fd = -1;
    std::deque<std::vector<std::byte>> waiting;  // datagrams of whole packets
  };
  void route(Packet packet);
  void dispatch(Peer& peer, const Packet& packet);
  bool drain(Peer& peer);  // false: nobody is there any more
  void release_due(int64_t now);
  void parse(const std::byte* data, size_t n);
  void arrive(Packet packet);

  std::string name_;  // of the network
  uint32_t slot_ = 1;
  int fd_ = -1;
  std::unordered_map<uint32_t, Peer> peers_;
  std::deque<Packet> arrived_;
  std::multimap<int64_t, Packet> late_;
  std::unordered_map<uint64_t, int64_t> last_due_;  // by pair of QPs: nothing may overtake it
  std::unordered_map<uint32_t, std::deque<Packet>> held_;
};

}  // namespace fake_verbs
