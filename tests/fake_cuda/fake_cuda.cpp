// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Names, numbers and what is refused when follow CUDA's cuda.h; nothing else of CUDA is there.
#include "fake_cuda.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "fake_cuda_dmabuf.h"

#define FAKE_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kNotSupported = 801,
};
// Handles of devices are not their ordinals here, so that whoever mixes them up is found out.
constexpr int kFirstDevice = 100;

struct Allocation {
  int device = 0, fd = -1;
  size_t nbytes = 0, mapped = 0;
  std::string kind;
  void* behind = nullptr;  // a mapping that may be touched
  int ordered = 0;
};

struct World {
  int devices = 2, init = kSuccess, ordering = 100;
  bool dmabuf = true, rdma = true, sync_memops = true, initialised = false;
  std::string bus = "0000:3B:00.0";
  std::mutex mutex;
  std::map<uint64_t, Allocation> allocations;  // by address
  std::vector<int> retained = std::vector<int>(64);
  int64_t dmabufs = 0;

  World() {
    const char* plan = std::getenv("KVXFER_FAKE_CUDA");
    if (plan != nullptr && !read(plan)) std::exit(2);
  }

  bool read(const std::string& plan) {
    std::istringstream words(plan);
    for (std::string word; words >> word;) {
      const size_t at = std::min(word.find('='), word.size());
      const std::string key = word.substr(0, at);
      const std::string value = at < word.size() ? word.substr(at + 1) : "";
      if (key == "devices")
        devices = std::clamp(std::atoi(value.c_str()), 0, 64);
      else if (key == "init")
        init = std::atoi(value.c_str());
      else if (key == "ordering")
        ordering = std::atoi(value.c_str());
      else if (key == "dmabuf")
        dmabuf = value != "0";
      else if (key == "rdma")
        rdma = value != "0";
      else if (key == "sync_memops")
        sync_memops = value != "0";
      else if (key == "bus")
        bus = value;
      else {
        std::fprintf(stderr, "KVXFER_FAKE_CUDA: '%s' is not understood\n", word.c_str());
        return false;
      }
    }
    return true;
  }

  Allocation* find(uint64_t address, uint64_t& base) {
    auto it = allocations.upper_bound(address);
    if (it == allocations.begin()) return nullptr;
    --it;
    if (address - it->first >= it->second.nbytes) return nullptr;
    base = it->first;
    return &it->second;
  }
};

World& world() {
  static World once;
  return once;
}

// A context is told apart by its address alone.
char contexts[64];
thread_local std::vector<void*> current;

size_t page() { return static_cast<size_t>(::sysconf(_SC_PAGESIZE)); }
bool is_device(int device) {
  return device >= kFirstDevice && device < kFirstDevice + world().devices;
}
bool is_gpus(const Allocation& a) { return a.kind == "legacy" || a.kind == "mapped"; }

// Where a GPU's bytes are for whoever may touch them.
std::byte* behind(uint64_t address, size_t nbytes) {
  uint64_t base = 0;
  Allocation* const found = world().find(address, base);
  if (found == nullptr || nbytes > found->nbytes - (address - base)) return nullptr;
  return static_cast<std::byte*>(found->behind) + (address - base);
}

int attribute(int which, void* value, uint64_t address) {
  World& w = world();
  uint64_t base = 0;
  Allocation* const a = w.find(address, base);
  switch (which) {
    case 1:  // CONTEXT: what is mapped by cuMemMap has none
      *static_cast<void**>(value) = a && a->kind == "legacy" ? &contexts[a->device] : nullptr;
      break;
    case 2:  // MEMORY_TYPE
      *static_cast<unsigned*>(value) = a == nullptr ? 0 : a->kind == "host" ? 1 : 2;
      break;
    case 8:  // IS_MANAGED
      *static_cast<int*>(value) = a != nullptr && a->kind == "managed";
      break;
    case 9:  // DEVICE_ORDINAL
      *static_cast<int*>(value) = a != nullptr ? a->device : -2;
      break;
    case 10:  // IS_LEGACY_CUDA_IPC_CAPABLE
      *static_cast<int*>(value) = a != nullptr && a->kind == "legacy";
      break;
    case 11:  // RANGE_START_ADDR
      *static_cast<unsigned long long*>(value) = base;
      break;
    case 12:  // RANGE_SIZE
      *static_cast<size_t*>(value) = a != nullptr ? a->nbytes : 0;
      break;
    case 15:  // IS_GPU_DIRECT_RDMA_CAPABLE
      *static_cast<int*>(value) = a != nullptr && w.rdma;
      break;
    default:
      return kInvalidValue;
  }
  return kSuccess;
}

}  // namespace

