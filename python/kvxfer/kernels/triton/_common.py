# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: where they can run, device-side helpers, the check of device-side ids."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from kvxfer.errors import InvalidArgumentError

__all__ = [
    "INTERPRETED",
    "LOG2E",
    "check_block_table",
    "check_slots",
    "dot_in_float32",
    "ids_are_checked",
    "narrow",
    "need_tensors",
    "on_device_of",
    "padded_width",
    "soft_cap",
    "unavailable",
]

LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 256


@triton.jit
def soft_cap(logits, cap):  # type: ignore[no-untyped-def]
    """``cap * tanh(logits / cap)``; tanh by exp2, because libdevice is not there under the interpreter."""
    # 64 is far past where tanh is 1 in float32, and keeps exp2 finite.
    doubled = tl.minimum(logits / cap * (2 * LOG2E), 64.0)
    return cap * (1.0 - 2.0 / (tl.exp2(doubled) + 1.0))


# TRITON_INTERPRET decides at decoration, so this says how the kernels of this process were made.
INTERPRETED: bool = type(soft_cap).__name__ == "InterpretedFunction"
ROUND_BY_BITS = tl.constexpr(INTERPRETED)


@triton.jit  # type: ignore[untyped-decorator]
def narrow(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """``values`` as ``dtype``, to nearest even; the interpreter would cut float32 off to bfloat16."""
    if ROUND_BY_BITS and dtype == tl.bfloat16:
        wide = values.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(wide == wide, rounded, (bits >> 16) | 0x40)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


def unavailable(op: str, device: str) -> str | None:
    """Why ``op`` cannot run on ``device`` here, or None."""
    if device.startswith("cuda"):
        return None if torch.cuda.is_available() else "torch finds no CUDA device on this machine"
    if device != "cpu":
        return f"the Triton kernels are written for CUDA devices, not for {device}"
    if not INTERPRETED:
        return (
            "on host tensors Triton runs only under its interpreter (TRITON_INTERPRET=1 at start)"
        )
    return None


def describe() -> str:
    return f"Triton {triton.__version__}" + (", interpreted (for tests)" if INTERPRETED else "")


def need_tensors(name: str, array: Any) -> None:
    """Arguments of one call are of one library, so looking at one is enough."""
    if not isinstance(array, torch.Tensor):
        raise InvalidArgumentError(
            f"{name}: the triton backend takes torch tensors, given {type(array).__name__}"
        )


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current device: make it the tensors' own."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def padded_width(name: str, width: int) -> int:
    """The power of two, at least 16 (the smallest tile of a dot), that holds ``width`` channels."""
    if width > MAX_HEAD_DIM:
        raise InvalidArgumentError(
            f"{name}: the Triton attention kernels take at most {MAX_HEAD_DIM} channels, given {width}"
        )
    return max(16, 1 << (width - 1).bit_length())


def dot_in_float32(q: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether operands are widened before a dot: for float32, for mixed dtypes, and where bf16 is wrong."""
    if q.dtype != cache.dtype or q.dtype == torch.float32:
        return True
    # The interpreter multiplies the bit patterns of bfloat16 as if they were integers.
    return INTERPRETED and q.dtype == torch.bfloat16


def ids_are_checked(tensor: torch.Tensor) -> bool:
    """Host ids always; device ids only when asked, because looking at them waits for the device."""
    return not tensor.is_cuda or os.environ.get("KVXFER_CHECK_DEVICE_IDS") == "1"


def check_slots(slot_mapping: torch.Tensor, num_blocks: int, block_size: int) -> None:
    """Refuse a slot that no block has."""
    if not ids_are_checked(slot_mapping):
        return
    wrong = (slot_mapping < -1) | (slot_mapping >= num_blocks * block_size)
    if bool(wrong.any()):
        index = int(wrong.int().argmax())
        raise InvalidArgumentError(
            f"slot_mapping[{index}]: expected -1 or a slot from 0 to {num_blocks * block_size - 1} "
            f"({num_blocks} blocks of {block_size}), given {int(slot_mapping[index])}"
        )


def check_block_table(
    block_table: torch.Tensor,
    first_keys: torch.Tensor,
    seq_lens: torch.Tensor,
    num_blocks: int,
    block_size: int,
) -> None:
    """Refuse a table that lacks a block of keys ``[first_keys, seq_lens)``, or names none that exists."""
    if not ids_are_checked(block_table) or not block_table.shape[0]:
        return
    longest, sequence = (int(x) for x in seq_lens.max(dim=0))
    needed = -(-longest // block_size)
    if needed > block_table.shape[1]:
        raise InvalidArgumentError(
            f"block_table: expected at least {needed} blocks of {block_size} for the {longest} tokens of "
            f"sequence {sequence}, given {block_table.shape[1]}"
        )
    column = torch.arange(block_table.shape[1], device=block_table.device)[None, :]
    used = column >= (first_keys.clamp(min=0) // block_size)[:, None]
    used &= column < ((seq_lens + block_size - 1) // block_size)[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_blocks))
    if bool(wrong.any()):
        row, at = (int(x) for x in wrong.nonzero()[0])
        raise InvalidArgumentError(
            f"block_table[{row}, {at}]: expected a block id from 0 to {num_blocks - 1}, "
            f"given {int(block_table[row, at])}"
        )
