// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Ends of requests, collected under the lock, told after it.
#pragma once

#include "transport/tcp/connection.hpp"

namespace kvxfer::tcp {

struct TcpConnection::Deliveries {
  struct End {
    RequestPtr request;
    Flight::Ending ending;
    Completion completion;
  };
  std::vector<End> ends;
  std::vector<RequestPtr> unshown;
  bool writable = false;

  void add(Flight& flight) {
    if (flight.ending == Flight::Ending::kNone) return;
    ends.push_back({flight.request, flight.ending, std::move(flight.completion)});
    flight.ending = Flight::Ending::kNone;
  }
};

}  // namespace kvxfer::tcp