FAKE_CUDA_EXPORT int fake_cuda_plan(const char* plan) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  w.devices = 2, w.init = kSuccess, w.ordering = 100, w.dmabuf = w.rdma = w.sync_memops = true;
  w.bus = "0000:3B:00.0";
  return w.read(plan) ? 0 : -1;
}

FAKE_CUDA_EXPORT uint64_t fake_cuda_alloc(int device, size_t nbytes, const char* kind) {
  World& w = world();
  Allocation a;
  a.device = device, a.nbytes = nbytes, a.kind = kind;
  // A real one has pages of 2 MiB behind it, so the last of the host's pages is all of its own.
  a.mapped = (nbytes + page() - 1) / page() * page();
  a.fd = ::memfd_create(FAKE_CUDA_FILE, MFD_CLOEXEC);
  if (a.fd < 0 || ::ftruncate(a.fd, static_cast<off_t>(a.mapped)) != 0) return 0;
  a.behind = ::mmap(nullptr, a.mapped, PROT_READ | PROT_WRITE, MAP_SHARED, a.fd, 0);
  const int rights = a.kind == "legacy" || a.kind == "mapped" ? PROT_NONE : PROT_READ | PROT_WRITE;
  void* const at = ::mmap(nullptr, a.mapped, rights, MAP_SHARED, a.fd, 0);
  if (a.behind == MAP_FAILED || at == MAP_FAILED) return 0;
  std::lock_guard lock(w.mutex);
  const auto address = reinterpret_cast<uint64_t>(at);
  w.allocations[address] = a;
  return address;
}

FAKE_CUDA_EXPORT void fake_cuda_free(uint64_t address) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  const auto it = w.allocations.find(address);
  if (it == w.allocations.end()) return;
  ::munmap(reinterpret_cast<void*>(address), it->second.mapped);
  ::munmap(it->second.behind, it->second.mapped);
  ::close(it->second.fd);
  w.allocations.erase(it);
}

FAKE_CUDA_EXPORT int fake_cuda_poke(uint64_t address, const void* from, size_t nbytes) {
  std::lock_guard lock(world().mutex);
  std::byte* const to = behind(address, nbytes);
  if (to == nullptr) return -1;
  std::memcpy(to, from, nbytes);
  return 0;
}

FAKE_CUDA_EXPORT int fake_cuda_peek(uint64_t address, void* to, size_t nbytes) {
  std::lock_guard lock(world().mutex);
  const std::byte* const from = behind(address, nbytes);
  if (from == nullptr) return -1;
  std::memcpy(to, from, nbytes);
  return 0;
}

FAKE_CUDA_EXPORT int64_t fake_cuda_count(const char* name) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  const std::string which = name;
  if (which == "dmabufs") return w.dmabufs;
  if (which == "allocations") return static_cast<int64_t>(w.allocations.size());
  if (which == "contexts") return static_cast<int64_t>(current.size());
  int64_t sum = 0;
  if (which == "retained") {
    for (const int each : w.retained) sum += each;
    return sum;
  }
  if (which != "ordered") return -1;
  for (const auto& [address, a] : w.allocations) sum += a.ordered;
  return sum;
}

// ---------------------------------------------------------------- the driver's

FAKE_CUDA_EXPORT int cuInit(unsigned flags) {
  if (flags != 0) return kInvalidValue;
  world().initialised = world().init == kSuccess;
  return world().init;
}

