// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once, by what the CPU and the operating system offer.
#include <atomic>

#include "common/error.hpp"
#include "kernels/cpu/kernels.hpp"

namespace kvxfer::kernels::cpu {

namespace baseline {
extern const IsaTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const IsaTable kTable;
}
namespace avx512 {
extern const IsaTable kTable;
}
#endif

namespace {

std::vector<const IsaTable*> usable_tables() {
  std::vector<const IsaTable*> tables;
#if defined(__x86_64__)
  // These builtins ask cpuid and XGETBV, so an operating system that does not save the registers
  // counts too.
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) tables.push_back(&avx512::kTable);
  if (v3) tables.push_back(&avx2::kTable);
#endif
  tables.push_back(&baseline::kTable);
  return tables;
}

// Written by set_isa (tests), read by every call; the tables are constants, so relaxed is enough.
std::atomic<const IsaTable*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const IsaTable* table : usable_tables()) names.emplace_back(table->name);
  return names;
}

const IsaTable& isa() {
  const IsaTable* table = chosen.load(std::memory_order_relaxed);
  if (table == nullptr) {
    table = usable_tables().front();
    chosen.store(table, std::memory_order_relaxed);
  }
  return *table;
}

const char* isa_name() { return isa().name; }

void set_isa(const std::string& name) {
  for (const IsaTable* table : usable_tables()) {
    if (name == table->name) return chosen.store(table, std::memory_order_relaxed);
  }
  std::string names;
  for (const auto& each : available_isas()) names += (names.empty() ? "" : ", ") + each;
  fail(Code::kInvalidArgument, "isa: expected one of ", names, " (what this CPU can run), given ",
       name);
}

}  // namespace kvxfer::kernels::cpu
