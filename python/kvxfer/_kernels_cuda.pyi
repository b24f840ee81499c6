# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

MAX_PARTS: int
DECODE_TILE: int
INLINE_TABLES: int  # bytes

class AppendPart:
    def __init__(
        self,
        rows: int,
        cache: int,
        from_strides: Sequence[int],
        to_strides: Sequence[int],
        width: int,
        scale: float,
    ) -> None: ...

class CopyPart:
    def __init__(
        self, src_strides: Sequence[int], dst_strides: Sequence[int], width: int
    ) -> None: ...

def append_kv(
    key: AppendPart,
    value: AppendPart,
    *,
    slots: int,
    num_tokens: int,
    num_kv_heads: int,
    block_size: int,
    from_dtype: int,
    to_dtype: int,
    stream: int,
) -> None: ...
def copy_rows(
    parts: Sequence[CopyPart],
    *,
    tables: bytes,
    at: int,
    num_layers: int,
    num_segments: int,
    num_heads: int,
    access: int,
    max_ctas: int,
    convert: bool,
    scaled: bool,
    from_dtype: int,
    to_dtype: int,
    stream: int,
) -> None: ...

class Decode:
    q: int
    out: int
    lse: int
    k: int
    v: int
    k_strides: Sequence[int]
    v_strides: Sequence[int]
    block_table: int
    seq_lens: int
    sinks: int
    items: int
    partial: int
    partial_lse: int
    arrived: int
    q_batch: int
    q_head: int
    out_batch: int
    out_head: int
    table_row: int
    len_step: int
    num_items: int
    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_splits: int
    split_size: int
    min_split: int
    window_left: int
    sm_scale: float
    v_scale: float
    soft_cap: float
    q_type: int
    kv_type: int

def paged_decode(params: Decode, stream: int) -> None: ...
def decode_refuses(params: Decode) -> str | None: ...
def decode_slots(params: Decode) -> int: ...
def capture_id(stream: int) -> int: ...

class Merge:
    v_a: int
    v_b: int
    lse_a: int
    lse_b: int
    out: int
    lse: int
    a_row: int
    a_head: int
    b_row: int
    b_head: int
    lse_a_row: int
    lse_a_head: int
    lse_b_row: int
    lse_b_head: int
    num_rows: int
    num_heads: int
    width: int
    type: int

def merge_states(params: Merge, stream: int) -> None: ...
def checksum_blocks(
    parts: Sequence[tuple[Sequence[int], int, int]],
    *,
    bases: int,
    layers: int,
    num_layers: int,
    segments: int,
    num_segments: int,
    first_head: int,
    num_heads: int,
    sums: int,
    stream: int,
) -> None: ...
def device_count() -> int: ...
def reach_peer(device: int, peer: int) -> None: ...
