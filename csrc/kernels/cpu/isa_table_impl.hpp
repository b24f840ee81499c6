// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// All kernels of one instruction set, in the namespace KVXFER_SIMD_NAMESPACE. The library headers
// that they need are included by isa_*.cpp in front of its target pragma; here they would be
// compiled for that CPU alone.
#pragma once

namespace kvxfer::kernels::cpu::KVXFER_SIMD_NAMESPACE {
namespace {

// Sized for the registers there are: 16 of them, or 32 with AVX-512.
constexpr int kBroadcast = KVXFER_SIMD_BYTES == 64 ? 8 : 4;

#include "kernels/cpu/simd.hpp"
//
#include "kernels/cpu/rows_impl.hpp"
//
#include "kernels/cpu/decode_rows_impl.hpp"
//
#include "kernels/cpu/decode_impl.hpp"
//
#include "kernels/cpu/prefill_impl.hpp"

}  // namespace

extern const IsaTable kTable;
const IsaTable kTable = {KVXFER_SIMD_NAME, decode_scratch, decode,  finish, prefill_scratch,
                         prefill,          convert,        largest, merge,  copy_runs,
                         sum_pairs};

}  // namespace kvxfer::kernels::cpu::KVXFER_SIMD_NAMESPACE
