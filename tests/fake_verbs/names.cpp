// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Entry points: words for numbers.
#include <array>
#include <cstddef>

#include "exports.hpp"

namespace {

template <size_t N>
const char* name(const std::array<const char*, N>& names, int value) {
  return value >= 0 && static_cast<size_t>(value) < N ? names[static_cast<size_t>(value)]
                                                      : "unknown";
}

}  // namespace

FAKE_VERBS_EXPORT const char* ibv_wc_status_str(ibv_wc_status status) {
  static constexpr std::array kNames = {"success",
                                        "local length error",
                                        "local QP operation error",
                                        "local EE context operation error",
                                        "local protection error",
                                        "work request flushed",
                                        "memory window bind error",
                                        "bad response",
                                        "local access error",
                                        "remote invalid request error",
                                        "remote access error",
                                        "remote operation error",
                                        "transport retry counter exceeded",
                                        "RNR retry counter exceeded",
                                        "local RDD violation",
                                        "remote invalid RD request",
                                        "remote aborted",
                                        "invalid EE context number",
                                        "invalid EE context state",
                                        "fatal error",
                                        "response timeout",
                                        "general error",
                                        "tag matching error",
                                        "tag matching rendezvous incomplete"};
  return name(kNames, status);
}

FAKE_VERBS_EXPORT const char* ibv_port_state_str(ibv_port_state state) {
  static constexpr std::array kNames = {"no state change", "down",   "init",
                                        "armed",           "active", "active deferred"};
  return name(kNames, state);
}

FAKE_VERBS_EXPORT const char* ibv_node_type_str(ibv_node_type type) {
  static constexpr std::array kNames = {"invalid", "channel adapter", "switch", "router", "RNIC",
                                        "usNIC"};
  return name(kNames, type);
}

FAKE_VERBS_EXPORT const char* ibv_event_type_str(ibv_event_type type) {
  static constexpr std::array kNames = {"CQ error",
                                        "QP fatal error",
                                        "QP request error",
                                        "QP access error",
                                        "communication established",
                                        "send queue drained",
                                        "path migrated",
                                        "path migration error",
                                        "device fatal error",
                                        "port active",
                                        "port error",
                                        "LID change",
                                        "P_Key change",
                                        "SM change",
                                        "SRQ error",
                                        "SRQ limit reached",
                                        "last WQE reached",
                                        "client reregistration",
                                        "GID change",
                                        "WQ fatal error"};
  return name(kNames, type);
}
