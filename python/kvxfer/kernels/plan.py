# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which stretches of which sequences a decode step works on: settled on the host, once for all layers of a step."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.errors import InvalidArgumentError, UnavailableError
from kvxfer.kernels._arrays import Array, Operands, as_numpy, is_torch
from kvxfer.kernels._dispatch import get_num_threads
from kvxfer.kernels._numbers import MOST, flag, whole
from kvxfer.kernels._upload import upload

__all__ = ["DecodePlan", "check_plan", "plan_decode"]

TILE = 64  # tokens: what the CUDA kernel takes at once, so a split of any plan is a multiple of it
DEFAULT_SPLIT = 512  # of every backend, so that a plan changes no result unless it is asked to
# Measured on an H100 over all split sizes (docs/gpu.md): one full wave of thread blocks beats more and fewer.
FULL_WAVE = 0.97  # of what the device holds at once
ALIKE = 1.3  # longest over mean length, up to which sequences need no balance between them
ENOUGH = 0.42  # of a wave: so many unsplit thread blocks use all of the memory's bandwidth already
MOST_ITEMS = 2**24  # 256 sequences of four million tokens in the shortest splits; 128 MiB of items
MAX_BALANCED_SPLIT = 4096  # longer ones gain nothing, and one that starts late is waited for

