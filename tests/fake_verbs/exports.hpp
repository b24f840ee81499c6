// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How the entry points are exported and how they fail.
#pragma once

#include <infiniband/verbs.h>

#include <cerrno>

// The header has wrappers of these names around the exported functions.
#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova

#define FAKE_VERBS_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake_verbs {

// Verbs that return a pointer leave the reason in errno; those that return an int return it, and
// most leave it in errno too.
template <typename T>
T* fail_pointer(int err) {
  errno = err;
  return nullptr;
}
inline int fail_int(int err) {
  if (err != 0) errno = err;
  return err;
}

// A send flag of our own.
inline constexpr unsigned kBindOfType1 = 1u << 30;

// The functions of the context's table (datapath.cpp).
int post_send(ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad_wr);
int post_recv(ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr** bad_wr);
int poll_cq(ibv_cq* cq, int num_entries, ibv_wc* wc);
int req_notify_cq(ibv_cq* cq, int solicited_only);
// (memory.cpp)
ibv_mw* alloc_mw(ibv_pd* pd, ibv_mw_type type);
int bind_mw(ibv_qp* qp, ibv_mw* mw, ibv_mw_bind* bind);
int dealloc_mw(ibv_mw* mw);

}  // namespace fake_verbs
