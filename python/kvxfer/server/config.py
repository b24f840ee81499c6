# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face model directory's ``config.json`` into facts, or says which field cannot be served.

Imports no torch: the router reads it too. Defaults are those of transformers' config classes, because
files in the wild leave them out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.json_fields import Fields, read_json
from kvxfer.server.safetensors_header import update_digest

__all__ = ["ModelConfig", "RopeConfig", "load_config", "model_identity", "parse_config"]

Architecture = Literal["llama", "qwen2", "qwen3", "mistral"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]

_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}
_MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768, "mistral": 131072}
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: a frequency per pair of channels, fixed whatever the sequence's length."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    attention_factor: float | None = None  # yarn; None: from factor, or from the mscale pair
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder of the four families needs to know of itself."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    # Per layer: keys visible to a query, itself included; None = all.
    windows: tuple[int | None, ...]
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str | None  # as the file says it was saved

    @property
    def max_model_len(self) -> int:
        """Longest sequence that the positions support. Yarn files often keep the original length."""
        if self.rope.kind != "yarn":
            return self.max_position_embeddings
        stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
        return max(self.max_position_embeddings, stretched)

    def window_left(self, layer: int) -> int:
        """Keys to the left of the query that the layer sees, as the kernels count them; -1 = all."""
        window = self.windows[layer]
        return -1 if window is None else window - 1


def load_config(model_dir: str | Path) -> ModelConfig:
    """Read ``config.json`` and, for the end tokens, ``generation_config.json``.

    Raises:
        InvalidArgumentError: no such directory or file, bad JSON, or a model that cannot be served; the
            message names the field and its value.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise InvalidArgumentError(f"model directory {folder} does not exist or is not a directory")
    path = folder / "config.json"
    if not path.is_file():
        raise InvalidArgumentError(
            f"{folder} has no config.json; expected a Hugging Face model directory "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    return parse_config(read_json(path), generation, where=str(path))


def parse_config(
    values: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    *,
    where: str = "config.json",
) -> ModelConfig:
    """The same from parsed JSON; ``where`` begins each error's message."""
    fields = Fields(values, where)
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    hidden_size = fields.count("hidden_size")
    num_layers = fields.count("num_hidden_layers", below=10_000)
    num_heads = fields.count("num_attention_heads")
    num_kv_heads = _num_kv_heads(fields, architecture, num_heads)
    if values.get("head_dim") is not None or (architecture == "qwen3" and "head_dim" not in values):
        head_dim = fields.count("head_dim", 128)
    elif hidden_size % num_heads:
        raise fields.error(
            "hidden_size", f"= {hidden_size} is no multiple of num_attention_heads = {num_heads}"
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise fields.error("head_dim", f"= {head_dim} must be even for rotary positions")
    max_positions = fields.count("max_position_embeddings", _MAX_POSITIONS[architecture])
    attention_bias = architecture in ("llama", "qwen3") and fields.flag("attention_bias")
    ends = Fields(generation or {}, where.replace("config.json", "generation_config.json"))
    bos = fields.token_ids("bos_token_id")
    dtype = values.get("dtype") or values.get("torch_dtype")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or architecture == "qwen2",
        o_bias=attention_bias,
        mlp_bias=architecture == "llama" and fields.flag("mlp_bias"),
        qk_norm=architecture == "qwen3",
        windows=_windows(fields, architecture, num_layers),
        rope=_rope(fields, max_positions),
        eos_token_ids=ends.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        bos_token_id=bos[0] if bos else None,
        dtype=dtype if isinstance(dtype, str) else None,
    )


def _architecture(fields: Fields) -> Architecture:
    known = f"supported: {', '.join(_ARCHITECTURES)}"
    names = fields.values.get("architectures")
    if names:
        if not isinstance(names, list) or str(names[0]) not in _ARCHITECTURES:
            raise fields.error("architectures", f"= {names!r} is not supported; {known}")
        return _ARCHITECTURES[names[0]]
    by_type: dict[object, Architecture] = {kind: kind for kind in _ARCHITECTURES.values()}
    model_type = fields.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        raise fields.error("model_type", f"= {model_type!r} is not supported; {known}")
    return by_type[model_type]