# Thread blocks of the CUDA kernel that fit on one processor, by head_dim (its shared memory decides).
_CTAS_PER_SM = {64: 3, 128: 2, 256: 1}


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The work of one decode step, from :func:`plan_decode`, for ``paged_decode(plan=)``.

    Attributes:
        seq_lens: the lengths it was made for; others need another plan.
        split_size: tokens per partial sum, a multiple of 64. Splits are counted from token 0.
        num_splits: one more than the last split of any sequence.
        items: ``[num_items, 2]`` int32, (sequence, split): each split that holds a visible token, and the first
            one of an empty sequence. A NumPy array on the host, a torch tensor on a device.
    """

    seq_lens: tuple[int, ...] = field(repr=False)
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window_left: int
    split_size: int
    num_splits: int
    items: Array = field(repr=False)
    device: str

    @property
    def num_items(self) -> int:
        return int(self.items.shape[0])


def plan_decode(
    seq_lens: Array | Sequence[int],
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    split_size: int | None = None,
    window_left: int = -1,
    balanced: bool = False,
    num_sms: int | None = None,
    ctas_per_sm: int | None = None,
    device: Any = "cpu",
) -> DecodePlan:
    """Divide a decode step into splits, from lengths that the host knows.

    Without a plan a GPU launches a grid for the longest sequence that the block table could hold; with one, just
    the splits that there are, the full ones first.

    Args:
        seq_lens: ``[batch]``, on the host (reading them from a device would wait for it).
        num_q_heads, num_kv_heads, head_dim, block_size, window_left: as the calls will have them.
        split_size: tokens per partial sum, rounded up to a multiple of 64. None: 512, so that results do not
            depend on the batch; or what ``balanced`` finds.
        balanced: choose the split length for this batch and machine instead, so that all splits together are about
            as many as the thread blocks that the device holds at once, none longer than 4096 tokens (5120 where a
            short rest is shared out); sequences of like lengths, enough to use the memory's bandwidth, stay whole up
            to there. Results then depend on the batch in their last bits.
        num_sms, ctas_per_sm: for ``balanced``: processors, and thread blocks on each at a time. None: those of
            ``device``, and what the CUDA kernel reaches at this ``head_dim``; on the host threads, and one.
        device: where ``items`` goes: ``"cpu"``, or what torch calls a device.
    Raises:
        InvalidArgumentError: a number out of range; lengths on a device; more than 2^24 splits.
        UnavailableError: ``device`` is not here.
    Source: FlashDecoding.
    """
    lens = _host_lens(seq_lens)
    sizes = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
    }
    for name, size in sizes.items():
        sizes[name] = whole(name, size, 1, MOST, expected="> 0")
    num_q_heads, num_kv_heads, head_dim, block_size = sizes.values()
    if num_q_heads % num_kv_heads:
        raise InvalidArgumentError(
            f"num_q_heads: expected a multiple of num_kv_heads {num_kv_heads}, given {num_q_heads}"
        )
    window_left = min(whole("window_left", window_left, -1), MOST)
    if split_size is not None:
        split_size = whole("split_size", split_size, 1, MOST, expected="> 0 or None")
        if flag("balanced", balanced):
            raise InvalidArgumentError(
                f"split_size: expected None, since balanced chooses it, given {split_size}"
            )
    if num_sms is not None:
        num_sms = whole("num_sms", num_sms, 1, MOST, expected="> 0 or None")
    if ctas_per_sm is not None:
        ctas_per_sm = whole("ctas_per_sm", ctas_per_sm, 1, MOST, expected="> 0 or None")
    device = _known_device(device)
    first = np.maximum(lens - 1 - window_left, 0) if window_left >= 0 else np.zeros_like(lens)
    if flag("balanced", balanced):
        on_gpu = device.startswith("cuda")
        wave = (num_sms or _processors(device, on_gpu)) * (
            ctas_per_sm or (_CTAS_PER_SM.get(head_dim, 1) if on_gpu else 1)
        )
        tiles = -(-(num_q_heads // num_kv_heads) // 16)
        split = _balanced_split(lens, first, num_kv_heads * tiles, wave)
    else:
        split = _round_up(split_size or DEFAULT_SPLIT, TILE)
    items = _items(lens, first, split)
    return DecodePlan(
        seq_lens=tuple(lens.tolist()),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        window_left=window_left,
        split_size=int(split),
        num_splits=int(items[:, 1].max(initial=0)) + 1,
        items=_on_device(items, device),
        device=device,
    )


def check_plan(plan: DecodePlan, call: Operands, window_left: int, split_size: int | None) -> None:
    """Refuse a plan that was made for another call; lengths are compared where they are on the host."""
    if not isinstance(plan, DecodePlan):
        raise InvalidArgumentError(
            f"plan: expected what plan_decode returns, given {type(plan).__name__}"
        )
    if split_size is not None:
        raise InvalidArgumentError(
            f"split_size: expected None, since the plan has {plan.split_size}, given {split_size}"
        )
    batch, num_q_heads, head_dim = call.views["q"].shape
    _, block_size, num_kv_heads, _ = call.views["k_cache"].shape
    here = {
        "batch": (len(plan.seq_lens), batch),
        "num_q_heads": (plan.num_q_heads, num_q_heads),
        "num_kv_heads": (plan.num_kv_heads, num_kv_heads),
        "head_dim": (plan.head_dim, head_dim),
        "block_size": (plan.block_size, block_size),
        "window_left": (plan.window_left, window_left),
        "device": (_plain_device(plan.device), _plain_device(call.device)),
    }
    for name, (planned, given) in here.items():
        if planned != given:
            raise InvalidArgumentError(
                f"plan: expected one for this call, whose {name} is {given}, given one for {planned}"
            )
    if call.device == "cpu":
        lens = np.asarray(call.views["seq_lens"])
        wrong = lens != np.asarray(plan.seq_lens, lens.dtype)
        if wrong.any():
            at = int(wrong.argmax())
            raise InvalidArgumentError(
                f"plan: expected one for these seq_lens, of which number {at} is {int(lens[at])}, given one for "
                f"{plan.seq_lens[at]}"
            )


def _plain_device(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _host_lens(seq_lens: Array | Sequence[int]) -> npt.NDArray[np.int64]:
    if is_torch(seq_lens):
        if not seq_lens.is_cpu:  # type: ignore[union-attr]
            raise InvalidArgumentError(
                f"seq_lens: expected lengths on the host, given a tensor on {seq_lens.device}"  # type: ignore[union-attr]
            )
        seq_lens = as_numpy(seq_lens)
    try:
        lens = np.asarray(seq_lens)
    except ValueError as error:  # lists of unequal lengths
        raise InvalidArgumentError(f"seq_lens: expected a list of lengths: {error}") from error
    if lens.size == 0:
        return np.zeros(0, np.int64)
    if lens.ndim != 1 or lens.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"seq_lens: expected a list of lengths, given shape {list(lens.shape)}, dtype {lens.dtype}"
        )
    wrong = (lens < 0) | (lens > MOST)
    if wrong.any():
        at = int(wrong.argmax())
        expected = ">= 0" if lens[at] < 0 else f"at most {MOST}"
        raise InvalidArgumentError(f"seq_lens[{at}]: expected {expected}, given {int(lens[at])}")
    return lens.astype(np.int64)


def _known_device(device: Any) -> str:
    """The device's full name; refuses what torch does not know, and a GPU that is not here."""
    if str(device) == "cpu":
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is None:
        raise InvalidArgumentError(
            f"device: expected 'cpu', or torch to be imported, given {device!r}"
        )
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(
            f"device: expected 'cpu' or what torch calls a device, given {device!r}"
        ) from error
    return _reached(str(known))


