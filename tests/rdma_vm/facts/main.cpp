// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Asks a verbs device what it does where the transport must know, one JSON line a fact: facts
// DEVICE INTERFACE [TARGET].
#include "facts.hpp"

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: facts DEVICE INTERFACE [TARGET]\n");
    return 2;
  }
  try {
    facts::Device here(argv[1]);
    std::optional<facts::Device> there;
    if (argc == 4) there.emplace(argv[3]);
    facts::World world{here, there ? *there : here};
    facts::posting_facts(world);
    facts::window_facts(world);
    facts::fence_facts(world);
    facts::order_facts(world);
    facts::end_facts(world);
    facts::event_facts(world, argv[2], argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "facts: %s\n", error.what());
    return 1;
  }
  return 0;
}