def _refuse_unsupported(fields: Fields) -> None:
    if fields.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.refused("hidden_act", "only silu is")
    for name in ("quantization_config", "compression_config"):
        if fields.values.get(name):
            raise fields.refused(name, "quantised weights cannot be read; use an unquantised copy")
    for name in _EXPERT_FIELDS:
        if fields.values.get(name):
            raise fields.refused(name, "mixture-of-experts models cannot be served")


def _num_kv_heads(fields: Fields, architecture: Architecture, num_heads: int) -> int:
    # What an absent field means differs by family; null means one KV head per query head in all four.
    absent = {"llama": num_heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[architecture]
    default = num_heads if "num_key_value_heads" in fields.values else absent
    num_kv_heads = fields.count("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads",
            f"= {num_kv_heads} does not divide num_attention_heads = {num_heads}",
        )
    return num_kv_heads


def _windows(fields: Fields, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    kinds = fields.values.get("layer_types")
    if architecture in ("llama", "mistral"):
        # Neither family's code looks at layer_types; a file that relies on them is of another family.
        only = "full_attention" if architecture == "llama" else "sliding_attention"
        if kinds is not None and kinds != [only] * num_layers:
            raise fields.refused("layer_types", f"{architecture} layers are all alike")
        if architecture == "llama" or fields.values.get("sliding_window", 4096) is None:
            return (None,) * num_layers
        return (fields.count("sliding_window", 4096),) * num_layers
    window = None
    if fields.flag("use_sliding_window") and fields.values.get("sliding_window", 4096) is not None:
        window = fields.count("sliding_window", 4096)
    if kinds is None:
        first = fields.count("max_window_layers", 28, above=-1)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must be a list of {num_layers} kinds, not {kinds!r}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.refused("layer_types", f"{kind!r} is neither full nor sliding attention")
        if kind == "sliding_attention" and window is None:
            raise fields.refused("layer_types", "sliding_attention needs a sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(fields: Fields, max_positions: int) -> RopeConfig:
    # Since transformers 5 all is in rope_parameters; before, rope_theta stood beside rope_scaling.
    source = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(source) or {}
    if not isinstance(values, dict):
        raise fields.error(source, f"must be an object, not {values!r}")
    nested = [value for value in values.values() if isinstance(value, dict)]
    if nested:
        if any(value != nested[0] for value in nested):
            raise fields.refused(source, "rotary parameters that differ by layer type")
        values = nested[0]
    rope = Fields(values, f"{fields.where}: {source}")
    for owner in (fields, rope):
        if owner.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise owner.refused("partial_rotary_factor", "all channels must rotate")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, above=1), above=1)
    kind = values.get("rope_type") or values.get("type") or "default"
    name = "rope_type" if values.get("rope_type") else "type"
    if kind in ("default", "dynamic"):
        # Dynamic changes its frequencies with the longest sequence of a batch, which a shared cache cannot
        # follow; up to max_position_embeddings it is the default, and max_model_len ends there.
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig("linear", theta, rope.number("factor"))
    if kind not in ("llama3", "yarn"):
        why = "longrope depends on the batch" if kind == "longrope" else "unknown"
        raise rope.refused(name, f"{why}; known: default, linear, dynamic, llama3, yarn")
    # A length beside the rope fields is the older form and wins, as it does in transformers.
    original = fields.count(
        "original_max_position_embeddings",
        rope.count("original_max_position_embeddings", max_positions),
    )
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("low_freq_factor", f"= {low} must be below high_freq_factor = {high}")
        return RopeConfig("llama3", theta, rope.number("factor"), original, low, high)
    return RopeConfig(
        "yarn",
        theta,
        rope.number("factor", max_positions / original),
        original,
        attention_factor=rope.optional("attention_factor"),
        mscale=rope.optional("mscale"),
        mscale_all_dim=rope.optional("mscale_all_dim"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def model_identity(model_dir: str | Path, cfg: ModelConfig, dtype: object) -> str:
    """A digest by which two workers know that their KV caches mean the same (``wire.PeerRef.model``).

    Covers the configuration, the serving dtype and each weight file's name, size, header and a sample of
    its data: fine-tunes of one model differ in nothing but data. A few milliseconds, whatever the size.
    """
    digest = hashlib.blake2b(digest_size=16)
    described = {"config": asdict(cfg), "dtype": str(dtype).removeprefix("torch.")}
    digest.update(json.dumps(described, sort_keys=True).encode())
    update_digest(digest, Path(model_dir))
    return digest.hexdigest()
