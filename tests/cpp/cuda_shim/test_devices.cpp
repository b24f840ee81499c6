// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <string>

#include "common/error.hpp"
#include "kernels/cuda/kernels.hpp"

namespace {

// What is thrown, or "".
std::string reach(int can, cudaError_t enabled) {
  shim_peers = {};
  shim_peers.can = can;
  shim_peers.enabled = enabled;
  try {
    kvxfer::kernels::cuda::reach_peer(0, 1);
  } catch (const kvxfer::Error& error) {
    CHECK(error.code == kvxfer::Code::kUnavailable);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("devices: another GPU is reached, also when it was before; else the error says which") {
  CHECK(reach(1, cudaSuccess) == "");
  CHECK(shim_peers.num_enabled == 1);
  CHECK(reach(1, cudaErrorPeerAccessAlreadyEnabled) == "");
  CHECK(shim_peers.num_forgotten == 1);  // nobody else is told of it
  CHECK(reach(0, cudaSuccess).find("GPU 0 cannot reach the memory of GPU 1") != std::string::npos);
  CHECK(shim_peers.num_enabled == 0);
  CHECK(reach(1, cudaErrorInvalidValue).find("an error") != std::string::npos);
}
