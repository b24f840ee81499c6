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
  "tile.scales[head[i] * 2]" "tile.scales[0]" "${cache}")
fault(copy_32_bit_offsets index_math.hpp cuda/copy.cu
  "return block * strides.block +" "return static_cast<int32_t>(block * strides.block) +" "${cache}")
fault(append_writes_skipped_tokens cuda/append.cu cuda/append.cu
  "if (slot < 0) return;" "" "${cache}")
fault(append_scale_of_the_keys_for_values cuda/append.cu cuda/append.cu
  "divider_of(part.scale," "divider_of(p.part[0].scale," "${cache}")
fault(append_wrong_head cuda/append.cu cuda/append.cu
  "walk.head * part.to.head + walk.vector" "walk.vector" "${cache}")
fault(append_multiplies_by_the_scale cuda/append.cu cuda/append.cu
  "divide(widen(from[i].value[j]), by)" "widen(from[i].value[j]) * by.divisor" "${cache}")
fault(append_converts_one_vector_less cuda/append.cu cuda/append.cu
  "part.width / kCount, lane" "part.width / kCount - (kCount > 1), lane" "${cache}")
fault(quantise_by_the_source_scale_alone cuda/copy_converted.cuh cuda/copy_from_bfloat16.cu
  "tile.scales[head[i] * 2 + 1]" "tile.scales[head[i] * 2]" "${cache}")
fault(quantise_elements_in_another_order cuda/copy_converted.cuh cuda/copy_from_float32.cu
  "divide(__fmul_rn(widen(from[i].value[j])" "divide(__fmul_rn(widen(from[i].value[kCount - 1 - j])"
  "${cache}")
fault(dequantise_by_the_scale_of_the_destination cuda/copy_converted.cuh cuda/copy_from_float8.cu
  "tile.scales[head[i] * 2];" "tile.scales[head[i] * 2 + 1];" "${cache}")

set(decode "decode*")
fault(decode_missing_wait cuda/decode.cuh cuda/decode_float16_64.cu
  "cp_async_wait<Shape::kStages - 2>();" "" "${decode}")
fault(decode_off_by_one_page cuda/decode.cuh cuda/decode_float16_64.cu
  "table_[p_.by_block_size.quotient(mine)]" "table_[p_.by_block_size.quotient(mine + 1)]" "${decode}")
fault(decode_wrong_head_mapping cuda/decode_work.cuh cuda/decode_float16_64.cu
  "w.first_head = w.kv_head * group +" "w.first_head = w.kv_head +" "${decode}")
fault(decode_missing_mask cuda/decode.cuh cuda/decode_float16_64.cu
  "if (!inner && !wanted(" "if (inner && !wanted(" "${decode}")
fault(decode_copies_too_much_of_an_edge_tile cuda/decode.cuh cuda/decode_float16_64.cu
  "kAll || wanted(token + row)" "true" "${decode}")
fault(decode_split_sizes_that_leave_keys_out cuda/decode_work.cuh cuda/decode_float16_64.cu
  "(length + p.num_splits - 1) / p.num_splits" "length / p.num_splits / 2" "decode: splits of a size*")
fault(decode_reads_a_group_that_was_not_copied cuda/decode.cuh cuda/decode_float16_64.cu
  "Shape::kGroups == 1 || inner ||" "true ||" "${decode}")
fault(decode_missing_barrier_in_the_merge cuda/decode.cuh cuda/decode_float16_64.cu
  "    __syncthreads();\n    for (int at" "    for (int at" "${decode}")
fault(decode_fp8_missing_warp_barrier cuda/decode.cuh cuda/decode_float8_128.cu
  "      __syncwarp();\n" "" "${decode}")
fault(decode_fills_a_stage_in_use cuda/decode.cuh cuda/decode_float16_128.cu
  "free_stage = Shape::kStages - 1;" "free_stage = 0;" "decode: a split so long*")
fault(decode_queries_not_awaited cuda/decode.cuh cuda/decode_float16_256.cu
  "      __syncthreads();\n    } else {" "    } else {" "${decode}")
fault(decode_one_page_for_all_rows cuda/decode.cuh cuda/decode_float16_256.cu
  "kWholePages ? 0 : lane_ % kDecodeRows" "0" "${decode}")

fault(decode_bfloat16_weights_change_places cuda/decode_work.cuh cuda/decode_bfloat16_64.cu
  "__floats2bfloat162_rn(low, high)" "__floats2bfloat162_rn(high, low)" "${decode}")
fault(decode_dropped_sink cuda/decode_work.cuh cuda/decode_bfloat16_64.cu
  "total * fade + exp2_fast(sink - raised)" "total * fade" "decode: window*")
