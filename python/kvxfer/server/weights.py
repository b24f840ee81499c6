# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint's safetensors into named tensors of the serving dtype, each name and shape checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.config import ModelConfig
from kvxfer.server.safetensors_header import Header, read_header, weight_files

__all__ = ["expected_shapes", "load_weights", "parse_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_NAMED = 6
_IGNORED = "rotary_emb.inv_freq"  # old files keep this; it follows from the configuration


def parse_dtype(name: str, cfg: ModelConfig) -> torch.dtype:
    """A serving dtype by name; ``auto`` is the checkpoint's own."""
    chosen = (cfg.dtype or "float32") if name == "auto" else name
    if chosen not in _DTYPES:
        raise InvalidArgumentError(f"dtype {chosen!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[chosen]


def expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model reads, as transformers names them."""
    hidden, ffn = cfg.hidden_size, cfg.intermediate_size
    num_q, num_kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.vocab_size, hidden)}
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, bias in (
            ("self_attn.q_proj", num_q, hidden, cfg.qkv_bias),
            ("self_attn.k_proj", num_kv, hidden, cfg.qkv_bias),
            ("self_attn.v_proj", num_kv, hidden, cfg.qkv_bias),
            ("self_attn.o_proj", hidden, num_q, cfg.o_bias),
            ("mlp.gate_proj", ffn, hidden, cfg.mlp_bias),
            ("mlp.up_proj", ffn, hidden, cfg.mlp_bias),
            ("mlp.down_proj", hidden, ffn, cfg.mlp_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        if cfg.qk_norm:
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                shapes[f"{prefix}{name}.weight"] = (cfg.head_dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, hidden)
    return shapes


def load_weights(
    model_dir: str | Path,
    cfg: ModelConfig,
    dtype: torch.dtype,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Every tensor of ``expected_shapes``, copied out of the files, in ``dtype``.

    Args:
        progress: called with (bytes read, bytes in all) after each tensor.
    Raises:
        InvalidArgumentError: a file is missing or truncated, or a tensor is missing, unknown, of another
            shape or not of floating point; all checked before the first byte of data is read.
    """
    folder = Path(model_dir)
    headers = {path: read_header(path) for path in weight_files(folder)}
    expected = expected_shapes(cfg)
    _check(folder, headers, expected, cfg)
    total = sum(header.data_nbytes for header in headers.values())
    weights: dict[str, Tensor] = {}
    done = 0
    for path, header in headers.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in header.shapes:
                    if name not in expected:
                        continue
                    tensor = file.get_tensor(name)
                    if not tensor.is_floating_point() or tensor.itemsize < 2:
                        raise InvalidArgumentError(
                            f"{path}: {name} is {tensor.dtype}; quantised weights cannot be read"
                        )
                    # A copy even where the dtype is right: a mapped file that is replaced or cut while
                    # the server runs would change the model or kill the process.
                    weights[name] = tensor.to(dtype, copy=True)
                    done += tensor.nbytes
                    if progress is not None:
                        progress(done, total)
        except (SafetensorError, OSError) as error:
            raise InvalidArgumentError(f"cannot read {path}: {error}") from error
    return weights


def _check(
    folder: Path,
    headers: dict[Path, Header],
    expected: dict[str, tuple[int, ...]],
    cfg: ModelConfig,
) -> None:
    found: dict[str, Path] = {}
    for path, header in headers.items():
        for name, shape in header.shapes.items():
            if name in found:
                raise InvalidArgumentError(f"{name} is in both {found[name]} and {path}")
            found[name] = path
            if name in expected and shape != expected[name]:
                raise InvalidArgumentError(
                    f"{path}: {name} has shape {list(shape)}, config.json asks for {list(expected[name])}"
                )
    missing = [name for name in expected if name not in found]
    if missing:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; config.json says tie_word_embeddings = false"
        raise InvalidArgumentError(f"{folder} lacks {_named(missing)}{hint}")
    # A tied model's file may hold the head as well; config.json decides.
    spare = {"lm_head.weight"} if cfg.tie_word_embeddings else set()
    unknown = [n for n in found if n not in expected and n not in spare and _IGNORED not in n]
    if unknown:
        raise InvalidArgumentError(
            f"{folder} holds tensors that a {cfg.architecture} model does not have: {_named(unknown)}"
        )


def _named(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
