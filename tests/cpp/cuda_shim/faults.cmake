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
  "(length + p.num_splits - 1) / p.num_splits" "length / p.num_splits / 2" "${decode}")
fault(decode_reads_a_group_that_was_not_copied cuda/decode.cuh cuda/decode_float16_64.cu
  "Shape::kGroups == 1 || inner ||" "true ||" "${decode}")
fault(decode_missing_barrier_in_the_merge cuda/decode.cuh cuda/decode_float16_64.cu
  "    __syncthreads();\n    for (int at" "    for (int at" "${decode}")
