// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/device.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "common/error.hpp"
#include "transport/verbs/memlock.hpp"

namespace kvxfer::verbs {
namespace {

struct ListCloser {
  void operator()(ibv_device** list) const noexcept { api().free_device_list(list); }
};

const char* name_of(ibv_port_state state) {
  switch (state) {
    case IBV_PORT_DOWN:
      return "down";
    case IBV_PORT_INIT:
      return "initialising (no subnet manager?)";
    case IBV_PORT_ARMED:
      return "armed";
    case IBV_PORT_ACTIVE:
      return "active";
    case IBV_PORT_ACTIVE_DEFER:
      return "active, deferred";
    default:
      return "of unknown state";
  }
}

// The table's types are not told by ibv_query_gid; older libraries leave them to sysfs.
GidType type_in_sysfs(const std::string& device, uint8_t port, int index) {
  std::ifstream in(
      cat("/sys/class/infiniband/", device, "/ports/", int{port}, "/gid_attrs/types/", index));
  std::string text;
  std::getline(in, text);
  return text.find("v2") != std::string::npos ? GidType::kRoceV2 : GidType::kRoceV1;
}

}  // namespace

Device::Device(ibv_context* context) : context_(context) {
  // A forked child must not keep them open: the kernel would take our queue pairs for alive.
  own_descriptor(context_->cmd_fd);
  own_descriptor(context_->async_fd);
}

Device::~Device() {
  if (!birth_.here()) return;  // what its descriptors named is the parent's
  pd_.reset();
  disown_descriptor(context_->cmd_fd);
  disown_descriptor(context_->async_fd);
  api().close_device(context_);
}

std::string Device::use_port(uint8_t port) {
  ibv_port_attr attr{};
  if (const int err =
          api().query_port(context_, port, reinterpret_cast<_compat_ibv_port_attr*>(&attr)))
    return cat("ibv_query_port(", int{port}, ") failed: ", errno_text(err));
  if (attr.state != IBV_PORT_ACTIVE) return cat("is ", name_of(attr.state));
  address_ = {};
  address_.infiniband = attr.link_layer == IBV_LINK_LAYER_INFINIBAND;
  address_.lid = attr.lid;
  address_.mtu = static_cast<uint8_t>(attr.active_mtu);
  const std::string device = api().get_device_name(context_->device);
  for (int index = 0; index < attr.gid_tbl_len && address_.gids.size() < kMaxGids; ++index) {
    Gid gid;
    gid.index = static_cast<uint16_t>(index);
    ibv_gid raw{};
    if (api().query_gid_ex != nullptr) {
      ibv_gid_entry entry{};
      if (api().query_gid_ex(context_, port, static_cast<uint32_t>(index), &entry, 0,
                             sizeof entry) != 0)
        continue;  // a hole in the table
      raw = entry.gid;
      gid.type = static_cast<GidType>(entry.gid_type);
    } else {
      if (api().query_gid(context_, port, index, &raw) != 0) continue;
      gid.type = address_.infiniband ? GidType::kInfiniband : type_in_sysfs(device, port, index);
    }
    std::copy_n(reinterpret_cast<const std::byte*>(raw.raw), gid.raw.size(), gid.raw.begin());
    if (std::ranges::all_of(gid.raw, [](std::byte b) { return b == std::byte{0}; })) continue;
    address_.gids.push_back(gid);
  }
  if (address_.gids.empty() && !address_.infiniband)
    return "has no GID: give its interface an address";
  port_ = port;
  name_ = cat(device, ":", int{port});
  return {};
}

std::shared_ptr<Device> Device::open(ibv_device* of, uint8_t port, int& num_ports,
                                     std::string& reason) {
  const std::string name = api().get_device_name(of);
  ibv_context* const context = api().open_device(of);
  if (context == nullptr) {
    reason = cat("ibv_open_device(", name, ") failed: ", errno_text(errno));
    return nullptr;
  }
  std::shared_ptr<Device> device(new Device(context));
  if (const int err = api().query_device(context, &device->limits_)) {
    reason = cat("ibv_query_device(", name, ") failed: ", errno_text(err));
    return nullptr;
  }
  num_ports = device->limits_.phys_port_cnt;
  if (port > num_ports) {
    reason = cat(name, " has no port ", int{port});
    return nullptr;
  }
  if (const std::string why = device->use_port(port); !why.empty()) {
    reason = cat(name, " port ", int{port}, " ", why);
    return nullptr;
  }
  device->pd_.reset(api().alloc_pd(context));
  if (!device->pd_) {
    reason = cat("ibv_alloc_pd on ", name, " failed: ", errno_text(errno));
    return nullptr;
  }
  device->sysfs_ = of->ibdev_path;
  device->place_ = place_of(device->sysfs_ + "/device");
  // Its events are read by the reactor, which must never block in the call.
  ::fcntl(context->async_fd, F_SETFL, ::fcntl(context->async_fd, F_GETFL) | O_NONBLOCK);
  return device;
}

Devices Device::open_all(const std::string& wanted, Refusal refusal, std::string& reason) {
  // A look at sysfs first: most machines have no such device, and need not load the library.
  if (std::getenv("KVXFER_LIBIBVERBS") == nullptr) {
    std::error_code none;
    const bool empty = std::filesystem::is_empty("/sys/class/infiniband", none);
    if (empty || none) {
      reason = "no RDMA device: /sys/class/infiniband is empty or not there";
      return {};
    }
  }
  if (load_api(reason) == nullptr) return {};
  int num_devices = 0;
  const std::unique_ptr<ibv_device*, ListCloser> list(api().get_device_list(&num_devices));
  if (!list) {
    reason = cat("ibv_get_device_list failed: ", errno_text(errno));
    return {};
  }
  Devices out;
  std::string seen;
  const auto note = [&](const std::string& why) { seen += cat(seen.empty() ? "" : "; ", why); };
  // All ports of one device, or the one that is wanted. False: none can be used.
  const auto add = [&](ibv_device* device, int wanted_port) {
    bool any = false;
    int num_ports = 1;
    for (int port = std::max(wanted_port, 1);
         port <= (wanted_port > 0 ? wanted_port : num_ports) && out.size() < kMaxRails; ++port) {
      std::string why;
      auto opened = open(device, static_cast<uint8_t>(port), num_ports, why);
      if (opened) why = refusal(*opened);
      if (!why.empty()) {
        note(why);
        continue;
      }
      any = true;
      const bool twice = std::ranges::any_of(
          out, [&](const auto& other) { return other->name() == opened->name(); });
      if (twice) continue;
      opened->index_ = out.size();
      out.push_back(std::move(opened));
    }
    return any;
  };
  if (wanted.empty()) {
    for (int i = 0; i < num_devices; ++i) add(list.get()[i], 0);
  } else {
    std::istringstream names(wanted);
    for (std::string each; std::getline(names, each, ',');) {
      const size_t colon = each.find(':');
      const std::string name = each.substr(0, colon);
      const int port = colon == std::string::npos ? 0 : std::atoi(each.c_str() + colon + 1);
      if (out.size() == kMaxRails) {
        note(cat("'", each, "' would be one more than the ", kMaxRails,
                 " ports that an engine uses"));
        out.clear();
        break;
      }
      bool found = false, any = false;
      for (int i = 0; i < num_devices; ++i) {
        if (name != api().get_device_name(list.get()[i])) continue;
        found = true;
        any = add(list.get()[i], port);
      }
      if (!found) note(cat("there is no ", name));
      if (!any) {  // what was asked for by name is not left out in silence
        out.clear();
        break;
      }
    }
  }
  if (out.empty())
    reason = num_devices == 0 ? "no RDMA device here"
                              : cat("no RDMA device ", wanted.empty() ? "" : cat("'", wanted, "' "),
                                    "can be used: ", seen);
  return out;
}

Place Device::place_on_bus(const std::string& bus_id) const {
  return bus_id.empty() ? Place{} : place_of(cat(sysfs_, "/device/subsystem/devices/", bus_id));
}

MrPtr Device::register_memory(void* base, size_t nbytes, int access,
                              const std::string& what) const {
  MrPtr mr(api().reg_mr(pd_.get(), base, nbytes, access));
  if (mr) return mr;
  const int err = errno;
  std::string hint;
  if (err == ENOMEM || err == EPERM || err == EAGAIN)
    hint = "; " + explain_memlock(memlock_now(), nbytes);
  else if (err == EFAULT || err == EOPNOTSUPP)
    hint =
        "; memory of a GPU or of a device file cannot be registered as host memory (a GPU's is "
        "taken from whatever has __cuda_array_interface__)";
  throw Error(Code::kRegistration,
              cat("ibv_reg_mr(", what, ", ", nbytes, " bytes, access ", access, ") on ", name_,
                  " failed: ", errno_text(err), hint),
              err, "verbs");
}

Registration::Registration(Devices devices, void* base, size_t nbytes, int access,
                           const std::string& what, const Step& step)
    : Registration(
          std::move(devices), nbytes, access,
          [&](const Device& device, int allowed) {
            return Registered{device.register_memory(base, nbytes, allowed, what), true, {}};
          },
          step) {}

Registration::Registration(Devices devices, uint64_t nbytes, int access,
                           const RegisterWith& register_with, const Step& step)
    : devices_(std::move(devices)) {
  std::vector<std::pair<std::string, std::string>> ways;  // of each device
  for (const auto& device : devices_) {
    // One that is there twice has several queue pairs.
    if (!device->is_lost() && lkeys_[device->index()] == 0) {
      const int allowed = device->has_windows() ? access : access & ~IBV_ACCESS_MW_BIND;
      Registered one = register_with(*device, allowed);
      mrs_.push_back(std::move(one.mr));
      by_device_[device->index()] = mrs_.back().get();
      lkeys_[device->index()] = mrs_.back()->lkey;
      rkeys_[device->index()] = mrs_.back()->rkey;
      takes_windows_[device->index()] = one.takes_windows;
      if (!one.how.empty()) ways.emplace_back(device->name(), std::move(one.how));
    }
    if (step) step(nbytes);
  }
  if (mrs_.empty() && !devices_.empty())
    throw Error(Code::kRegistration,
                cat(nbytes, " bytes cannot be registered: ", devices_.front()->name(),
                    devices_.size() > 1 ? " and every other RDMA device of this engine were lost"
                                        : ", the engine's RDMA device, was lost",
                    "; make a new engine"),
                ENODEV, "verbs");
  const bool differ =
      std::ranges::any_of(ways, [&](const auto& way) { return way.second != ways[0].second; });
  for (const auto& [device, way] : ways) {
    how_ += cat(how_.empty() ? "" : "; ", differ ? device + " " : "", way);
    if (!differ) break;
  }
}

}  // namespace kvxfer::verbs
