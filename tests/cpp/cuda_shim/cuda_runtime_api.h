// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The runtime's types and calls that the kernels' launchers use, on the CPU. None of them waits for
// a stream or a device, allocates or copies: sources that did so would not compile here.
#pragma once

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorPeerAccessAlreadyEnabled = 704
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

// Of the last launch.
inline cudaStream_t shim_stream = nullptr;
// A stream that is nobody's default.
inline cudaStream_t shim_a_stream() {
  static char place;
  return reinterpret_cast<cudaStream_t>(&place);
}

// What the calls about a second device answer; tests set it.
struct ShimPeers {
  int can = 1;
  cudaError_t enabled = cudaSuccess;
  int num_enabled = 0, num_forgotten = 0;
};
inline ShimPeers shim_peers;
inline cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  return *can = shim_peers.can, cudaSuccess;
}
inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return ++shim_peers.num_enabled, shim_peers.enabled;
}

inline cudaError_t cudaGetLastError() { return ++shim_peers.num_forgotten, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 2, cudaSuccess;  // so few that persistent kernels must loop
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long* id) {
  return *status = cudaStreamCaptureStatusNone, *id = 0, cudaSuccess;
}
