// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Memory of software GPUs, and engines that register it.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine_pair.hpp"
#include "eventually.hpp"
#include "fake_cuda.h"
#include "verbs_plan.hpp"

namespace kvxfer {

// Harmless again before the engines close.
struct CudaPlan {
  explicit CudaPlan(const std::string& text) { REQUIRE(fake_cuda_plan(text.c_str()) == 0); }
  ~CudaPlan() { fake_cuda_plan(""); }
};

struct GpuMemory {
  uint64_t address;
  size_t nbytes;
  explicit GpuMemory(size_t n, int device = 0, const char* kind = "legacy")
      : address(fake_cuda_alloc(device, n, kind)), nbytes(n) {
    REQUIRE(address != 0);
  }
  ~GpuMemory() { fake_cuda_free(address); }
  GpuMemory(const GpuMemory&) = delete;
  GpuMemory& operator=(const GpuMemory&) = delete;

  std::byte* at(size_t offset = 0) const {
    return reinterpret_cast<std::byte*>(address + offset);  // not to be touched
  }
  void put(size_t offset, const std::vector<std::byte>& bytes) const {
    REQUIRE(fake_cuda_poke(address + offset, bytes.data(), bytes.size()) == 0);
  }
  void fill(int value) const { put(0, std::vector<std::byte>(nbytes, std::byte(value))); }
  std::vector<std::byte> get(size_t offset, size_t n) const {
    std::vector<std::byte> out(n);
    REQUIRE(fake_cuda_peek(address + offset, out.data(), n) == 0);
    return out;
  }
  bool is(int value) const { return all_equal(get(0, nbytes).data(), nbytes, value); }
  Piece piece(size_t offset = 0) const { return {at(offset), 0, nbytes - offset}; }
};

inline RegionPtr on_gpu(Engine& engine, std::vector<Piece> pieces, std::string name = "gpu",
                        bool require_lease = false, bool shareable = true) {
  return engine.register_pieces(std::move(pieces), true, nullptr,
                                {std::move(name), require_lease, shareable, true});
}

inline EngineOptions gpu_options(const std::string& name, std::vector<std::string> transports) {
  EngineOptions options;
  options.name = name;
  options.secret = Bytes(32, std::byte{1});
  options.transports = std::move(transports);
  options.transport = impatient();
  options.transport.verbs_push = std::getenv("KVXFER_TEST_VERBS_PUSH") != nullptr;
  return options;
}

// Two engines over verbs, or what each of them is told.
struct GpuPair {
  std::shared_ptr<Engine> a, b;
  PeerPtr to_b;

  explicit GpuPair(std::vector<std::string> of_a = {"verbs"},
                   std::vector<std::string> of_b = {"verbs"})
      : a(Engine::create(gpu_options("a", std::move(of_a)))),
        b(Engine::create(gpu_options("b", std::move(of_b)))) {
    to_b = a->connect(b->address(), 10);
  }
  ~GpuPair() {
    a->close();
    b->close();
    check_ended_in_order();
  }
  RemoteRegionPtr remote(const std::string& name) {
    RemoteRegionPtr out;
    REQUIRE(eventually_within(20, [&] {
      const auto regions = a->regions_of(*to_b);
      if (const auto it = regions.find(name); it != regions.end()) out = it->second;
      return out != nullptr;
    }));
    return out;
  }
  // Under a lease where `lease` is one: then it is pushed, if this run pushes.
  TransferPtr move(Op op, const RegionPtr& local, const RemoteRegionPtr& there, int64_t from,
                   int64_t to, int64_t nbytes, const LeasePtr& lease = nullptr) {
    const Column l{&from, 1, true}, r{&to, 1, true}, n{&nbytes, 1, true};
    SubmitOptions options = lease ? under(lease) : SubmitOptions{};
    options.deadline_ns = deadline_after(30);
    return a->submit(op, local, there, SpanArguments{l, r, n, {}, false}, options);
  }
};

inline LeasePtr whole(Engine& engine, const RegionPtr& region) {
  const int64_t at = 0, nbytes = static_cast<int64_t>(region->nbytes);
  return engine.grant(region, {&at, 1, true}, {&nbytes, 1, true}, 60, {}, 0);
}

inline size_t num_descriptors() {
  size_t out = 0;
  for ([[maybe_unused]] const auto& each : std::filesystem::directory_iterator("/proc/self/fd"))
    ++out;
  return out;
}

inline const Exposure& exposure_of(const RegionPtr& region) { return *region->exposures.at(0); }
inline bool says(const RegionPtr& region, const std::string& what) {
  return exposure_of(region).text().find(what) != std::string::npos;
}

}  // namespace kvxfer
