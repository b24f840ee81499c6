// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/registry.hpp"

#include <functional>
#include <utility>

#include "transport/cma/transport.hpp"
#include "transport/faulty/transport.hpp"
#include "transport/shm/transport.hpp"
#include "transport/tcp/attached.hpp"
#ifdef KVXFER_WITH_VERBS
#include "transport/verbs/transport.hpp"
#endif

namespace kvxfer {
namespace {

using Maker = std::function<std::unique_ptr<Transport>(const TransportConfig&)>;

#ifndef KVXFER_WITH_VERBS
// Stands for one that was left out when this was built.
class AbsentTransport final : public Transport {
 public:
  AbsentTransport(std::string_view name, std::string_view reason) : name_(name), reason_(reason) {}
  std::string_view name() const noexcept override { return name_; }
  std::optional<std::string> probe() const override { return std::string(reason_); }
  void start(Host&) override {}
  void stop() noexcept override {}

 private:
  const std::string_view name_, reason_;
};
#endif

// One line per transport that attaches to a session, best first.
const std::vector<std::pair<std::string, Maker>>& makers() {
  static const std::vector<std::pair<std::string, Maker>> list = {
      {"shm",
       [](const TransportConfig& config) { return std::make_unique<shm::ShmTransport>(config); }},
      {"cma",
       [](const TransportConfig& config) { return std::make_unique<cma::CmaTransport>(config); }},
#ifdef KVXFER_WITH_VERBS
      {"verbs",
       [](const TransportConfig& config) {
         return std::make_unique<verbs::VerbsTransport>(config);
       }},
#else
      {"verbs",
       [](const TransportConfig&) {
         return std::make_unique<AbsentTransport>("verbs", KVXFER_VERBS_REASON);
       }},
#endif
  };
  return list;
}

}  // namespace

const std::vector<std::string>& transport_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> out;
    for (const auto& [name, maker] : makers()) out.push_back(name);
    out.emplace_back("tcp");
    return out;
  }();
  return names;
}

const std::vector<std::string>& all_transport_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> out = transport_names();
    out.insert(out.begin(), "faulty");
    return out;
  }();
  return names;
}

std::unique_ptr<Transport> make_transport(const std::string& name, const TransportConfig& config) {
  for (const auto& [known, maker] : makers())
    if (known == name) return maker(config);
  if (name == "faulty") return std::make_unique<faulty::FaultyTransport>(config);
  if (name == "tcp") return std::make_unique<tcp::AttachedTcp>(config);
  return nullptr;
}

std::vector<Availability> probe_transports() {
  std::vector<Availability> out;
  for (const auto& [name, maker] : makers()) {
    const auto transport = maker({});
    auto reason = transport->probe();
    out.push_back({name, reason});
  }
  out.push_back({"tcp", {}});
  return out;
}

std::map<std::string, std::string> transport_details() {
  std::map<std::string, std::string> out;
  for (const auto& [name, maker] : makers()) {
    const auto transport = maker({});
    if (transport->probe()) continue;
    if (std::string detail = transport->detail(); !detail.empty()) out[name] = std::move(detail);
  }
  return out;
}

}  // namespace kvxfer
