// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A GPU's memory that NICs reach: how it is registered, and that nothing but them touches it. Here
// a CPU that does dies, whichever thread it is on.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "cuda_driver/memory.hpp"
#include "gpu_world.hpp"

using namespace kvxfer;
using Progress = Exposure::State;

namespace {

std::vector<std::byte> pattern(size_t n, int seed) {
  std::vector<std::byte> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = std::byte(static_cast<uint8_t>(i * 7 + i / 251 + seed));
  return out;
}

int64_t count(const char* name) { return fake_verbs_count(name); }

// Every byte of two GPUs' memory, forth and back, by spans of all sizes: those that host memory
// would take inline, and those that take several chains.
void moves_everything(GpuPair& w, const GpuMemory& from, const RegionPtr& source,
                      const GpuMemory& to, const RegionPtr& target, bool leased) {
  const auto there = w.remote(target->name);
  for (const size_t nbytes : {size_t{1}, size_t{64}, size_t{220}, size_t{4097}, from.nbytes}) {
    CAPTURE(nbytes);
    const LeasePtr lease = leased ? whole(*w.b, target) : nullptr;
    const auto bytes = pattern(nbytes, static_cast<int>(nbytes));
    from.put(0, bytes);
    to.fill(0);
    finish(w.move(Op::kWrite, source, there, 0, 0, static_cast<int64_t>(nbytes), lease));
    CHECK(to.get(0, nbytes) == bytes);
    if (nbytes < to.nbytes) CHECK(to.get(nbytes, 1)[0] == std::byte{0});
    from.fill(0);
    finish(w.move(Op::kRead, source, there, 0, 0, static_cast<int64_t>(nbytes), lease));
    CHECK(from.get(0, nbytes) == bytes);
    if (lease) {
      w.b->begin_revoke(lease);
      REQUIRE(lease->gate.wait_quiet(deadline_after(20)) == Woken::kNotified);
    }
  }
}

}  // namespace

