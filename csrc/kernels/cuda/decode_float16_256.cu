// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// paged_decode of a float16 cache, head_dim 256.
#include "kernels/cuda/decode.cuh"

namespace kvxfer::kernels::cuda {

template void decode_with<__half, 256>(const Decode&, cudaStream_t);
template int64_t decode_slots_with<__half, 256>(const Decode&);

}  // namespace kvxfer::kernels::cuda
