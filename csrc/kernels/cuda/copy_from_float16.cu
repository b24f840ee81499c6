// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Block copies from float16.
#include "kernels/cuda/copy_converted.cuh"

namespace kvxfer::kernels::cuda {

template void copy_converted_from<__half>(const Copy&, int64_t, cudaStream_t);

}  // namespace kvxfer::kernels::cuda