FAKE_CUDA_EXPORT int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names = {{kSuccess, "CUDA_SUCCESS"},
                                                   {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                   {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
                                                   {100, "CUDA_ERROR_NO_DEVICE"},
                                                   {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
                                                   {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
                                                   {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED"}};
  const auto it = names.find(error);
  *name = it == names.end() ? nullptr : it->second;
  return it == names.end() ? kInvalidValue : kSuccess;
}

FAKE_CUDA_EXPORT int cuDeviceGetCount(int* count) {
  if (!world().initialised) return kNotInitialized;
  *count = world().devices;
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= world().devices) return kInvalidDevice;
  *device = kFirstDevice + ordinal;
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuDeviceGetAttribute(int* value, int which, int device) {
  if (!is_device(device)) return kInvalidDevice;
  switch (which) {
    case 118:  // GPU_DIRECT_RDMA_WRITES_ORDERING
      *value = world().ordering;
      return kSuccess;
    case 124:  // DMA_BUF_SUPPORTED
      *value = world().dmabuf ? 1 : 0;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}

FAKE_CUDA_EXPORT int cuDeviceGetName(char* name, int size, int device) {
  if (!is_device(device)) return kInvalidDevice;
  std::snprintf(name, static_cast<size_t>(size), "Fake GPU %d", device - kFirstDevice);
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuDeviceGetPCIBusId(char* id, int size, int device) {
  if (!is_device(device)) return kInvalidDevice;
  if (device == kFirstDevice)
    std::snprintf(id, static_cast<size_t>(size), "%s", world().bus.c_str());
  else
    std::snprintf(id, static_cast<size_t>(size), "0000:%02X:00.0", 0x80 + device - kFirstDevice);
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuPointerGetAttribute(void* value, int which, unsigned long long address) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  uint64_t base = 0;
  return w.find(address, base) == nullptr ? kInvalidValue : attribute(which, value, address);
}

// Unlike the one above it gives zeros for what it does not know.
FAKE_CUDA_EXPORT int cuPointerGetAttributes(unsigned count, int* which, void** values,
                                            unsigned long long address) {
  World& w = world();
  if (!w.initialised) return kNotInitialized;
  std::lock_guard lock(w.mutex);
  for (unsigned i = 0; i < count; ++i) {
    if (which[i] == 15) return kInvalidValue;  // not among those that it is documented for
    if (const int error = attribute(which[i], values[i], address); error != kSuccess) return error;
  }
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuPointerSetAttribute(const void* value, int which,
                                           unsigned long long address) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  uint64_t base = 0;
  Allocation* const a = w.find(address, base);
  if (a == nullptr || which != 6) return kInvalidValue;
  if (current.empty()) return kInvalidContext;
  if (a->kind != "legacy" || !w.sync_memops) return kNotSupported;
  a->ordered = *static_cast<const int*>(value) != 0 ? 1 : 0;
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (context == nullptr) return kInvalidContext;
  current.push_back(context);
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (current.empty()) return kInvalidContext;
  *context = current.back();
  current.pop_back();
  return kSuccess;
}

// A primary context is active as soon as there is memory on its device.
FAKE_CUDA_EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  World& w = world();
  if (!is_device(device)) return kInvalidDevice;
  std::lock_guard lock(w.mutex);
  *flags = 0;
  *active = std::ranges::any_of(
      w.allocations, [&](const auto& each) { return each.second.device == device - kFirstDevice; });
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (!is_device(device)) return kInvalidDevice;
  std::lock_guard lock(world().mutex);
  ++world().retained[static_cast<size_t>(device - kFirstDevice)];
  *context = &contexts[device - kFirstDevice];
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  if (!is_device(device)) return kInvalidDevice;
  std::lock_guard lock(world().mutex);
  --world().retained[static_cast<size_t>(device - kFirstDevice)];
  return kSuccess;
}

FAKE_CUDA_EXPORT int cuMemGetHandleForAddressRange(void* handle, unsigned long long address,
                                                   size_t nbytes, int type,
                                                   unsigned long long flags) {
  World& w = world();
  std::lock_guard lock(w.mutex);
  uint64_t base = 0;
  Allocation* const a = w.find(address, base);
  if (a == nullptr || !is_gpus(*a) || type != 1 || flags != 0 || nbytes == 0 ||
      address % page() != 0 || nbytes % page() != 0 || nbytes > a->mapped - (address - base))
    return kInvalidValue;
  if (current.empty()) return kInvalidContext;
  if (!w.dmabuf) return kNotSupported;
  // A description of its own, since it has a position of its own.
  const std::string path = "/proc/self/fd/" + std::to_string(a->fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  const int64_t position = fake_dmabuf_pack(static_cast<int64_t>((address - base) / page()),
                                            static_cast<int64_t>(nbytes / page()));
  if (fd < 0 || ::lseek(fd, position, SEEK_SET) != position) return kNotSupported;
  *static_cast<int*>(handle) = fd;
  ++w.dmabufs;
  return kSuccess;
}
