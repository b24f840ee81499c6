// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Persistent threads for the CPU kernels. Idle threads sleep on a condition variable: they never
// spin.
#pragma once

#include <cstdint>
#include <functional>

namespace kvxfer::kernels::cpu {

// Threads that a call may use, the caller's own included. Any thread may call; takes effect with
// the next call.
void set_num_threads(int num_threads);
int get_num_threads();

// Runs body(i, scratch) for every i in [0, count), and returns when all are done. `scratch` is
// memory of the running thread, of at least scratch_nbytes, aligned to 64 and kept between calls.
// The order of the calls is not defined, so a body may depend on i alone. The first exception
// thrown is rethrown here. A caller who finds the pool at work for another one does the work alone:
// two servers' threads never wait for each other.
void parallel_for(int64_t count, int64_t scratch_nbytes, bool worth_waking,
                  const std::function<void(int64_t, void*)>& body);

// Memory of the calling thread, as above, but distinct from it: for results that outlive one body.
void* caller_buffer(int64_t nbytes);

}  // namespace kvxfer::kernels::cpu