TEST_CASE("gpu: this memory cannot be read by a CPU, so what passes here has not done it") {
  const GpuMemory memory(4096);
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  CHECK(::write(ends[1], memory.at(), 1) == -1);
  CHECK(errno == EFAULT);
  memory.fill(3);
  CHECK(memory.is(3));
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_CASE("gpu: it is registered by dma-buf, and nothing is left of it afterwards") {
  GpuPair w;
  w.a->allocate(4096, {.name = "before"});  // with the first region words are registered
  const GpuMemory memory(1 << 20);
  const int64_t locked = count("locked_bytes"), exported = fake_cuda_count("dmabufs");
  const size_t descriptors = num_descriptors();
  const RegionPtr region = on_gpu(*w.a, {memory.piece()});
  CHECK(region->device == 0);
  CHECK(exposure_of(region).state() == Progress::kDone);
  CHECK(says(region, "memory of cuda:0 by dma-buf"));
  CHECK(w.a->explain(*w.to_b).find("our region 'gpu': verbs has registered memory of cuda:0 by "
                                   "dma-buf") != std::string::npos);
  CHECK(w.a->explain(*w.to_b).find("write from a GPU's memory: verbs\n") != std::string::npos);
  CHECK(fake_cuda_count("dmabufs") == exported + 1);  // one for all rails
  CHECK(fake_cuda_count("ordered") == 1);
  CHECK(fake_cuda_count("contexts") == 0);
  CHECK(num_descriptors() == descriptors);
  CHECK(count("locked_bytes") > locked);
  w.a->deregister(region);
  CHECK(count("locked_bytes") == locked);
  CHECK(num_descriptors() == descriptors);
}

TEST_CASE("gpu: bytes go from one to another and back, and between them and host memory") {
  for (const bool leased : {false, true}) {
    CAPTURE(leased);
    GpuPair w;
    const GpuMemory from(3 << 20), to(3 << 20, 1);
    const RegionPtr source = on_gpu(*w.a, {from.piece()}),
                    target = on_gpu(*w.b, {to.piece()}, "kv");
    CHECK(w.remote("kv")->device == 1);
    const int64_t bound = count("binds");
    moves_everything(w, from, source, to, target, leased);
    const bool pushed = leased && std::getenv("KVXFER_TEST_VERBS_PUSH") != nullptr;
    CHECK((count("binds") > bound) == pushed);

    const RegionPtr host = w.a->allocate(1 << 16, {.name = "host"});
    std::memset(host->pieces[0].base, 0x5C, 1 << 16);
    const LeasePtr lease = leased ? whole(*w.b, target) : nullptr;
    finish(w.move(Op::kWrite, host, w.remote("kv"), 0, 100, 1 << 16, lease));
    CHECK(all_equal(to.get(100, 1 << 16).data(), 1 << 16, 0x5C));
    to.fill(0x11);
    finish(w.move(Op::kRead, host, w.remote("kv"), 0, 5, 1 << 16, lease));
    CHECK(all_equal(host->pieces[0].base, 1 << 16, 0x11));
    const RegionPtr plain = w.b->allocate(1 << 16, {.name = "plain"});
    from.fill(0x77);
    finish(w.move(Op::kWrite, source, w.remote("plain"), 9, 0, 1 << 16));
    CHECK(all_equal(plain->pieces[0].base, 1 << 16, 0x77));
  }
}

TEST_CASE("gpu: a region begins and ends within a page, and lies in several pieces") {
  GpuPair w;
  constexpr size_t kSize = 40000;
  const GpuMemory first(kSize), second(kSize), target_memory(2 * kSize);
  // Not at a page, not a whole number of them, and the last byte of its allocation.
  const RegionPtr source = on_gpu(*w.a, {{first.at(4099), 0, 5001}, second.piece(31)});
  const RegionPtr target = on_gpu(*w.b, {{target_memory.at(777), 0, kSize}}, "kv");
  CHECK(source->nbytes == 5001 + kSize - 31);
  CHECK(says(source, "by dma-buf"));
  const auto a = pattern(kSize, 1), b = pattern(kSize, 2);
  first.put(0, a);
  second.put(0, b);
  target_memory.fill(0xEE);
  const auto nbytes = static_cast<int64_t>(kSize);
  finish(w.move(Op::kWrite, source, w.remote("kv"), 0, 0, nbytes));
  std::vector<std::byte> expected(kSize);
  std::copy_n(a.begin() + 4099, 5001, expected.begin());
  std::copy_n(b.begin() + 31, kSize - 5001, expected.begin() + 5001);
  CHECK(target_memory.get(777, kSize) == expected);
  CHECK(target_memory.get(776, 1)[0] == std::byte{0xEE});
  CHECK(target_memory.get(777 + kSize, 1)[0] == std::byte{0xEE});
  first.fill(0);
  second.fill(0);
  finish(w.move(Op::kRead, source, w.remote("kv"), 0, 0, nbytes));
  CHECK(std::memcmp(first.get(4099, 5001).data(), expected.data(), 5001) == 0);
  CHECK(first.get(4098, 1)[0] == std::byte{0});
  CHECK(first.get(9100, 1)[0] == std::byte{0});
  CHECK(second.get(30, 1)[0] == std::byte{0});
  (void)target;
}

TEST_CASE("gpu: where no dma-buf is to be had it is registered by its address") {
  const CudaPlan cuda("dmabuf=0");
  const Plan plan("peermem=1");
  GpuPair w;
  const GpuMemory from(1 << 20), to(1 << 20);
  const RegionPtr source = on_gpu(*w.a, {from.piece()}), target = on_gpu(*w.b, {to.piece()}, "kv");
  CHECK(says(source,
             "by its address (peermem), not by dma-buf: cuMemGetHandleForAddressRange "
             "failed: CUDA_ERROR_NOT_SUPPORTED (801)"));
  for (const bool leased : {false, true}) moves_everything(w, from, source, to, target, leased);
}

TEST_CASE("gpu: where the device takes no dma-buf it is registered by its address") {
  const Plan plan("dmabuf=0 peermem=1");
  GpuPair w;
  const GpuMemory from(1 << 16), to(1 << 16);
  const size_t descriptors = num_descriptors();
  const RegionPtr source = on_gpu(*w.a, {from.piece()}), target = on_gpu(*w.b, {to.piece()}, "kv");
  CHECK(num_descriptors() == descriptors);
  CHECK(says(source, "by its address (peermem), not by dma-buf: ibv_reg_dmabuf_mr("));
  CHECK(says(source, "Operation not supported"));
  moves_everything(w, from, source, to, target, false);
}

TEST_CASE("gpu: each device takes the way that it has") {
  const Plan plan("devices=2 fail=reg_dmabuf_mr@2:EINVAL peermem=1");
  EngineOptions options = gpu_options("a", {"verbs"});
  options.transport.verbs_push = false;  // one call for each device
  const auto a = Engine::create(options);
  const GpuMemory memory(1 << 16);
  const RegionPtr region = on_gpu(*a, {memory.piece()});
  CHECK(exposure_of(region).nbytes == 2 * region->nbytes);
  CHECK(says(region,
             "fake0:1 by dma-buf; fake1:1 by its address (peermem), not by dma-buf: "
             "ibv_reg_dmabuf_mr("));
  CHECK(says(region, "; prefers no NIC: nothing is known of how near they are"));
  a->close();
}

TEST_CASE("gpu: where no windows are bound to a dma-buf, writes are pulled") {
  const Plan plan("dmabuf_windows=0");
  GpuPair w;
  const GpuMemory from(1 << 20), to(1 << 20);
  const RegionPtr source = on_gpu(*w.a, {from.piece()}), target = on_gpu(*w.b, {to.piece()}, "kv");
  CHECK(says(target, "by dma-buf"));
  moves_everything(w, from, source, to, target, true);
  if (std::getenv("KVXFER_TEST_VERBS_PUSH") != nullptr)
    CHECK(w.a->explain(*w.to_b).find("binds no windows to a GPU's memory by dma-buf") !=
          std::string::npos);
}

TEST_CASE("gpu: memory mapped by cuMemMap has no context of its own, and none is made for it") {
  GpuPair w;
  const GpuMemory from(1 << 16, 0, "mapped"), to(1 << 16, 0, "mapped");
  const RegionPtr source = on_gpu(*w.a, {from.piece()}), target = on_gpu(*w.b, {to.piece()}, "kv");
  CHECK(says(source, "by dma-buf"));
  CHECK(fake_cuda_count("contexts") == 0);
  CHECK(fake_cuda_count("retained") == 0);
  CHECK(fake_cuda_count("ordered") == 0);
  moves_everything(w, from, source, to, target, true);
}

TEST_CASE("gpu: what the driver does not hold back is said") {
  const CudaPlan cuda("sync_memops=0");
  GpuPair w;
  const GpuMemory memory(1 << 16);
  CHECK(says(on_gpu(*w.a, {memory.piece()}),
             "(synchronous copies by CUDA may end after their call: "
             "cuPointerSetAttribute(SYNC_MEMOPS) failed: CUDA_ERROR_NOT_SUPPORTED (801))"));
}

TEST_CASE("gpu: a large region is registered in parts, and before register() returns") {
  EngineOptions options = gpu_options("a", {"verbs"});
  options.transport.verbs_background_nbytes = 0;
  options.transport.verbs_part_nbytes = 100'000;  // not a page's multiple
  const auto a = Engine::create(options);
  const GpuMemory memory(350'000);
  const int64_t exported = fake_cuda_count("dmabufs");
  const RegionPtr region = on_gpu(*a, {memory.piece()});
  CHECK(exposure_of(region).state() == Progress::kDone);
  CHECK(fake_cuda_count("dmabufs") == exported + 4);
  CHECK(exposure_of(region).nbytes_done.load() == exposure_of(region).nbytes);
  a->close();
}

TEST_CASE("gpu: two regions of one range share what was registered") {
  GpuPair w;
  const GpuMemory memory(1 << 16);
  const int64_t exported = fake_cuda_count("dmabufs");
  const RegionPtr first = on_gpu(*w.a, {memory.piece()}, "first");
  const RegionPtr second = on_gpu(*w.a, {memory.piece()}, "second");
  CHECK(fake_cuda_count("dmabufs") == exported + 1);
  CHECK(says(second, "by dma-buf"));
  w.a->deregister(first);
  const RegionPtr host = w.b->allocate(1 << 16, {.name = "host"});
  memory.fill(0x29);
  finish(w.move(Op::kWrite, second, w.remote("host"), 0, 0, 1 << 16));
  CHECK(all_equal(host->pieces[0].base, 1 << 16, 0x29));
}

TEST_CASE("gpu: modules are found in sysfs, and a GPU by its PCI address") {
  const auto folder = std::filesystem::temp_directory_path() / cat("kvxfer-gpu-", ::getpid());
  std::filesystem::create_directories(folder);
  CHECK(cuda_driver::peermem_module(folder).empty());
  std::filesystem::create_directories(folder / "nvidia_peermem");
  CHECK(cuda_driver::peermem_module(folder) == "nvidia_peermem");
  std::filesystem::remove_all(folder);
  const GpuMemory memory(4096);
  CHECK(cuda_driver::look_at(memory.at(), 4096, "it").device == 0);
  CHECK(cuda_driver::bus_id(0) == "0000:3b:00.0");  // as sysfs writes it
}
