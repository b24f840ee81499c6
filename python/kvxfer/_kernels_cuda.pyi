# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

MAX_PARTS: int

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
    bases: int,
    num_layers: int,
    segments: int,
    num_segments: int,
    num_heads: int,
    access: int,
    max_ctas: int,
    from_dtype: int,
    to_dtype: int,
    stream: int,
) -> None: ...
def device_count() -> int: ...
