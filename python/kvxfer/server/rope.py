# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies and the cos/sin table, float32 and in transformers' order of operations.

The order matters: a frequency off by one bit turns by a whole digit at position 100,000.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvxfer.server.config import ModelConfig, RopeConfig

__all__ = ["RopeTable", "rope_frequencies", "rotate"]


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """``inv_freq`` [head_dim / 2] and the factor that cos and sin are multiplied with."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    inv_freq = 1.0 / wavelengths
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, wavelengths, head_dim), _yarn_attention_factor(rope)
    return inv_freq, 1.0


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a ramp between. Source: Llama 3.1."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    original = rope.original_max_position_embeddings
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > original / low, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelen - low) / (high - low)
    ramped = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelen < original / high) * ~(wavelen > original / low)
    return torch.where(between, ramped, scaled)


def _yarn(rope: RopeConfig, wavelengths: Tensor, dim: int) -> Tensor:
    """Source: YaRN (Peng et al., 2023)."""

    def dim_turning(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = dim_turning(rope.beta_fast), dim_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    interpolated = 1.0 / (rope.factor * wavelengths)
    return interpolated * (1 - keep) + (1.0 / wavelengths) * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


class RopeTable:
    """cos and sin by position, grown by doubling to the longest position asked for.

    A table because a decode step would otherwise spend more time on launching cos and sin than on
    computing them; not filled to the model's limit because that is 130 MB for 131,072 positions.
    """

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype) -> None:
        self._inv_freq, self._scale = rope_frequencies(cfg.rope, cfg.head_dim)
        self._dtype = dtype
        self._length = 0
        self._grow(1024)

    def _grow(self, length: int) -> None:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self._inv_freq
        cos, sin = (angles.cos() * self._scale), (angles.sin() * self._scale)
        self._cos = torch.cat((cos, cos), dim=-1).to(self._dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(self._dtype)
        self._length = length

    def lookup(self, positions: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """For int64 ``positions``, none above ``last``: what ``rotate`` takes, each [tokens, 1, head_dim]."""
        if last >= self._length:
            self._grow(1 << last.bit_length())
        cos = self._cos.index_select(0, positions)
        return cos.unsqueeze(1), self._sin.index_select(0, positions).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn heads ``x`` [tokens, heads, head_dim]: ``x * cos + rotate_half(x) * sin``, bit for bit.

    rotate_half is a roll by half a head when the first half of sin carries the minus sign. Not addcmul:
    it fuses the multiply and the add, and then differs in the last bit.
    """
    rolled = torch.roll(x, x.shape[-1] // 2, -1)
    return (x * cos).add_(rolled.mul_(signed_sin))
