# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def append_kv(
    key: npt.NDArray[Any],
    value: npt.NDArray[Any],
    k_cache: npt.NDArray[Any],
    v_cache: npt.NDArray[Any],
    slot_mapping: npt.NDArray[Any],
    *,
    k_scale: float,
    v_scale: float,
    k_scale_cache: npt.NDArray[Any] | None,
    v_scale_cache: npt.NDArray[Any] | None,
    bytes_are: int,
) -> None: ...

class AppendAgain:
    def __init__(
        self,
        key: npt.NDArray[Any],
        value: npt.NDArray[Any],
        k_cache: npt.NDArray[Any],
        v_cache: npt.NDArray[Any],
        slot_mapping: npt.NDArray[Any],
        *,
        k_scale: float,
        v_scale: float,
        bytes_are: int,
    ) -> None: ...
    def __call__(
        self, key: int, value: int, k_cache: int, v_cache: int, slot_mapping: int
    ) -> None: ...

def paged_decode(
    q: npt.NDArray[Any],
    k_cache: npt.NDArray[Any],
    v_cache: npt.NDArray[Any],
    block_table: npt.NDArray[Any],
    seq_lens: npt.NDArray[Any],
    out: npt.NDArray[Any],
    lse: npt.NDArray[Any] | None,
    *,
    sm_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: npt.NDArray[Any] | None,
    k_scale_cache: npt.NDArray[Any] | None,
    v_scale_cache: npt.NDArray[Any] | None,
    bytes_are: int,
    split_size: int,
) -> None: ...
def paged_prefill(
    q: npt.NDArray[Any],
    k_cache: npt.NDArray[Any],
    v_cache: npt.NDArray[Any],
    cu_seqlens_q: npt.NDArray[Any],
    block_table: npt.NDArray[Any],
    seq_lens: npt.NDArray[Any],
    out: npt.NDArray[Any],
    lse: npt.NDArray[Any] | None,
    *,
    causal: bool,
    sm_scale: float,
    v_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: npt.NDArray[Any] | None,
    k_scale_cache: npt.NDArray[Any] | None,
    v_scale_cache: npt.NDArray[Any] | None,
    bytes_are: int,
) -> None: ...
def merge_states(
    v_a: npt.NDArray[Any],
    lse_a: npt.NDArray[Any],
    v_b: npt.NDArray[Any],
    lse_b: npt.NDArray[Any],
    out: npt.NDArray[Any],
    lse: npt.NDArray[Any],
) -> None: ...
def address_of(array: npt.NDArray[Any]) -> int: ...

# NotImplemented where torch has no DLPack table.
def tensor_facts(tensors: tuple[object, ...]) -> tuple[bytes, tuple[int, ...]] | None: ...
def host_arrays(src: object, dst: object) -> tuple[int, int, int, int, int] | None: ...
def cut_segments(
    src_blocks: npt.NDArray[np.int64],
    dst_blocks: npt.NDArray[np.int64],
    src_extent: tuple[int, int],
    dst_extent: tuple[int, int],
    tokens: tuple[int, int, int, int],
    apart: bool,
) -> npt.NDArray[np.int64]: ...

class CopyPart:
    def __init__(
        self,
        *,
        bases: npt.NDArray[np.int64],
        width: int,
        row_bytes: int,
        src_strides: Sequence[int],
        dst_strides: Sequence[int],
        src_dtype: int,
        dst_dtype: int,
        factors: npt.NDArray[np.float32] | None,
    ) -> None: ...

class CopyRows:
    def __init__(
        self,
        parts: Sequence[CopyPart],
        *,
        num_heads: int,
        src_extent: Sequence[int],
        dst_extent: Sequence[int],
    ) -> None: ...
    def __call__(
        self,
        src_pieces: Sequence[int],
        dst_pieces: Sequence[int],
        src_blocks: npt.NDArray[np.int64],
        dst_blocks: npt.NDArray[np.int64],
        tokens: Sequence[int],
        apart: bool,
    ) -> None: ...
    def whole(
        self,
        src: int,
        src_nbytes: int,
        dst: int,
        dst_nbytes: int,
        src_blocks: object,
        dst_blocks: object,
    ) -> bool: ...

def checksum_rows(
    bases: npt.NDArray[np.int64],
    layers: npt.NDArray[np.int64],
    block_ids: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint32],
    sums: npt.NDArray[np.uint64],
    *,
    part_id: int,
    row_bytes: int,
    strides: Sequence[int],
    extent: Sequence[int],
    tokens: Sequence[int],
    heads: Sequence[int],
) -> None: ...
def read_blocks(
    arrays: Sequence[npt.NDArray[Any]], offsets: npt.NDArray[np.int64], nbytes: int
) -> int: ...
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def set_isa(name: str) -> None: ...
def build_info() -> dict[str, Any]: ...
