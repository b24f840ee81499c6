// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Which GPUs there are, and which reach which.
#include <cuda_runtime_api.h>

#include "common/error.hpp"
#include "kernels/cuda/kernels.hpp"

namespace kvxfer::kernels::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error to keep
    return 0;
  }
  return count;
}

void reach_peer(int device, int peer) {
  int can = 0;
  cudaError_t error = cudaDeviceCanAccessPeer(&can, device, peer);
  if (error == cudaSuccess && can == 0)
    fail(Code::kUnavailable, "GPU ", device, " cannot reach the memory of GPU ", peer,
         " (neither NVLink nor PCIe peer access joins them): copy into pinned host memory, and"
         " from there");
  if (error == cudaSuccess) error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it would be reported again by somebody else's call
  if (error != cudaErrorPeerAccessAlreadyEnabled)  // by torch, as a rule
    fail(Code::kUnavailable, "GPU ", device, " could not be given access to the memory of GPU ",
         peer, ": ", cudaGetErrorString(error));
}

}  // namespace kvxfer::kernels::cuda
