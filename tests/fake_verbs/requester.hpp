// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The send queue's side: packets out in order, answers in, go back N when one is missing.
#pragma once

#include "nic.hpp"

namespace fake_verbs {

// Sends what may be sent; true when only `budget` ended it.
bool send_some(Nic& nic, QueuePair& qp, int budget);
void on_answer(Nic& nic, QueuePair& qp, const Packet& packet);
void on_timer(Nic& nic, QueuePair& qp);

}  // namespace fake_verbs
