# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration files mean what transformers takes them to mean, and what cannot be served is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.config import ModelConfig, load_config, model_identity, parse_config
from kvxfer.server.rope import RopeTable, rope_frequencies
from kvxfer.testing.models import ROPES, make_random_checkpoint, random_config


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


YARNS: list[dict[str, Any]] = [
    {"factor": 32.0, "original_max_position_embeddings": 512},
    {"factor": 32.0},
    {"factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 0.7},
    {"factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.7},
    {"factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    {"factor": 8.0, "original_max_position_embeddings": 512, "truncate": False},
    {"factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": None},
    {"factor": 1.0, "original_max_position_embeddings": 512},
]
SCALINGS = [
    *({"rope_type": kind, **values} for kind, values in ROPES.items()),
    *({"rope_type": "yarn", **values} for values in YARNS),
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]  # fmt: skip


@pytest.mark.parametrize("old_form", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("theta", [10000.0, 500000, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_rope_frequencies_and_table_equal_transformers_bitwise(
    tmp_path: Path, scaling: dict[str, Any], theta: float, old_form: bool
) -> None:
    config = random_config("llama", head_dim=48, old_form=old_form)
    if old_form:
        old = {"type": scaling["rope_type"], **without(scaling, "rope_type")}
        config |= {"rope_theta": theta, "rope_scaling": old}
    else:
        config["rope_parameters"] = {"rope_theta": theta, **scaling}
    folder = write(tmp_path / "m", config)
    cfg = load_config(folder)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    ours, factor = rope_frequencies(cfg.rope, cfg.head_dim)
    assert torch.equal(ours, theirs.inv_freq)
    assert factor == theirs.attention_scaling
    positions = torch.tensor([0, 1, 7, 1023, 1024, 4095])
    cos, sin = RopeTable(cfg, torch.float32).lookup(positions, 4095)
    expected_cos, expected_sin = theirs(torch.zeros(1), positions[None])
    signs = torch.tensor([-1.0] * 24 + [1.0] * 24)
    assert torch.equal(cos[:, 0], expected_cos[0])
    assert torch.equal(sin[:, 0], expected_sin[0] * signs)


def test_original_length_beside_the_rope_fields_wins_as_in_transformers(tmp_path: Path) -> None:
    config = random_config("llama", rope="yarn") | {"original_max_position_embeddings": 128}
    folder = write(tmp_path / "m", config)
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    cfg = load_config(folder)
    assert cfg.rope.original_max_position_embeddings == 128
    assert torch.equal(rope_frequencies(cfg.rope, cfg.head_dim)[0], theirs.inv_freq)


@pytest.mark.parametrize(
    "names",
    [(), ("num_key_value_heads",), ("head_dim",), ("max_position_embeddings",), ("rms_norm_eps",),
     ("tie_word_embeddings",), ("sliding_window",), ("max_window_layers",), ("rope_parameters",)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_absent_fields_default_as_in_transformers(
    tmp_path: Path, family: str, names: tuple[str, ...]
) -> None:
    full = random_config(family, num_heads=32, num_kv_heads=4, hidden_size=256, head_dim=16)
    config = without(full, *names)
    folder = write(tmp_path / "m", config)
    ours = load_config(folder)
    theirs = AutoConfig.from_pretrained(folder)
    head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.architecture == theirs.model_type
    assert (ours.num_layers, ours.num_heads) == (
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
    )
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    window = None if family == "llama" else theirs.sliding_window
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.num_layers
    assert ours.windows == tuple(window if k == "sliding_attention" else None for k in kinds)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "fields",
    [{"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
     {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0},
     {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 9},
     {"use_sliding_window": False, "sliding_window": 24, "max_window_layers": 1},
     {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
     {"use_sliding_window": True, "sliding_window": 24,
      "layer_types": ["sliding_attention", "full_attention"]}],
)  # fmt: skip
def test_qwen_windows_follow_layer_types_or_max_window_layers(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    folder = write(tmp_path / "m", random_config(family) | fields)
    theirs = AutoConfig.from_pretrained(folder)
    expected = [theirs.sliding_window if "sliding" in kind else None for kind in theirs.layer_types]
    ours = load_config(folder)
    assert list(ours.windows) == expected
    assert [ours.window_left(i) for i in range(2)] == [-1 if w is None else w - 1 for w in expected]


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [("llama", {}, (False, False, False, False)),
     ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
     ("qwen2", {"attention_bias": True, "mlp_bias": True}, (True, False, False, False)),
     ("qwen3", {"attention_bias": True}, (True, True, False, True)),
     ("mistral", {"attention_bias": True, "mlp_bias": True}, (False, False, False, False))],
)  # fmt: skip
def test_biases_and_norms_by_family(
    family: str, fields: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    cfg = parse_config(random_config(family) | fields)
    assert (cfg.qkv_bias, cfg.o_bias, cfg.mlp_bias, cfg.qk_norm) == expected


def test_null_kv_heads_and_null_head_dim() -> None:
    config = random_config("mistral", num_heads=8, hidden_size=64)
    cfg = parse_config(config | {"num_key_value_heads": None, "head_dim": None})
    assert (cfg.num_kv_heads, cfg.head_dim) == (8, 8)


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    config = random_config("llama") | {"eos_token_id": 7}
    assert load_config(write(tmp_path / "a", config)).eos_token_ids == (7,)
    assert load_config(write(tmp_path / "b", config, {"eos_token_id": [5, 6]})).eos_token_ids == (
        5,
        6,
    )
    assert load_config(write(tmp_path / "c", config, {"temperature": 1})).eos_token_ids == (7,)
    assert load_config(write(tmp_path / "d", config | {"eos_token_id": None})).eos_token_ids == ()


def test_dynamic_is_served_up_to_its_limit_and_yarn_to_its_stretched_length() -> None:
    base = random_config("llama", max_position_embeddings=512)
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}
    assert parse_config(base | dynamic).max_model_len == 512
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert parse_config(base | {"rope_parameters": yarn}).max_model_len == 2048


def test_nested_rope_parameters_are_read_if_all_layers_agree() -> None:
    inner = {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}
    base = without(random_config("qwen3"), "rope_parameters")
    nested = {"full_attention": inner, "sliding_attention": inner}
    cfg = parse_config(base | {"rope_parameters": nested})
    assert (cfg.rope.kind, cfg.rope.theta, cfg.rope.factor) == ("linear", 77.0, 2.0)
    other = {"full_attention": inner, "sliding_attention": inner | {"factor": 3.0}}
    with pytest.raises(InvalidArgumentError, match="differ by layer type"):
        parse_config(base | {"rope_parameters": other})


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **fields}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"architectures": ["GPT2LMHeadModel"]}, "architectures.*GPT2LMHeadModel.*supported"),
    ("llama", {"architectures": ["Qwen3MoeForCausalLM"]}, "architectures.*Qwen3Moe"),
    ("llama", {"architectures": None, "model_type": "gemma3"}, "model_type.*gemma3"),
    ("llama", {"architectures": None, "model_type": None}, "model_type"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act.*gelu"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
    ("qwen3", {"num_experts": 8}, "num_experts"),
    ("mistral", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"hidden_size": -1}, "hidden_size must be above 0"),
    ("llama", {"hidden_size": 64.5}, "hidden_size must be a whole number"),
    ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers must be a number"),
    ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers.*below 10000"),
    ("llama", {"architectures": [[]]}, "architectures"),
    ("llama", rope(rope_theta=1), "rope_theta must be above 1"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be a number"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads.*does not divide"),
    ("llama", {"head_dim": None, "hidden_size": 66}, "hidden_size.*no multiple"),
    ("llama", {"head_dim": 15}, "head_dim.*even"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ("llama", {"eos_token_id": "</s>"}, "eos_token_id"),
    ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be a list of 2"),
    ("qwen2", {"layer_types": ["linear_attention"] * 2}, "layer_types.*linear_attention"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types.*sliding_window"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("llama", rope(rope_type="longrope", factor=2.0), "rope_type.*longrope"),
    ("llama", rope(rope_type="mrope"), "rope_type.*mrope"),
    ("llama", rope(rope_type="linear"), "rope_parameters: factor is missing"),
    ("llama", rope(rope_type="linear", factor=0), "factor must be above 0"),
    ("llama", rope(rope_type="llama3", factor=2.0), "low_freq_factor is missing"),
    ("llama", rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": "yarn"}, "rope_parameters must be an object"),
    ("llama", {"rope_scaling": {"type": "su"}}, "rope_scaling: type.*su"),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_cannot_be_served_is_refused_by_field_name(
    family: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        parse_config(random_config(family) | fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
NAMES = [*random_config("qwen3", rope="yarn"), "rope_scaling", "layer_types", "torch_dtype"]


@given(st.sampled_from(["llama", "qwen2", "qwen3", "mistral"]), st.sampled_from(NAMES), JSON)
def test_any_value_of_any_field_is_read_or_refused(family: str, name: str, value: Any) -> None:
    try:
        cfg = parse_config(random_config(family, rope="yarn") | {name: value})
    except InvalidArgumentError:
        return
    assert cfg.num_heads % cfg.num_kv_heads == 0
    assert len(cfg.windows) == cfg.num_layers


@given(st.sampled_from(["rope_type", *ROPES["llama3"], "rope_theta", "truncate"]), JSON)
def test_any_value_of_any_rope_field_is_read_or_refused(name: str, value: Any) -> None:
    config = random_config("llama", rope="llama3")
    for kind in ("llama3", "yarn", "linear"):
        config["rope_parameters"] |= {"rope_type": kind, name: value}
        try:
            cfg = parse_config(config)
        except InvalidArgumentError:
            continue
        frequencies, factor = rope_frequencies(cfg.rope, cfg.head_dim)
        assert frequencies.shape == (8,)
        assert factor > 0


def test_unreadable_directories_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"missing.*does not exist"):
        load_config(tmp_path / "missing")
    with pytest.raises(InvalidArgumentError, match=r"no config\.json"):
        load_config(tmp_path)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("\udcff", "not valid JSON"),
    ):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InvalidArgumentError, match=message):
            load_config(tmp_path)
    write(tmp_path, random_config("llama"))
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(InvalidArgumentError, match=r"generation_config\.json is not valid JSON"):
        load_config(tmp_path)


def test_identity_tells_config_dtype_and_weights_apart(tmp_path: Path) -> None:
    def identity(folder: Path, dtype: object = torch.float32) -> str:
        cfg: ModelConfig = load_config(folder)
        return model_identity(folder, cfg, dtype)

    one = make_random_checkpoint(tmp_path / "one", "llama", seed=1)
    same = make_random_checkpoint(tmp_path / "same", "llama", seed=1)
    tuned = make_random_checkpoint(tmp_path / "tuned", "llama", seed=2)
    scaled = make_random_checkpoint(tmp_path / "scaled", "llama", seed=1, rope="linear")
    assert identity(one) == identity(same)
    assert identity(one, "float32") == identity(one, torch.float32)
    others = {identity(tuned), identity(scaled), identity(one, torch.bfloat16), identity(one)}
    assert len(others) == 4
