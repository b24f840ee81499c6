// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One opened RDMA device with its protection domain and the port of it that we use: one rail's end.
// A device with several ports is opened for each of them. Each engine opens its own: a protection
// domain is what its remote keys are valid in.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/fork.hpp"
#include "transport/verbs/address.hpp"
#include "transport/verbs/api.hpp"
#include "transport/verbs/nearness.hpp"
#include "transport/verbs/pairing.hpp"

namespace kvxfer::verbs {

class Device;
using Devices = std::vector<std::shared_ptr<Device>>;

class Device {
 public:
  // Every active port, kMaxRails at most; or those that `wanted` names: "mlx5_0" (all its ports),
  // "mlx5_0:2", several separated by commas, each of which must have one. Empty, with the reason
  // naming what was looked at, when there is none. `refusal`: what else speaks against one; or
  // empty.
  using Refusal = std::string (*)(const Device&);
  static Devices open_all(const std::string& wanted, Refusal refusal, std::string& reason);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const std::string& name() const noexcept { return name_; }  // "mlx5_0:1", with the port
  ibv_context* context() const noexcept { return context_; }
  ibv_pd* pd() const noexcept { return pd_.get(); }
  const ibv_device_attr& limits() const noexcept { return limits_; }
  uint8_t port() const noexcept { return port_; }
  const PortAddress& address() const noexcept { return address_; }
  size_t index() const noexcept { return index_; }  // in what open_all() gave
  const Place& place() const noexcept { return place_; }
  // Of another device on the bus that this one is on, such as a GPU, by its address in sysfs
  // ("0000:3b:00.0").
  Place place_on_bus(const std::string& bus_id) const;
  // Of type 2B, which belong to one queue pair.
  bool has_windows() const noexcept {
    return (limits_.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B) != 0 && limits_.max_mw > 0;
  }
  // Whether a fenced READ whose answer is lost is sent again. Soft-RoCE (Linux 6.1) counts it among
  // the READs that it has to wait for, so that it waits for itself, for ever and without an error.
  bool has_sound_fence() const noexcept { return limits_.vendor_id != kSoftRoceVendor; }
  // Whether new connections may use it. Written by the thread that hears of events; relaxed: who
  // comes too late finds a port that does not answer.
  bool is_up() const noexcept { return up_.load(std::memory_order_relaxed) && !is_lost(); }
  void set_up(bool up) noexcept { up_.store(up, std::memory_order_relaxed); }
  bool is_lost() const noexcept { return lost_.load(std::memory_order_relaxed); }
  void lose() noexcept { lost_.store(true, std::memory_order_relaxed); }

  // Pins and registers; throws RegistrationError saying what to do, `what` names the memory.
  MrPtr register_memory(void* base, size_t nbytes, int access, const std::string& what) const;

 private:
  static constexpr uint32_t kSoftRoceVendor = 0xffffff;

  explicit Device(ibv_context* context);
  // Null, with the reason, when the port cannot be used. `num_ports`: of the device, once known.
  static std::shared_ptr<Device> open(ibv_device* device, uint8_t port, int& num_ports,
                                      std::string& reason);
  std::string use_port(uint8_t port);

  Birth birth_;
  ibv_context* const context_;
  std::string name_;
  ibv_device_attr limits_{};
  uint8_t port_ = 0;
  size_t index_ = 0;
  std::string sysfs_;  // its folder: "/sys/class/infiniband/mlx5_0"
  Place place_;
  std::atomic<bool> up_{true}, lost_{false};
  PortAddress address_;
  PdPtr pd_;
};

// Keys of one piece of memory: local ones by Device::index(), remote ones by a connection's rail.
using Keys = std::array<uint32_t, kMaxRails>;

// What registering with one device gives.
struct Registered {
  MrPtr mr;
  bool takes_windows = true;  // as far as the device has any
  std::string how;            // in words, where there is a choice
};

// Memory that is registered with every device, and stays so until this goes.
class Registration {
 public:
  // Told of the bytes that each device has registered, or need not; may throw, which undoes all.
  using Step = std::function<void(uint64_t nbytes)>;
  // Throws RegistrationError. What a device that was lost would have is 0. The right to bind
  // windows is left out where a device has none.
  Registration(Devices devices, void* base, size_t nbytes, int access, const std::string& what,
               const Step& step = {});
  // Likewise, by a function that throws RegistrationError.
  using RegisterWith = std::function<Registered(const Device&, int access)>;
  Registration(Devices devices, uint64_t nbytes, int access, const RegisterWith& register_with,
               const Step& step = {});
  const Keys& lkeys() const noexcept { return lkeys_; }
  const Keys& rkeys() const noexcept { return rkeys_; }  // by Device::index() as well
  // Null where that device was lost.
  ibv_mr* on(const Device& device) const noexcept { return by_device_[device.index()]; }
  bool takes_windows(const Device& device) const noexcept { return takes_windows_[device.index()]; }
  const std::string& how() const noexcept { return how_; }  // of all devices; may be empty

 private:
  const Devices devices_;
  Keys lkeys_{}, rkeys_{};
  std::array<ibv_mr*, kMaxRails> by_device_{};
  std::array<bool, kMaxRails> takes_windows_{};
  std::string how_;
  std::vector<MrPtr> mrs_;
};

}  // namespace kvxfer::verbs
