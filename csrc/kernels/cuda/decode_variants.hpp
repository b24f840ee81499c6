// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The decode kernels by cache dtype and head_dim; each is compiled in a file of its own.
#pragma once

#include "kernels/cuda/kernels.hpp"

namespace kvxfer::kernels::cuda {

template <class KV, int kDim>
void decode_with(const Decode& params, cudaStream_t stream);

template <class KV, int kDim>
int64_t decode_slots_with(const Decode& params);

}  // namespace kvxfer::kernels::cuda
