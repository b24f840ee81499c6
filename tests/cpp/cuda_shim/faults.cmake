# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# The seeded faults: name, file, unit to compile, what is replaced, by what, the test cases to run.
set(cache "*copy*,*append*")
fault(copy_off_by_one_block cuda/copy_tile.cuh cuda/copy.cu
  "segment[0], segment[1], 0)" "segment[0] + 1, segment[1], 0)" "${cache}")
fault(copy_missing_mask cuda/copy.cu cuda/copy.cu
  "const bool inside = walk.token < tile.tokens;" "const bool inside = true;" "${cache}")
fault(copy_one_token_too_many cuda/copy_converted.cuh cuda/copy_from_float16.cu
  "walk.token < tile.tokens" "walk.token <= tile.tokens" "${cache}")
fault(copy_wrong_head_of_scales cuda/copy_converted.cuh cuda/copy_from_float8.cu
  "tile.scales[walk.head * 2]" "tile.scales[0]" "${cache}")
fault(copy_32_bit_offsets index_math.hpp cuda/copy.cu
  "return block * strides.block +" "return static_cast<int32_t>(block * strides.block) +" "${cache}")
fault(append_writes_skipped_tokens cuda/append.cu cuda/append.cu
  "if (slot < 0) return;" "" "${cache}")
fault(append_scale_of_the_keys_for_values cuda/append.cu cuda/append.cu
  "part.scale)" "p.part[0].scale)" "${cache}")
fault(append_wrong_head cuda/append.cu cuda/append.cu
  "walk.head * part.to.head + walk.vector * int64_t{to.kBytes}" "walk.vector * int64_t{to.kBytes}" "${cache}")

set(decode "decode*")
fault(decode_missing_wait cuda/decode.cuh cuda/decode_float16_64.cu
  "cp_async_wait<Shape::kStages - 2>();" "" "${decode}")
fault(decode_wait_one_short cuda/decode.cuh cuda/decode_float16_64.cu
  "cp_async_wait<Shape::kStages - 2>();" "cp_async_wait<Shape::kStages - 1>();" "${decode}")
fault(decode_missing_syncwarp cuda/decode.cuh cuda/decode_float8_64.cu
  "__syncwarp();" "" "${decode}")
fault(decode_stage_reused_too_early cuda/decode.cuh cuda/decode_float16_64.cu
  "free_stage = Shape::kStages - 1" "free_stage = 1" "${decode}")
fault(decode_off_by_one_page cuda/decode.cuh cuda/decode_float16_64.cu
  "table_[token / p_.block_size]" "table_[(token + 1) / p_.block_size]" "${decode}")
fault(decode_wrong_head_mapping cuda/decode.cuh cuda/decode_float16_64.cu
  "w.first_head = w.kv_head * group +" "w.first_head = w.kv_head +" "${decode}")
fault(decode_missing_mask cuda/decode.cuh cuda/decode_float16_64.cu
  "if (!inner && !wanted(" "if (inner && !wanted(" "${decode}")
fault(decode_unwanted_rows_are_read cuda/decode.cuh cuda/decode_float16_64.cu
  "v_ + v_row + chunk * 16, wanted(token + row)" "v_ + v_row + chunk * 16, true" "${decode}")
fault(decode_missing_barrier_before_the_merge cuda/decode.cuh cuda/decode_float16_64.cu
  "__syncthreads();  // the tiles are no longer needed" "" "${decode}")
fault(decode_missing_barrier_in_the_merge cuda/decode.cuh cuda/decode_float16_64.cu
  "    __syncthreads();\n    for (int at" "    for (int at" "${decode}")
fault(decode_wrong_swizzle cuda/decode.cuh cuda/decode_float16_64.cu
  "values + Shape::place(row, pair * 2 + lane_ / 16)"
  "values + row * Shape::kRowBytes + (pair * 2 + lane_ / 16) * 16" "${decode}")
fault(decode_window_off_by_one cuda/decode.cuh cuda/decode_float16_64.cu
  "window_begin(length - 1," "window_begin(length," "${decode}")
fault(decode_splits_from_zero cuda/decode.cuh cuda/decode_float16_64.cu
  "split = w_.first_split" "split = 0" "${decode}")
fault(decode_last_block_never_comes cuda/decode.cuh cuda/decode_float16_64.cu
  "*flag = before + 1 ==" "*flag = before + 2 ==" "${decode}")
fault(decode_counter_left_dirty cuda/decode.cuh cuda/decode_float16_64.cu
  "if (*flag) *arrived = 0;" "" "${decode}")
fault(decode_stale_maximum cuda/decode.cuh cuda/decode_float16_64.cu
  "raised[0] > highest_[0] ||" "" "${decode}")
fault(decode_sink_does_not_fade cuda/decode.cuh cuda/decode_float16_64.cu
  "value *= fade;" "" "${decode}")
fault(decode_fp8_channels_swapped cuda/decode.cuh cuda/decode_float8_64.cu
  "odd ? 0x4431 : 0x4420" "odd ? 0x4420 : 0x4431" "${decode}")
fault(decode_32_bit_offsets cuda/decode.cuh cuda/decode_float16_64.cu
  "block_ * p_.k_strides.block" "static_cast<int32_t>(block_ * p_.k_strides.block)" "${decode}")

fault(merge_reads_what_was_never_written cuda/merge.cu cuda/merge.cu
  "weight_a > 0 ? widen(a[i]) * weight_a : 0.0f" "widen(a[i]) * weight_a" "merge*")
fault(checksum_missing_barriers cuda/checksum.cu cuda/checksum.cu
  "__syncthreads();" "" "checksum*")
fault(checksum_blind_to_the_token cuda/checksum.cu cuda/checksum.cu
  "segment[3] + token" "segment[3]" "checksum*")
