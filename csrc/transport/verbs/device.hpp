// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// One opened RDMA device with its protection domain and the port that we use. Each engine opens its
// own: a protection domain is what its remote keys are valid in.
#pragma once

#include <memory>
#include <string>

#include "common/fork.hpp"
#include "transport/verbs/address.hpp"
#include "transport/verbs/api.hpp"

namespace kvxfer::verbs {

class Device {
 public:
  // `wanted`: "mlx5_0", "mlx5_0:2" (a port), or empty for the first device with an active port.
  // Null, with the reason naming what was looked at, when there is none.
  static std::shared_ptr<Device> open(const std::string& wanted, std::string& reason);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const std::string& name() const noexcept { return name_; }  // "mlx5_0:1", with the port
  ibv_context* context() const noexcept { return context_; }
  ibv_pd* pd() const noexcept { return pd_.get(); }
  const ibv_device_attr& limits() const noexcept { return limits_; }
  uint8_t port() const noexcept { return port_; }
  const PortAddress& address() const noexcept { return address_; }
  uint32_t max_message_nbytes() const noexcept { return max_message_nbytes_; }

  // Pins and registers; throws RegistrationError saying what to do, `what` names the memory.
  MrPtr register_memory(void* base, size_t nbytes, int access, const std::string& what) const;

 private:
  explicit Device(ibv_context* context);
  std::string use_port(uint8_t port);  // empty, or why it cannot be used

  Birth birth_;
  ibv_context* const context_;
  std::string name_;
  ibv_device_attr limits_{};
  uint8_t port_ = 0;
  uint32_t max_message_nbytes_ = 0;
  PortAddress address_;
  PdPtr pd_;
};

}  // namespace kvxfer::verbs
