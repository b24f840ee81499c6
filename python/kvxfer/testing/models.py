# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints in Hugging Face form, which the server and transformers both load.

Weights have a standard deviation of 0.1, not the usual 0.02: with 0.02 a wrong KV cache often changes no
token, and a test that compares tokens would pass on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvxfer.server.config import parse_config
from kvxfer.server.weights import expected_shapes

__all__ = ["ROPES", "make_random_checkpoint", "random_config"]

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
# Scalings whose effect shows within a few hundred tokens, so that a wrong one changes the answer.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 256},
    "dynamic": {"factor": 2.0},
}


def random_config(
    family: str,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int | None = None,
    intermediate_size: int = 128,
    vocab_size: int = 256,
    max_position_embeddings: int = 4096,
    rope: str = "default",
    rope_theta: float = 10000.0,
    old_form: bool = False,
    tie_embeddings: bool = False,
    sliding_window: int | None = None,
    layer_types: Sequence[str] | None = None,
    max_window_layers: int | None = None,
    dtype: str = "float32",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A ``config.json``. ``old_form``: rope_theta, rope_scaling and torch_dtype as before transformers 5."""
    if hidden_size is None:
        # Not heads x head_dim: real models differ there, and a reader that mixes them up must fail.
        hidden_size = -(-64 // num_heads) * num_heads
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if family != "qwen2" or head_dim * num_heads != hidden_size:
        config["head_dim"] = head_dim
    if family == "mistral":
        config["sliding_window"] = sliding_window
    elif family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = sliding_window is not None
        config["sliding_window"] = sliding_window
        if layer_types is not None:
            config["layer_types"] = list(layer_types)
        config["max_window_layers"] = num_layers if max_window_layers is None else max_window_layers
    elif sliding_window is not None:
        raise ValueError("llama has no sliding window")
    scaling = dict(ROPES[rope])
    if old_form:
        config["torch_dtype"] = dtype
        config["rope_theta"] = rope_theta
        config["rope_scaling"] = {"type": rope, **scaling} if scaling else None
    else:
        config["dtype"] = dtype
        config["rope_parameters"] = {"rope_type": rope, "rope_theta": rope_theta, **scaling}
    config.update(extra or {})
    return config


def make_random_checkpoint(
    model_dir: str | Path,
    family: str,
    *,
    seed: int,
    std: float = 0.1,
    num_shards: int = 1,
    **config_fields: Any,
) -> Path:
    """Write config.json and safetensors; ``config_fields`` as in :func:`random_config`. No tokenizer."""
    folder = Path(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = random_config(family, **config_fields)
    cfg = parse_config(config)
    dtype = getattr(torch, str(cfg.dtype))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(cfg).items():
        drawn = torch.randn(shape, generator=generator) * std
        # Norm weights vary around 1: all ones would hide a missing or misplaced norm.
        tensors[name] = (drawn + 1 if name.endswith("norm.weight") else drawn).to(dtype)
    names = list(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for shard in range(num_shards):
            file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            # Dealt out in turn, so that the parts of one layer lie in different files.
            part = {name: tensors[name] for name in names[shard::num_shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
