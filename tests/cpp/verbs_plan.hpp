// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// What tests of engines over software NICs ask of the NICs and of the engines.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "fake_verbs.h"
#include "transport/config.hpp"

// Gives up a packet that is lost, and a peer that does not answer, sooner than by default.
inline kvxfer::TransportConfig impatient(const std::string& devices = "") {
  kvxfer::TransportConfig config;
  config.deadline_ns = 4'000'000'000;
  config.verbs_device = devices;
  return config;
}

// Harmless again before the engines close, whatever the test has done.
struct Plan {
  explicit Plan(const std::string& text) { REQUIRE(fake_verbs_plan(text.c_str()) == 0); }
  ~Plan() { fake_verbs_plan(""); }
};
