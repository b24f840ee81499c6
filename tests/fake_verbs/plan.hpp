// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which NICs there are and what goes wrong with them, from the environment variable
// KVXFER_FAKE_VERBS: "devices=2 gids=ll2,v4r2 seed=7 delay=0.2:3ms drop=0.01".
#pragma once

#include <infiniband/verbs.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fake_verbs {

enum class GidKind { kLinkLocalV1, kLinkLocalV2, kIpv4V1, kIpv4V2, kIpv6V1, kIpv6V2, kEmpty };

struct Chance {
  double probability = 0;
  int64_t up_to_ns = 0;
};

struct Plan {
  std::string text;

  // -- What is there. A change of these counts for devices that are made later; which are listed,
  // at once.
  int devices = 1;          // named fake0, fake1, ...
  int ports = 1;            // of each; each port is a rail of its own, with a subnet of its own
  int host = 1;             // 1 to 254: the last part of its addresses
  bool infiniband = false;  // link=ib: LIDs, and GIDs are optional; link=eth: RoCE
  // gids=: in table order, of ll1 ll2 v4r1 v4r2 v6r1 v6r2 (kind, RoCE version) and none (a hole)
  std::vector<GidKind> gids = {GidKind::kLinkLocalV1, GidKind::kLinkLocalV2, GidKind::kIpv4V1,
                               GidKind::kIpv4V2};
  int mtu = 4096;
  std::string sysfs;      // sysfs=DIR: ibdev_path is DIR/fakeN, where a test puts or links "device"
  std::vector<int> down;  // down=0,1: rails that have no link at the start

  // -- Limits, as ibv_query_device tells them.
  int max_qp = 4096;
  int max_qp_wr = 16384;
  int max_sge = 30;
  int max_inline = 220;  // no query tells it: ibv_create_qp refuses more
  int max_cqe = 1 << 20;
  int max_mr = 1 << 16;
  uint64_t max_mr_size = uint64_t{1} << 40;
  int max_rd_atomic = 16;
  bool soft_roce = false;      // soft_roce=1: its vendor, fence, and errors of a port that is down
                               // and of a CQ that overruns
  int windows = 3;             // windows=0: none; 1: type 1; 2: type 2B; 3: both
  uint64_t memlock = 0;        // bytes that may be registered in this process; 0: any number
  uint64_t hold_reg = 0;       // hold_reg=N: from the Nth on, registrations wait for another plan
  bool dmabuf = true;          // dmabuf=0: ibv_reg_dmabuf_mr fails with EOPNOTSUPP
  bool dmabuf_windows = true;  // dmabuf_windows=0: so it does if windows are to be bound there
  bool peermem = false;        // peermem=1: ibv_reg_mr takes addresses of tests/fake_cuda's GPUs
  bool by_hand = false;  // by_hand=1, from the start on: no thread plays the hardware, and no other
                         // process is reached, and there are no GPUs; ibv_poll_cq first does all
                         // that can be done
  double lie = 1;        // what is really to be had of max_qp_wr, max_sge, max_inline, max_cqe

  // -- The network. Probabilities are per packet. RC hides all of it but time, and retries run out.
  uint64_t seed = 0;
  Chance delay;         // the order within one pair of QPs stays
  Chance duplicate;     // a second copy, up to this much later, behind younger packets too
  double drop = 0;      // any packet
  double lose_ack = 0;  // acknowledgements, read and atomic responses: what was placed stays

  // -- Work requests and completions.
  double post = 0;        // ibv_post_send, ibv_post_recv: a request of the chain meets ENOMEM
  double bind = 0;        // BIND_MW ends with IBV_WC_MW_BIND_ERR
  double invalidate = 0;  // LOCAL_INV ends with IBV_WC_LOC_QP_OP_ERR
  double short_poll = 0;  // ibv_poll_cq gives fewer than it could, never none
  bool flush = true;      // flush=0: what a QP in ERR still has gets no completion, until a plan
                          // without it comes
  Chance hold_cqe;        // a completion is seen late, and those behind it with it
  struct Error {
    double probability = 0;
    std::optional<ibv_wc_status> status;  // any: each of them in turn
  };
  Error error;       // error=P:STATUS, before or after it has landed
  Error read_error;  // read_error=P:STATUS, of what reads alone

  // -- Once, at the Nth time, counted from 1.
  struct Fail {
    uint64_t at = 0;
    int err = 0;
  };
  std::map<std::string, Fail, std::less<>> fail;  // fail=reg_mr@2:ENOMEM,create_qp@1:EINVAL
  uint64_t remove = 0;     // remove=N: the device goes away during this poll of one of its CQs
  uint64_t qp_fatal = 0;   // qp_fatal=N: the QP of the Nth posted send request breaks
  uint64_t port_down = 0;  // port_down=N:T: at the Nth packet that is sent its port loses the
  int64_t port_up_ns = 0;  // link, and gets it back after T
};

// Throws std::invalid_argument naming the word that is wrong. `devices`: where it is not said.
Plan parse_plan(std::string_view text, int devices = 1);

}  // namespace fake_verbs
