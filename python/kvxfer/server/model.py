# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The decoder of the Llama, Qwen2, Qwen3 and Mistral families over a paged KV cache.

One forward pass takes a ragged batch: rows of all sequences one after another, prefill chunks and decode
tokens alike. float32 follows transformers' order of operations, so that greedy tokens agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvxfer import kernels
from kvxfer.server.config import ModelConfig
from kvxfer.server.rope import RopeTable, rotate

__all__ = ["CausalLM", "StepInputs"]


@dataclass(frozen=True)
class StepInputs:
    """One ragged batch as tensors. ``rows`` count tokens to compute, ``sequences`` the batch's members."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64
    last_position: int
    slot_mapping: Tensor  # [rows] int64
    cu_seqlens_q: Tensor  # [sequences + 1] int32
    block_table: Tensor  # [sequences, blocks] int32, -1 padded
    seq_lens: Tensor  # [sequences] int32, context with this step's rows
    decode_only: bool  # each sequence has one row
    # Sequences whose last row is sampled. None for all when ``decode_only``.
    sampled_rows: Tensor | None  # [sampled] int64
    sampled_block_table: Tensor
    sampled_seq_lens: Tensor


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    qkv: Tensor  # query, key and value projections stacked: one product in place of three
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [query and key heads, head_dim]
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    window_left: int


class CausalLM:
    """Weights and forward pass. Holds no cache; not thread-safe (its rope table grows)."""

    def __init__(self, cfg: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Takes the tensors out of ``weights``, so that stacked copies do not double the memory."""
        self.cfg = cfg
        self.dtype = dtype
        self._embedding = weights.pop("model.embed_tokens.weight")
        self._layers = [_take_layer(cfg, weights, layer) for layer in range(cfg.num_layers)]
        self._norm = weights.pop("model.norm.weight")
        self._head = self._embedding if cfg.tie_word_embeddings else weights.pop("lm_head.weight")
        self._rope = RopeTable(cfg, dtype)
        self._scale = cfg.head_dim**-0.5

    @torch.inference_mode()
    def forward(
        self,
        inputs: StepInputs,
        cache: Sequence[kernels.BoundCache],
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Appends the rows' KV to ``cache`` and returns float32 logits [sampled, vocab].

        ``on_layer(layer)`` is called as soon as that layer's KV of all rows is in the cache.
        """
        cfg = self.cfg
        num_rows = inputs.token_ids.shape[0]
        num_q, num_rotated = cfg.num_heads, cfg.num_heads + cfg.num_kv_heads
        cos, sin = self._rope.lookup(inputs.positions, inputs.last_position)
        hidden = self._embedding.index_select(0, inputs.token_ids)
        final = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            normed = self._rms_norm(hidden, layer.input_norm)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(num_rows, -1, cfg.head_dim)
            qk = qkv[:, :num_rotated]
            if layer.qk_norm is not None:
                qk = torch.rms_norm(qk, (cfg.head_dim,), None, cfg.rms_norm_eps) * layer.qk_norm
            qk = rotate(qk, cos, sin)
            q = qk[:, :num_q]
            cache[index].append(qk[:, num_q:], qkv[:, num_rotated:], inputs.slot_mapping)
            if on_layer is not None:
                on_layer(index)
            if index == final and inputs.sampled_rows is not None:
                # Nothing but the cache depends on the last layer's other rows.
                if inputs.sampled_rows.shape[0] == 0:
                    return torch.empty(0, cfg.vocab_size)
                q = q.index_select(0, inputs.sampled_rows)
                hidden = hidden.index_select(0, inputs.sampled_rows)
            attended = self._attend(q, cache[index], inputs, layer.window_left, index == final)
            hidden.add_(F.linear(attended.flatten(1), layer.o, layer.o_bias))
            normed = self._rms_norm(hidden, layer.post_norm)
            gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            activated = F.silu(gate, inplace=True).mul_(up)
            hidden.add_(F.linear(activated, layer.down, layer.down_bias))
        return F.linear(self._rms_norm(hidden, self._norm), self._head).float()

    def _attend(
        self,
        q: Tensor,
        cache: kernels.BoundCache,
        inputs: StepInputs,
        window_left: int,
        final: bool,
    ) -> Tensor:
        attended: Tensor
        if final or inputs.decode_only:
            attended = cache.decode(
                q,
                inputs.sampled_block_table if final else inputs.block_table,
                inputs.sampled_seq_lens if final else inputs.seq_lens,
                sm_scale=self._scale,
                window_left=window_left,
            )
        else:
            attended = kernels.paged_prefill(
                q,
                cache.k_cache,
                cache.v_cache,
                inputs.cu_seqlens_q,
                inputs.block_table,
                inputs.seq_lens,
                sm_scale=self._scale,
                window_left=window_left,
            )
        return attended

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            # Bit-equal to the lines below, and one call; in half precision it rounds once less.
            return torch.rms_norm(x, (x.shape[-1],), weight, self.cfg.rms_norm_eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.cfg.rms_norm_eps)
        return weight * wide.to(x.dtype)


def _take_layer(cfg: ModelConfig, weights: dict[str, Tensor], index: int) -> _Layer:
    prefix = f"model.layers.{index}."

    def take(name: str) -> Tensor:
        return weights.pop(prefix + name)

    def stack(names: Sequence[str], kind: str) -> Tensor:
        return torch.cat([take(f"{name}.{kind}") for name in names])

    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"]
    qk_norm = None
    if cfg.qk_norm:
        q, k = take("self_attn.q_norm.weight"), take("self_attn.k_norm.weight")
        qk_norm = torch.cat([q.expand(cfg.num_heads, -1), k.expand(cfg.num_kv_heads, -1)])
    return _Layer(
        input_norm=take("input_layernorm.weight"),
        qkv=stack(qkv, "weight"),
        qkv_bias=stack(qkv, "bias") if cfg.qkv_bias else None,
        qk_norm=qk_norm,
        o=take("self_attn.o_proj.weight"),
        o_bias=take("self_attn.o_proj.bias") if cfg.o_bias else None,
        post_norm=take("post_attention_layernorm.weight"),
        gate_up=stack(gate_up, "weight"),
        gate_up_bias=stack(gate_up, "bias") if cfg.mlp_bias else None,
        down=take("mlp.down_proj.weight"),
        down_bias=take("mlp.down_proj.bias") if cfg.mlp_bias else None,
        window_left=cfg.window_left(index),
    )
