// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// paged_decode of a float8 cache, head_dim 128.
#include "kernels/cuda/decode.cuh"

namespace kvxfer::kernels::cuda {

template void decode_with<E4m3, 128>(const Decode&, cudaStream_t);
template int64_t decode_slots_with<E4m3, 128>(const Decode&);

}  // namespace kvxfer::kernels::cuda
