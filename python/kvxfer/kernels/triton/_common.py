# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: where they can run, device-side helpers, the check of device-side ids."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels.triton._numbers import INTERPRETED

__all__ = [
    "INTERPRETED",
    "LOG2E",
    "check_block_table",
    "check_slots",
    "ids_are_checked",
    "need_tensors",
    "on_device_of",
    "padded_width",
    "scale_arguments",
    "soft_cap",
    "softmax_step",
    "tensors_of",
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


@triton.jit  # type: ignore[untyped-decorator]
def softmax_step(logits, highest, total, factor, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of an online softmax, in base 2: ``(weights, fade of what came before, total, highest)``.

    With FOLD the logits still lack ``factor`` > 0: a maximum does not mind, and in the exponent it is part of
    one fused multiply-add.
    """
    if FOLD:
        raised = tl.maximum(highest, tl.max(logits, 1) * factor)
        weights = tl.exp2(logits * factor - raised[:, None])
    else:
        raised = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - raised[:, None])
    fade = tl.exp2(highest - raised)
    return weights, fade, total * fade + tl.sum(weights, 1), raised


def scale_arguments(
    k_scales: torch.Tensor | None, v_scales: torch.Tensor | None, instead: torch.Tensor
) -> tuple[Any, ...]:
    """Both scale caches and their strides, or what stands for them where there are none."""
    if k_scales is None or v_scales is None:
        return instead, instead, 0, 0, 0, 0, 0, 0
    return k_scales, v_scales, *k_scales.stride(), *v_scales.stride()


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


def tensors_of(pieces: tuple[Any, ...]) -> list[torch.Tensor]:
    """The memory of a job, which comes as NumPy arrays where it is on the host."""
    found = []
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            # torch has no read-only tensors and warns; a source that may not be written is copied.
            piece = torch.from_numpy(piece if piece.flags.writeable else piece.copy())
        found.append(piece)
    return found


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
    """Refuse a table that lacks a block of keys ``[first_keys, seq_lens)``, or names none that exists.

    For callers that asked ``ids_are_checked``, since building ``first_keys`` would be a launch of its own.
    """
    if not block_table.shape[0]:
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
