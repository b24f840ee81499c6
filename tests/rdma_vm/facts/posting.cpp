// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Limits, and what happens at and past them.
#include <algorithm>

#include "facts.hpp"

namespace facts {
namespace {

std::string limit_text(Device& device) {
  const auto& a = device.attributes;
  const bool type_2b = (a.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B) != 0;
  return "max_sge " + std::to_string(a.max_sge) + ", max_sge_rd " + std::to_string(a.max_sge_rd) +
         ", max_qp_rd_atom " + std::to_string(a.max_qp_rd_atom) + ", max_qp_wr " +
         std::to_string(a.max_qp_wr) + ", max_cqe " + std::to_string(a.max_cqe) + ", max_mw " +
         std::to_string(a.max_mw) + (type_2b ? ", windows of type 2B" : ", no windows of type 2B");
}

}  // namespace

void posting_facts(World& world) {
  Memory from(world.here, 3), to(world.there);
  say("limits", limit_text(world.here));
  uint32_t inline_bytes = 0;
  for (uint32_t tried = 64; tried <= 1 << 16; tried += 64) {
    try {
      Limits limits;
      limits.inline_bytes = tried;
      Side side(world.here, limits);
      inline_bytes = tried;
    } catch (const std::runtime_error&) {
      break;
    }
  }
  say("max_inline_data that ibv_create_qp takes (steps of 64)", std::to_string(inline_bytes));
  {
    Limits limits;
    limits.inline_bytes = inline_bytes;
    Pair pair(world, limits);
    ibv_sge sge = from.sge(0, inline_bytes);
    sge.lkey = 0;
    ibv_send_wr request = write_of(&sge, 1, to.address(), to.mr->rkey);
    request.send_flags |= IBV_SEND_INLINE;
    std::string status = std::strerror(pair.initiator.post(request));
    std::fill_n(from.bytes, inline_bytes, 9);
    status += ", " + pair.initiator.status();
    say("inline write, source changed after posting",
        status + (to.bytes[inline_bytes - 1] == 3 ? ", old bytes" : ", NEW bytes"));
    sge.length = inline_bytes + 1;
    say("inline write of one byte more", std::strerror(pair.initiator.post(request)));
  }
  {
    Limits limits;
    limits.sge = static_cast<uint32_t>(world.here.attributes.max_sge);
    Pair pair(world, limits);
    std::vector<ibv_sge> list;
    for (size_t i = 0; i < limits.sge + 1; ++i) list.push_back(from.sge(i * 8192, 4096));
    const int count = static_cast<int>(limits.sge);
    ibv_send_wr write = write_of(list.data(), count, to.address(), to.mr->rkey);
    pair.initiator.post(write);
    say("write that gathers max_sge ranges", pair.initiator.status());
    ibv_send_wr read = read_of(list.data(), count, to.address(), to.mr->rkey);
    pair.initiator.post(read);
    say("read that scatters into max_sge ranges", pair.initiator.status());
    write.num_sge = count + 1;
    say("one range more", std::strerror(pair.initiator.post(write)));
  }
  {
    Pair pair(world);
    ibv_sge sge = from.sge(0, 64);
    std::vector<ibv_send_wr> chain(200, write_of(&sge, 1, to.address(), to.mr->rkey));
    for (size_t i = 0; i + 1 < chain.size(); ++i) chain[i].next = &chain[i + 1];
    ibv_send_wr* bad = nullptr;
    const int error = ibv_post_send(pair.initiator.qp, chain.data(), &bad);
    size_t done = 0;
    while (pair.initiator.next(1000ms)) ++done;
    say("200 chained writes on a send queue of 64",
        std::string(std::strerror(error)) + ", bad_wr " +
            std::to_string(bad != nullptr ? bad - chain.data() : -1) + ", " + std::to_string(done) +
            " completions");
  }
  {
    Pair pair(world);
    ibv_sge sge = from.sge(0, 0);
    ibv_send_wr request = write_of(&sge, 1, 0, 0);
    sge.length = 0;
    pair.initiator.post(request);
    say("write of 0 bytes under key 0", pair.initiator.status());
  }
  {
    Side side(world.here, {});
    say("post_recv in INIT", std::strerror(side.post_receive(1)));
    side.to(IBV_QPS_RESET);
    say("post_recv in RESET", std::strerror(side.post_receive(1)));
  }
  say("on-demand paging", [&] {
    ibv_mr* mr =
        ibv_reg_mr(world.here.pd, from.bytes, 4096, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_ON_DEMAND);
    if (mr == nullptr) return std::string(std::strerror(errno));
    ibv_dereg_mr(mr);
    return std::string("success");
  }());
  say("registration with relaxed ordering", [&] {
    ibv_mr* mr = ibv_reg_mr(world.here.pd, from.bytes, 4096,
                            IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING);
    if (mr == nullptr) return std::string(std::strerror(errno));
    ibv_dereg_mr(mr);
    return std::string("success");
  }());
  say("ibv_reg_dmabuf_mr", [&] {
    ibv_mr* mr = ibv_reg_dmabuf_mr(world.here.pd, 0, 4096, 0, 0, IBV_ACCESS_LOCAL_WRITE);
    return mr == nullptr ? std::string(std::strerror(errno)) : std::string("success");
  }());
}

}  // namespace facts
