# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Weights arrive whole and under the right names, or loading says which file and tensor is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.config import load_config
from kvxfer.server.weights import expected_shapes, load_weights, parse_dtype
from kvxfer.testing.models import make_random_checkpoint


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_random_checkpoint(tmp_path / "m", "llama", seed=5)


def load(
    folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, torch.Tensor]:
    return load_weights(folder, load_config(folder), dtype, **options)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a one-file checkpoint."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_shards_equal_one_file_bitwise(model_dir: Path, tmp_path: Path) -> None:
    sharded = make_random_checkpoint(tmp_path / "s", "llama", seed=5, num_shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    one, many = load(model_dir), load(sharded)
    assert one.keys() == many.keys() == expected_shapes(load_config(model_dir)).keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_serving_dtype(
    tmp_path: Path, stored: str, served: torch.dtype
) -> None:
    folder = make_random_checkpoint(tmp_path / "m", "qwen3", seed=5, dtype=stored)
    raw = load_file(folder / "model.safetensors")
    for name, tensor in load(folder, served).items():
        assert raw[name].dtype == getattr(torch, stored)
        assert torch.equal(tensor, raw[name].to(served))


def test_dtype_names(model_dir: Path) -> None:
    cfg = load_config(model_dir)
    assert parse_dtype("bfloat16", cfg) is torch.bfloat16
    assert parse_dtype("auto", cfg) is torch.float32
    with pytest.raises(InvalidArgumentError, match="int8"):
        parse_dtype("int8", cfg)


def test_loaded_weights_do_not_change_with_the_file(model_dir: Path) -> None:
    weights = load(model_dir)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    path = model_dir / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    assert all(torch.equal(before[name], weights[name]) for name in weights)


def test_progress_reaches_the_whole(model_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(model_dir, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 10
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]


def test_tied_models_have_no_head_and_a_spare_one_is_ignored(tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "t", "llama", seed=5, tie_embeddings=True)
    assert "lm_head.weight" not in load(folder)
    rewrite(folder, {"lm_head.weight": torch.ones(256, 64)})
    assert "lm_head.weight" not in load(folder)


def test_a_missing_head_of_an_untied_model_is_an_error(model_dir: Path) -> None:
    rewrite(model_dir, {"lm_head.weight": None})
    with pytest.raises(InvalidArgumentError, match=r"lacks lm_head\.weight.*tie_word_embeddings"):
        load(model_dir)


def test_missing_unknown_and_misshapen_tensors_are_named(model_dir: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    original = load_file(model_dir / "model.safetensors")[name]
    rewrite(model_dir, {name: None})
    with pytest.raises(InvalidArgumentError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load(model_dir)
    rewrite(model_dir, {name: original.T.contiguous()})
    with pytest.raises(InvalidArgumentError, match=r"up_proj.*shape \[64, 128\].*\[128, 64\]"):
        load(model_dir)
    rewrite(model_dir, {name: original, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(InvalidArgumentError, match=r"llama model does not have.*q_norm"):
        load(model_dir)


def test_many_missing_tensors_are_summed_up(model_dir: Path) -> None:
    set_config(model_dir, num_hidden_layers=4)
    with pytest.raises(InvalidArgumentError, match=r"model\.layers\.2.* and 12 more"):
        load(model_dir)


def test_stored_rotary_frequencies_are_ignored(model_dir: Path) -> None:
    rewrite(model_dir, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert not any("inv_freq" in name for name in load(model_dir))


def test_integer_weights_are_refused(model_dir: Path) -> None:
    rewrite(model_dir, {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(
        InvalidArgumentError, match=r"model\.norm\.weight is torch\.int8.*quantised"
    ):
        load(model_dir)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -5000])
def test_truncated_files_are_refused_before_mapping(model_dir: Path, keep: int) -> None:
    path = model_dir / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 0 else size + keep)
    expected = "truncated" if keep >= 8 or keep < 0 else "not a safetensors file"
    with pytest.raises(InvalidArgumentError, match=f"{path}.*{expected}"):
        load(model_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 64, "not a safetensors file"),
        ((5).to_bytes(8, "little") + b"abcde", "malformed"),
        ((2).to_bytes(8, "little") + b"[]", "malformed"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "malformed"),
        ((2).to_bytes(8, "little") + b"{}junk", "header accounts for 10 only"),
        ((2).to_bytes(8, "little") + b"{}", "lacks model.embed_tokens.weight.* and 15 more"),
    ],
)
def test_files_of_another_kind_are_refused(model_dir: Path, content: bytes, message: str) -> None:
    (model_dir / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        load(model_dir)


def test_a_header_that_contradicts_itself_is_refused(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][0] += 8
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*model\.safetensors"):
        load(model_dir)


def test_missing_shards_and_bad_indexes_are_named(tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "s", "llama", seed=5, num_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"lacks shards.*model-00002-of-00002"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ("{", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "empty"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "plain file name"),
    ):
        index.write_text(text)
        with pytest.raises(InvalidArgumentError, match=message):
            load(folder)


def test_pickled_weights_are_refused_with_the_reason(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"has no model\.safetensors"):
        load(model_dir)
    (model_dir / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match=r"pickled.*pytorch_model\.bin.*run code"):
        load(model_dir)


def test_one_file_of_another_name_is_taken_and_two_are_not(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "weights.safetensors")
    assert load(model_dir)
    (model_dir / "copy.safetensors").write_bytes((model_dir / "weights.safetensors").read_bytes())
    with pytest.raises(InvalidArgumentError, match=r"copy\.safetensors, weights\.safetensors"):
        load(model_dir)