@cache
def _reached(device: str) -> str:
    """The device, once something could be allocated there."""
    try:
        sys.modules["torch"].empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # not built for it; no such one
        reason = str(error).partition("\n")[0]
        raise UnavailableError(f"plan_decode: no device {device!r}: {reason}", reason=reason) from error  # fmt: skip
    return device


def _processors(device: str, on_gpu: bool) -> int:
    if not on_gpu:
        return get_num_threads()
    return int(sys.modules["torch"].cuda.get_device_properties(device).multi_processor_count)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _split_range(
    lens: npt.NDArray[np.int64], first: npt.NDArray[np.int64], split: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each sequence the first split that holds a visible token, and how many (an empty one: 1) there are."""
    begin = first // split
    return begin, np.maximum(-(-lens // split) - begin, 1)


def _balanced_split(
    lens: npt.NDArray[np.int64], first: npt.NDArray[np.int64], ctas_per_item: int, wave: int
) -> int:
    visible = lens - first
    longest, units = int(visible.max(initial=1)), len(lens) * ctas_per_item
    split = int(visible.sum()) * ctas_per_item / (FULL_WAVE * wave)
    if units >= ENOUGH * wave and longest <= ALIKE * visible.mean():
        split = longest
    split = min(max(split, TILE), MAX_BALANCED_SPLIT)
    # A short rest is shared out: equal splits end together.
    count = max(math.ceil(longest / split - 0.25), 1)
    return _round_up(math.ceil(longest / count), TILE)


def _items(
    lens: npt.NDArray[np.int64], first: npt.NDArray[np.int64], split: int
) -> npt.NDArray[np.int32]:
    begin, count = _split_range(lens, first, split)
    if count.sum() > MOST_ITEMS:
        raise InvalidArgumentError(
            f"seq_lens: expected at most {MOST_ITEMS} splits, given {int(count.sum())} of {split} tokens; "
            "take a longer split_size"
        )
    sequence = np.repeat(np.arange(len(lens)), count)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count) + begin[sequence]
    tokens = np.minimum(lens[sequence], (index + 1) * split) - np.maximum(first[sequence], index * split)  # fmt: skip
    longest_first = np.argsort(-tokens, kind="stable")
    items: npt.NDArray[np.int32] = np.stack([sequence, index], axis=1)[longest_first].astype(np.int32)  # fmt: skip
    return items


def _on_device(items: npt.NDArray[np.int32], device: str) -> Array:
    if device == "cpu":
        return items
    return upload(sys.modules["torch"].from_numpy(items), device)
