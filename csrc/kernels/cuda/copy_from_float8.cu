// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Block copies from float8.
#include "kernels/cuda/copy_converted.cuh"

namespace kvxfer::kernels::cuda {

template void copy_converted_from<E4m3>(const Copy&, int64_t, cudaStream_t);

}  // namespace kvxfer::kernels::cuda