fault(decode_splits_without_their_sums cuda/decode.cuh cuda/decode_bfloat16_128.cu
  "= highest + log2f(total);" "= highest;" "${decode}")
fault(decode_sum_does_not_fade cuda/decode.cuh cuda/decode_bfloat16_128.cu
  "total_[half] *= fade[half];" "" "${decode}")
fault(decode_maximum_of_half_a_row cuda/decode.cuh cuda/decode_bfloat16_256.cu
  "raised[half] = fmaxf(raised[half], __shfl_xor_sync(~0u, raised[half], 2));" "" "${decode}")
fault(decode_lse_in_base_2 cuda/decode_work.cuh cuda/decode_bfloat16_256.cu
  "(highest + log2f(total)) * kLn2" "highest + log2f(total)" "${decode}")

fault(decode_fp8_without_the_scale_of_values cuda/decode_work.cuh cuda/decode_float8_64.cu
  "value / total * p.v_scale" "value / total" "decode: window*")
fault(decode_fp8_odd_channels_for_even cuda/decode.cuh cuda/decode_float8_64.cu
  "odd ? 0x4431 : 0x4420" "odd ? 0x4420 : 0x4431" "${decode}")
fault(decode_fp8_queries_overflow cuda/decode.cuh cuda/decode_float8_64.cu
  "fminf(fmaxf(low, -65504.0f), 65504.0f)" "low" "decode: bfloat16 queries*")
fault(decode_fp8_missing_wait cuda/decode.cuh cuda/decode_float8_128.cu
  "cp_async_wait<Shape::kStages - 2>();" "cp_async_wait<Shape::kStages - 1>();" "${decode}")
fault(decode_fp8_queries_of_another_lane cuda/decode.cuh cuda/decode_float8_128.cu
  "from + lane_ % 4 * 16" "from + (lane_ + 1) % 4 * 16" "${decode}")
fault(decode_fp8_same_half_twice cuda/decode.cuh cuda/decode_float8_256.cu
  "e4m3x2_to_half2(words[i] >> 16)" "e4m3x2_to_half2(words[i])" "${decode}")
fault(decode_fp8_bank_pattern_of_values cuda/decode.cuh cuda/decode_float8_256.cu
  "values + Shape::place(row, pair" "values + Shape::place(row ^ 1, pair" "${decode}")

set(merge "merge*")
fault(merge_drops_a_side_of_the_sum cuda/merge.cu cuda/merge.cu
  "total = weight_a + weight_b" "total = weight_a" "${merge}")
fault(merge_lse_without_its_maximum cuda/merge.cu cuda/merge.cu
  "logf(total) + finite" "logf(total)" "${merge}")
fault(merge_takes_what_was_never_written cuda/merge.cu cuda/merge.cu
  "weight_b > 0 ? widen(b[i]) * weight_b : 0.0f" "widen(b[i]) * weight_b" "${merge}")
fault(merge_leaves_the_tail_of_a_row cuda/merge.cu cuda/merge.cu
  "i < p.width; i += 32" "i < p.width / 32 * 32; i += 32" "${merge}")
fault(merge_reads_b_by_the_strides_of_a cuda/merge.cu cuda/merge.cu
  "row * p.lse_b_row + head * p.lse_b_head" "row * p.lse_a_row + head * p.lse_a_head" "${merge}")
fault(launch_on_the_default_stream cuda/device.cuh cuda/merge.cu
  "config.stream = stream;" "config.stream = stream ? nullptr : stream;" "${merge}")

set(checksum "checksum*")
fault(checksum_keys_not_awaited cuda/checksum.cu cuda/checksum.cu
  "hash_key(i);\n  __syncthreads();" "hash_key(i);" "${checksum}")
fault(checksum_warps_not_awaited cuda/checksum.cu cuda/checksum.cu
  "sums[warp] = sum;\n  __syncthreads();" "sums[warp] = sum;" "${checksum}")
fault(checksum_sum_of_half_the_lanes cuda/checksum.cu cuda/checksum.cu
  "mask = kLanes / 2;" "mask = kLanes / 4;" "${checksum}")
fault(checksum_leaves_the_tail_of_a_row cuda/checksum.cu cuda/checksum.cu
  "pair * 8 < nbytes" "pair * 8 + 8 <= nbytes" "${checksum}")
fault(checksum_of_rows_behind_the_last cuda/checksum.cu cuda/checksum.cu
  "turn == 0 && row < rows" "turn == 0" "${checksum}")
fault(checksum_token_of_the_block_for_that_of_the_sequence cuda/checksum.cu cuda/checksum.cu
  "segment[3] + token)" "token)" "${checksum}")
