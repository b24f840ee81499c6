// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A GPU's memory where it cannot go: said before anything is sent, with what to do.
#include "cuda_driver/memory.hpp"
#include "gpu_world.hpp"

using namespace kvxfer;

namespace {

// What it says; empty: it went well.
template <typename Act>
std::string said(Act&& act, Code code) {
  try {
    act();
  } catch (const Error& error) {
    CHECK(error.code == code);
    return error.what();
  }
  return {};
}

bool has(const std::string& text, const std::string& what) {
  INFO(text);
  return text.find(what) != std::string::npos;
}

// Nothing of the request has left.
void is_refused(const GpuPair& w, const TransferPtr& t, const std::string& what) {
  finish(t, State::kFailed);
  CHECK(has(t->message, what));
  CHECK(has(t->message, "a GPU's memory goes over verbs alone"));
  CHECK(t->agreed);
  for (const auto& [name, totals] : w.a->stats().totals) CHECK(totals.requests == 0);
}

}  // namespace

TEST_CASE("gpu: where neither way works the error has both reasons, and nothing is left") {
  const CudaPlan cuda("dmabuf=0 rdma=0");
  const auto a = Engine::create(gpu_options("a", {"verbs"}));
  a->allocate(4096, {.name = "before"});
  const GpuMemory legacy(1 << 16), mapped(1 << 16, 1, "mapped");
  const int64_t locked = fake_verbs_count("locked_bytes");
  const size_t descriptors = num_descriptors();
  std::string text = said([&] { on_gpu(*a, {legacy.piece()}); }, Code::kRegistration);
  CHECK(has(text, "region 'gpu' is memory of cuda:0"));
  CHECK(has(text, "By dma-buf: cuMemGetHandleForAddressRange failed: CUDA_ERROR_NOT_SUPPORTED"));
  CHECK(has(text, "open kernel modules"));
  CHECK(has(text,
            "By its address: ibv_reg_mr failed: Bad address; no peermem module is loaded "
            "(`modprobe nvidia_peermem`)"));
  CHECK(has(text, "gpuDirectRDMACapable"));
  CHECK(has(text, "copy it to host memory"));
  CHECK_FALSE(has(text, "expandable_segments"));
  text = said([&] { on_gpu(*a, {mapped.piece()}); }, Code::kRegistration);
  CHECK(has(text, "memory of cuda:1"));
  CHECK(has(text, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"));
  {
    const Plan plan("dmabuf=0");
    fake_cuda_plan("");
    text = said([&] { on_gpu(*a, {legacy.piece()}); }, Code::kRegistration);
    CHECK(has(text, "By dma-buf: ibv_reg_dmabuf_mr(offset 0"));
    CHECK(has(text, "Operation not supported"));
  }
  CHECK(fake_verbs_count("locked_bytes") == locked);
  CHECK(num_descriptors() == descriptors);
  // It has taken no name, and the engine goes on.
  on_gpu(*a, {legacy.piece()});
  a->close();
}

TEST_CASE("gpu: a limit on locked memory is explained here too") {
  const auto a = Engine::create(gpu_options("a", {"verbs"}));
  const GpuMemory memory(1 << 20);
  const Plan plan("memlock=65536");
  CHECK(has(said([&] { on_gpu(*a, {memory.piece()}); }, Code::kRegistration),
            "the locked-memory limit (ulimit -l)"));
  a->close();
}

TEST_CASE("gpu: memory that is not a GPU's, or not all of it, is refused") {
  const auto a = Engine::create(gpu_options("a", {"verbs"}));
  const GpuMemory one(4096), other(4096, 1), managed(4096, 0, "managed"), host(4096, 0, "host");
  std::vector<std::byte> ordinary(4096);
  const auto refused = [&](std::vector<Piece> pieces, const std::string& what) {
    CHECK(has(said([&] { on_gpu(*a, std::move(pieces)); }, Code::kInvalidArgument), what));
  };
  refused({managed.piece()}, "the buffer is managed memory, whose pages move");
  refused({host.piece()}, "is pinned host memory: pass it as a host buffer");
  refused({{ordinary.data(), 0, 4096}}, "is not memory that CUDA knows in this process");
  refused({{one.at(100), 0, 4096}}, "goes beyond its allocation of 4096 bytes");
  refused({one.piece(), other.piece()},
          "buffer 0 is memory of cuda:0, and buffer 1 of cuda:1; a region lies in one GPU");
  refused({one.piece(), {one.at(8), 0, 8}}, "buffers 0 and 1 share memory");
  CHECK(has(said([&] { on_gpu(*a, {one.piece()}, "kv", false, false); }, Code::kInvalidArgument),
            "share=\"never\""));
  a->close();
}

TEST_CASE("gpu: an engine without verbs registers none") {
  const GpuMemory memory(4096);
  for (const char* name : {"tcp", "shm"}) {
    const auto a = Engine::create(gpu_options("a", {name}));
    const std::string text = said([&] { on_gpu(*a, {memory.piece()}); }, Code::kRegistration);
    CHECK(has(text, "region 'gpu' is memory of cuda:0, which no transport of this engine reaches"));
    CHECK(has(text, "verbs, which could, is left out by transports="));
    a->close();
  }
}

TEST_CASE("gpu: to and from a peer that verbs does not join nothing is sent") {
  for (const std::vector<std::string>& theirs :
       {std::vector<std::string>{"tcp"}, std::vector<std::string>{"shm", "tcp"},
        std::vector<std::string>{}}) {  // all: on one host shm is preferred, and verbs not needed
    GpuPair w({}, theirs);
    const GpuMemory memory(4096);
    const RegionPtr region = on_gpu(*w.a, {memory.piece()});
    const RegionPtr plain = w.b->allocate(4096, {.name = "plain"});
    const auto there = w.remote("plain");
    const std::string what = "tcp: it copies by the CPU, and our region 'gpu' is memory of cuda:0";
    is_refused(w, w.move(Op::kWrite, region, there, 0, 0, 64), what);
    is_refused(w, w.move(Op::kRead, region, there, 0, 0, 64), what);
    CHECK(has(w.a->explain(*w.to_b), "write from a GPU's memory: nothing (not "));
    // A notification has no memory.
    SubmitOptions options;
    options.has_notify = true;
    options.deadline_ns = deadline_after(20);
    finish(w.a->notify(w.to_b, options));
  }
}

TEST_CASE("gpu: a peer's is refused by who would write or read it, and by its owner") {
  GpuPair w({"tcp"}, {});
  const GpuMemory memory(4096);
  memory.fill(0x42);
  const RegionPtr target = on_gpu(*w.b, {memory.piece()}, "kv");
  const RegionPtr host = w.a->allocate(4096, {.name = "host"});
  const auto there = w.remote("kv");
  CHECK(there->device == 0);
  const std::string what =
      "tcp: it copies by the CPU, and the peer's region 'kv' is memory of cuda:0";
  is_refused(w, w.move(Op::kWrite, host, there, 0, 0, 64), what);
  is_refused(w, w.move(Op::kRead, host, there, 0, 0, 64), what);
  // As from one that does not know what a GPU is.
  there->device = kHostMemory;
  for (const Op op : {Op::kWrite, Op::kRead}) {
    const TransferPtr t = w.move(op, host, there, 0, 0, 64);
    finish(t, State::kFailed);
    CHECK(has(t->message, "region 'kv' is memory of cuda:0, and tcp copies by the CPU"));
  }
  CHECK(memory.is(0x42));
  CHECK(w.b->stats().refused.at("remote_access") == 2);
}

TEST_CASE("gpu: what verbs would carry in messages is refused for a GPU's memory alone") {
  GpuPair w({"verbs"}, {});
  const GpuMemory memory(1 << 16);
  memory.fill(0x42);
  const RegionPtr region = on_gpu(*w.a, {memory.piece()});
  const RegionPtr host = w.a->allocate(1 << 16, {.name = "host"});
  w.b->allocate(4096, {.name = "before"});
  {
    const Plan plan("fail=reg_mr@1:ENOMEM");
    w.b->allocate(1 << 16, {.name = "unregistered"});
  }
  const auto there = w.remote("unregistered");
  for (const Op op : {Op::kWrite, Op::kRead}) {
    finish(w.move(op, host, there, 0, 0, 1 << 16));  // in messages
    const TransferPtr t = w.move(op, region, there, 0, 0, 1 << 16);
    finish(t, State::kFailed);
    CHECK(has(t->message, "the memory of a GPU (the initiator's) cannot go in messages"));
    CHECK(has(t->message, "region 'unregistered'"));
  }
  CHECK(memory.is(0x42));
  // And the owner's, from memory that no NIC reads for the peer.
  const GpuMemory theirs(1 << 16);
  on_gpu(*w.b, {theirs.piece()}, "kv");
  const RegionPtr secret = w.a->allocate(1 << 16, {.name = "secret", .shareable = false});
  const TransferPtr t = w.move(Op::kWrite, secret, w.remote("kv"), 0, 0, 1 << 16);
  finish(t, State::kFailed);
  CHECK(has(t->message, "the memory of a GPU (ours) cannot go in messages"));
  finish(w.move(Op::kRead, secret, w.remote("kv"), 0, 0, 1 << 16));  // our own NIC stores it
  CHECK(theirs.is(0));
}
