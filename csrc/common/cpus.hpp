// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// How many CPUs the calling thread may use, as of now: its affinity mask, not what the machine has.
#pragma once

namespace kvxfer {

int num_usable_cpus() noexcept;

}  // namespace kvxfer
