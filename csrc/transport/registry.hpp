// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What is compiled in, what works here, and the reason when it does not.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transport/config.hpp"
#include "transport/transport.hpp"

namespace kvxfer {

struct Availability {
  std::string name;
  std::optional<std::string> reason;  // empty: works here
};

// Best first: the order in which a peer is offered requests. "tcp" comes last and is always there,
// since it carries the session, and then the engine makes it.
const std::vector<std::string>& transport_names();
// Those before which stand the ones that are used only when they are named: "faulty".
const std::vector<std::string>& all_transport_names();
// "tcp" from here attaches to a session like the others; only "faulty" asks for that.
std::unique_ptr<Transport> make_transport(const std::string& name, const TransportConfig& config);
std::vector<Availability> probe_transports();
// With what they work, by name, where there is more to say; for `kvxfer doctor`. May open CUDA.
std::map<std::string, std::string> transport_details();

}  // namespace kvxfer
