// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The CPU kernels. Shapes, dtypes and strides are the caller's promise; ids and slots are checked
// here before memory is touched, and an Error with kInvalidArgument names the index and the value.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/params.hpp"

namespace kvxfer::kernels::cpu {

void append_kv(const Append& params);
void paged_decode(const Attention& params);
void paged_prefill(const Attention& params);
void merge_states(const Merge& params);
void copy_rows(const Copy& params);
void checksum_rows(const Checksum& params);
// The sum of all words of these blocks, read in this order: the bound of kernels that read a cache.
uint64_t read_blocks(const char* const* blocks, int64_t count, int64_t nbytes);

// Instruction sets that this build has and this CPU can run, best first; the first one is used.
std::vector<std::string> available_isas();
const char* isa_name();
void set_isa(const std::string& name);  // for tests and measurements
const IsaTable& isa();

}  // namespace kvxfer::kernels::cpu
