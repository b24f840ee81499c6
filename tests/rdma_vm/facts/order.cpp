// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The order of immediates, reads and writes.
#include <algorithm>

#include "facts.hpp"

namespace facts {

void order_facts(World& world) {
  Memory from(world.here, 5), to(world.there);
  {
    Pair pair(world);
    int early = 0;
    for (int round = 0; round < 200; ++round) {
      const auto value = static_cast<unsigned char>(round % 251 + 1);
      std::fill_n(from.bytes, 65536, value);
      pair.target.post_receive(static_cast<uint64_t>(round));
      std::array<ibv_sge, 9> sges;
      std::array<ibv_send_wr, 9> chain;
      for (size_t i = 0; i < 9; ++i) {
        sges[i] = from.sge(i < 8 ? i * 8192 : 0, i < 8 ? 8192 : 0);
        chain[i] = write_of(&sges[i], i < 8 ? 1 : 0, to.address(i < 8 ? i * 8192 : 0), to.mr->rkey);
        chain[i].send_flags = i == 8 ? IBV_SEND_SIGNALED : 0;
        chain[i].next = i == 8 ? nullptr : &chain[i + 1];
      }
      chain[8].opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
      chain[8].imm_data = htobe32(0xabc00000U + static_cast<uint32_t>(round));
      pair.initiator.post(chain[0]);
      const auto arrived = pair.target.next();
      if (!arrived || be32toh(arrived->imm_data) != 0xabc00000U + static_cast<uint32_t>(round))
        fail("no immediate", EPROTO);
      early +=
          !std::all_of(to.bytes, to.bytes + 65536, [&](unsigned char c) { return c == value; });
      pair.initiator.next();
    }
    say("immediate before the bytes of 8 earlier writes", std::to_string(early) + " of 200 times");
  }
  {
    Pair pair(world);
    ibv_sge sge = from.sge(0, 4096);
    ibv_send_wr request = write_of(&sge, 1, to.address(), to.mr->rkey);
    request.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    std::fill_n(from.bytes, 4096, 99);
    pair.initiator.post(request);
    const std::string status = pair.initiator.status();
    say("WRITE_WITH_IMM without a receive posted, rnr_retry 3",
        status + (to.bytes[4095] == 99 ? ", bytes landed" : ", nothing landed") + states(pair));
  }
  {
    Limits limits;
    limits.reads = 4;
    Pair pair(world, limits);
    std::vector<ibv_sge> sges;
    std::vector<ibv_send_wr> chain;
    for (size_t i = 0; i < 32; ++i) sges.push_back(from.sge(i * 16384, 16384));
    for (size_t i = 0; i < 32; ++i)
      chain.push_back(read_of(&sges[i], 1, to.address(i * 16384), to.mr->rkey, i));
    for (size_t i = 0; i + 1 < 32; ++i) chain[i].next = &chain[i + 1];
    const int error = pair.initiator.post(chain[0]);
    size_t in_order = 0;
    for (uint64_t i = 0; i < 32; ++i) {
      const auto done = pair.initiator.next();
      in_order += done && done->status == IBV_WC_SUCCESS && done->wr_id == i;
    }
    say("32 reads posted with max_rd_atomic 4", std::string(std::strerror(error)) + ", " +
                                                    std::to_string(in_order) +
                                                    " completed in order");
  }
  {
    Pair pair(world);
    int overtaken = 0;
    for (int round = 0; round < 100; ++round) {
      std::fill_n(to.bytes, 524288, 1);
      std::fill_n(from.bytes, kBytes, 2);
      std::array<ibv_sge, 2> sges{from.sge(0, 524288), from.sge(524288, 524288)};
      ibv_send_wr read = read_of(&sges[0], 1, to.address(), to.mr->rkey);
      ibv_send_wr write = write_of(&sges[1], 1, to.address(), to.mr->rkey);
      read.next = &write;
      pair.initiator.post(read);
      pair.initiator.next();
      pair.initiator.next();
      overtaken +=
          std::any_of(from.bytes, from.bytes + 524288, [](unsigned char c) { return c == 2; });
    }
    say("a read sees bytes of the write posted behind it (no fence)",
        std::to_string(overtaken) + " of 100 times");
  }
}

}  // namespace facts
