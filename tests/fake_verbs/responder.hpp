// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The receiving side: requests are checked and executed as each packet of them arrives, in order,
// once; answers go out in the order of the requests.
#pragma once

#include "nic.hpp"

namespace fake_verbs {

void on_request(Nic& nic, QueuePair& qp, const Packet& packet);
// Sends answers that are due; true when only `budget` ended it.
bool answer_some(Nic& nic, QueuePair& qp, int budget);

}  // namespace fake_verbs
