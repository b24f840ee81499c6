// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/transport.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <utility>

#include "common/clock.hpp"
#include "common/error.hpp"
#include "cuda_driver/memory.hpp"

namespace kvxfer::verbs {
namespace {
constexpr uint8_t kRetries = 6;  // 7, the most there is, is "for ever" on Soft-RoCE

std::string refusal_of(const Device& device) {
  if (Channel::num_buffers(device) > 0 && ChainQueue::depth(device) > 0) return {};
  return cat(device.name(), " has send queues of ", device.limits().max_qp_wr,
             " work requests, which are too short");
}
}  // namespace

struct VerbsTransport::EventHandler final : FdHandler {
  EventHandler(VerbsTransport& t, Device& d) : transport(t), device(d) {}
  void on_events(uint32_t) override { transport.on_events(device); }
  VerbsTransport& transport;
  Device& device;
};

std::optional<std::string> VerbsTransport::probe() const {
  if (!devices_.empty()) return {};
  std::string reason;
  Devices devices = Device::open_all(config_.verbs_device, refusal_of, reason);
  if (devices.empty()) return reason;
  word_ = std::make_unique<Word>();
  try {
    word_registration_ = std::make_unique<Registration>(
        devices, word_.get(), sizeof(Word), IBV_ACCESS_REMOTE_READ, "the engine's identity");
  } catch (const Error& error) {
    return error.what();
  }
  devices_ = std::move(devices);
  return {};
}

std::string VerbsTransport::detail() const {
  std::string out;
  for (const auto& device : devices_)
    out += cat(out.empty() ? "" : ", ", device->name(), " (", device->place().text(), ")");
  std::string no_gpus;
  if (devices_.size() > 1)
    for (const cuda_driver::Gpu& gpu : cuda_driver::gpus(no_gpus))
      out += cat("; a GPU's memory at ", gpu.bus_id, " ", Preference(devices_, gpu.bus_id).text());
  if (api().reg_dmabuf_mr == nullptr) out += "; this libibverbs (rdma-core) takes no dma-bufs";
  return out;
}

void VerbsTransport::start(Host& host) {
  host_ = &host;
  memory_.open(devices_, config_.verbs_background_nbytes, config_.verbs_part_nbytes,
               config_.verbs_push);
  word_->incarnation = host.self().incarnation;
  for (const auto& device : devices_)
    tokens_.push_back(host.reactor().add(device->context()->async_fd, EPOLLIN,
                                         std::make_shared<EventHandler>(*this, *device)));
}

void VerbsTransport::stop() noexcept {
  if (host_ == nullptr) return;
  for (const auto& device : devices_)
    host_->reactor().remove(tokens_[device->index()], device->context()->async_fd);
  halves_.clear();
  memory_.clear();
  word_registration_.reset();
}

void VerbsTransport::expose(const std::shared_ptr<Region>& region) {
  const bool chooses = devices_.size() > 1 && config_.verbs_device.empty();
  const std::string device = device_text(region->device);
  memory_.add(*region, [chooses, device](const RegionMemory& memory) {
    std::string out =
        memory.is_on_gpu() ? cat("has registered memory of ", device, " ", memory.how()) : "";
    if (chooses) out += (out.empty() ? "" : "; ") + memory.preference().text();
    return out;
  });
}

std::vector<PortAddress> VerbsTransport::own_addresses() const {
  std::vector<PortAddress> out;
  for (const auto& device : devices_) {
    PortAddress& address = out.emplace_back();
    address.infiniband = device->address().infiniband;
    if (!device->is_up()) continue;
    address = device->address();
    if (config_.verbs_gid_index >= 0)
      std::erase_if(address.gids,
                    [&](const Gid& gid) { return gid.index != config_.verbs_gid_index; });
  }
  return out;
}

std::string VerbsTransport::why_no_push(const Devices& devices) const {
  if (!config_.verbs_push) return "the engine was made without EngineConfig(verbs_push=True)";
  return VerbsConnection::refuse_push(devices);
}

// Nothing but windows keeps a gate of ours from being quiet for longer than a chain takes.
void VerbsTransport::revoked(const Lease&) noexcept {
  if (!config_.verbs_push) return;
  for (const auto& connection : alive()) connection->lease_closed();
}

std::string VerbsTransport::unusable() const {
  std::string out;
  for (const auto& device : devices_) {
    if (device->is_up()) return {};
    out += cat(out.empty() ? "" : "; ", device->name(),
               device->is_lost() ? " is of no use any more: the device has failed"
                                 : " is of no use: its port is down");
  }
  return out;
}

Bytes VerbsTransport::offer() const {
  Bytes bytes;
  Writer writer(bytes);
  writer.u32(kVersion);
  const auto addresses = own_addresses();
  writer.u8(static_cast<uint8_t>(addresses.size()));
  for (const PortAddress& address : addresses) encode(address, writer);
  return bytes;
}

Route VerbsTransport::route_to(const Device& device, const Path& path, const PortAddress& remote,
                               size_t num_ports) const {
  Route route;
  route.path = path;
  route.remote_lid = remote.lid;
  route.mtu =
      std::clamp<uint8_t>(std::min(device.address().mtu, remote.mtu), IBV_MTU_256, IBV_MTU_4096);
  route.retry_count = kRetries;
  // Where others can go on, a rail that does not answer is given up while there is time for it.
  route.timeout =
      timeout_for(num_ports > 1 ? config_.deadline_ns / 4 : config_.deadline_ns, kRetries);
  return route;
}

void VerbsTransport::keep(const std::shared_ptr<VerbsConnection>& connection) {
  std::lock_guard lock(mutex_);
  std::erase_if(connections_, [](const auto& weak) { return weak.expired(); });
  connections_.push_back(connection);
}

std::vector<std::shared_ptr<VerbsConnection>> VerbsTransport::alive() {
  std::vector<std::shared_ptr<VerbsConnection>> out;
  std::lock_guard lock(mutex_);
  for (const auto& weak : connections_)
    if (auto connection = weak.lock()) out.push_back(std::move(connection));
  return out;
}

// ---------------------------------------------------------------- events of the device

void VerbsTransport::on_events(Device& device) {
  ibv_async_event event{};
  while (api().get_async_event(device.context(), &event) == 0) {
    const ibv_event_type type = event.event_type;
    uint32_t number = 0;
    switch (type) {
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        number = event.element.qp->qp_num;
        break;
      case IBV_EVENT_PORT_ERR:
      case IBV_EVENT_PORT_ACTIVE:
        number = static_cast<uint32_t>(event.element.port_num);
        break;
      default:
        break;
    }
    // At once: a queue pair cannot be destroyed while an event of its is out.
    api().ack_async_event(&event);
    const char* const text = api().event_type_str(type);
    switch (type) {
      case IBV_EVENT_QP_FATAL:
      case IBV_EVENT_QP_REQ_ERR:
      case IBV_EVENT_QP_ACCESS_ERR:
        for (const auto& connection : alive())
          if (connection->on_queue_pair_event(device, number, text)) break;
        break;
      case IBV_EVENT_PORT_ERR:
      case IBV_EVENT_PORT_ACTIVE:
        if (number == device.port()) port_event(device, type == IBV_EVENT_PORT_ACTIVE, text);
        break;
      case IBV_EVENT_DEVICE_FATAL:
      case IBV_EVENT_CQ_ERR:
        device.lose();
        port_event(device, false, text);
        break;
      default:  // nothing that takes anything away
        break;
    }
  }
}

void VerbsTransport::port_event(Device& device, bool up, const std::string& event) {
  if (up && device.is_lost()) return;
  device.set_up(up);
  for (const auto& connection : alive()) connection->on_port_event(device, up, event);
}

}  // namespace kvxfer::verbs
