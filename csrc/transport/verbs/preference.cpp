// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/verbs/preference.hpp"

#include <functional>
#include <map>
#include <utility>

#include "common/error.hpp"

namespace kvxfer::verbs {

Preference::Preference(const Devices& devices, int node) {
  compare(devices, [&](const Device&) { return Place{.node = node}; });
}

Preference::Preference(const Devices& devices, const std::string& bus_id) {
  compare(devices, [&](const Device& device) { return device.place_on_bus(bus_id); });
}

template <typename PlaceFor>
void Preference::compare(const Devices& devices, PlaceFor place_for) {
  std::map<std::pair<int, std::string>, std::string, std::greater<>> alike;  // nearest first
  for (const auto& device : devices) {
    Nearness near = nearness(device->place(), place_for(*device));
    ranks_[device->index()] = near.rank;
    std::string& names = alike[{near.rank, std::move(near.what)}];
    names += (names.empty() ? "" : ", ") + device->name();
  }
  if (alike.size() == 1 && alike.begin()->first.first == 0) {
    text_ = "prefers no NIC: nothing is known of how near they are";
    return;
  }
  for (const auto& [how, names] : alike)
    text_ += cat(text_.empty() ? "prefers " : " to ", names, " (",
                 how.first == 0 ? "elsewhere, or unknown" : how.second, ")");
  if (alike.size() == 1) text_ = "prefers no NIC: " + text_.substr(8);
}

}  // namespace kvxfer::verbs
