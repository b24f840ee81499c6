// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What was left out when this was built is named with the reason, and missed by nobody who did not
// ask for it. Compiled with KVXFER_VERBS_REASON.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include "engine/engine.hpp"
#include "transport/registry.hpp"

using namespace kvxfer;

namespace {

EngineOptions named(const std::string& name) {
  EngineOptions options;
  options.name = name;
  options.secret = Bytes(32, std::byte{1});
  return options;
}

}  // namespace

TEST_CASE("without verbs: it is listed, with the reason") {
  const auto found = probe_transports();
  const auto verbs = std::ranges::find(found, "verbs", &Availability::name);
  REQUIRE(verbs != found.end());
  CHECK(verbs->reason == KVXFER_VERBS_REASON);
  CHECK_FALSE(transport_details().contains("verbs"));
}

TEST_CASE("without verbs: who asks for it by name is told why there is none") {
  EngineOptions options = named("a");
  options.transports = {"verbs"};
  CHECK_THROWS_WITH_AS(
      Engine::create(options),
      "transport 'verbs' was asked for, but does not work here: " KVXFER_VERBS_REASON, Error);
}

TEST_CASE("without verbs: who does not is served by others, and explain() has the reason") {
  const auto a = Engine::create(named("a")), b = Engine::create(named("b"));
  const PeerPtr peer = a->connect(b->address(), 10);
  const std::string text = a->explain(*peer);
  CAPTURE(text);
  CHECK(peer->alive.load());
  CHECK(text.find("verbs: " KVXFER_VERBS_REASON) != std::string::npos);
  a->close();
  b->close();
}
