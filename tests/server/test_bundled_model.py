# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The model that ships in the package: what it promises to a server and to a reader of its card."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
safetensors_torch = pytest.importorskip("safetensors.torch")

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "python" / "kvxfer" / "models" / "tiny-python-llama"
RECORD = REPOSITORY / "bench" / "results" / "tiny_model_training.json"
SCRIPT = REPOSITORY / "tools" / "train_tiny_model.py"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((MODEL / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference_model() -> Any:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval()


def greedy(model: Any, tokenizer: Any, prompt: str, *, num_tokens: int) -> str:
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return str(tokenizer.decode(out[0].tolist()))


# --- files ---------------------------------------------------------------------------------------


def test_weights_are_small_bfloat16_and_exactly_the_tensors_of_a_tied_llama(
    config: dict[str, Any],
) -> None:
    path = MODEL / "model.safetensors"
    assert path.stat().st_size < 16_000_000
    tensors = safetensors_torch.load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert len(tensors) == 2 + 9 * config["num_hidden_layers"]
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    assert 2_000_000 <= num_parameters <= 8_000_000


def test_weight_hash_equals_the_model_card_and_the_training_record(record: dict[str, Any]) -> None:
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    card = (MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert digest == record["weights_sha256"]
    assert digest in card
    for fact in (record["corpus"]["sha256"], record["command"], *record["versions"].values()):
        assert fact in card


def test_tokenizer_hash_equals_the_training_record(record: dict[str, Any]) -> None:
    digest = hashlib.sha256((MODEL / "tokenizer.json").read_bytes()).hexdigest()
    assert digest == record["tokenizer_sha256"]


def test_licence_of_the_training_text_ships_beside_the_weights() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL / "LICENSE.PSF").read_text("utf-8")


def test_config_asks_for_grouped_queries_and_16k_positions_by_yarn(config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 16384
    assert rope["rope_type"] == "yarn"
    assert rope["factor"] * rope["original_max_position_embeddings"] == 16384
    assert config["bos_token_id"] is None


# --- tokenizer -----------------------------------------------------------------------------------


@given(text=st.text())
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["\x00\x7f\x80ÿ", "  \t\r\n\n \n", "naïve 日本語 🐍‍🔥", "a  b   c\n"]
)
def test_awkward_text_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("word", ["def ", "class ", "import ", "return ", "self", " ", "\n    "])
def test_a_space_belongs_to_the_word_before_it(tokenizer: Any, word: str) -> None:
    encoding = tokenizer.encode(word, add_special_tokens=False)
    assert len(encoding.ids) == 1
    continued = tokenizer.encode(word + "x", add_special_tokens=False).ids
    if not word[-1].isalpha():  # the answer starts a new word, so the prompt's ids do not change
        assert continued[:1] == encoding.ids


def test_end_of_text_is_one_token_and_ends_an_answer(
    config: dict[str, Any], tokenizer: Any
) -> None:
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    settings = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    eos = tokenizer.token_to_id(settings["eos_token"])
    assert eos == config["eos_token_id"] == generation["eos_token_id"]
    assert tokenizer.encode("a", add_special_tokens=True).ids == tokenizer.encode("a").ids
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_transformers_reads_the_same_ids(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = Path(__file__).read_text(encoding="utf-8")
    assert other(text).input_ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert other.decode(other(text).input_ids) == text


# --- chat template -------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b> & 'x'"}]


@pytest.mark.parametrize("trim", [True, False])
def test_chat_template_gives_plain_role_and_text_lines(trim: bool) -> None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=trim, lstrip_blocks=trim, undefined=jinja2.StrictUndefined
    )
    source = (MODEL / "chat_template.jinja").read_text(encoding="utf-8")
    template = environment.from_string(source)
    lines = "system: Be brief.\nuser: <b> & 'x'\n"
    assert template.render(messages=MESSAGES, add_generation_prompt=False) == lines
    assert template.render(messages=MESSAGES, add_generation_prompt=True) == lines + "assistant: "


def test_transformers_renders_the_same_chat() -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(MODEL)
    rendered = other.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == "system: Be brief.\nuser: <b> & 'x'\nassistant: "


# --- what it learned -----------------------------------------------------------------------------


def test_completing_def_gives_a_function_that_parses(reference_model: Any, tokenizer: Any) -> None:
    text = greedy(reference_model, tokenizer, "def ", num_tokens=96)
    assert re.match(r"def [A-Za-z_]\w*\((\w|[ ,=*.'\"])*\)", text), text
    lines = text.splitlines()
    # The answer is cut by length, so ask for the longest whole beginning.
    for end in range(len(lines), 1, -1):
        try:
            tree = ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
        assert isinstance(tree.body[0], ast.FunctionDef)
        return
    pytest.fail(f"no beginning of two lines or more parses:\n{text}")


def test_it_predicts_python_far_better_than_a_random_model(
    reference_model: Any, tokenizer: Any
) -> None:
    # This very file: certainly not in the training text.
    ids = tokenizer.encode(Path(__file__).read_text(encoding="utf-8")).ids[:512]
    with torch.inference_mode():
        loss = reference_model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss < 0.65 * math.log(tokenizer.get_vocab_size())


@pytest.mark.slow
def test_a_prompt_of_16k_tokens_is_still_read(reference_model: Any, tokenizer: Any) -> None:
    source = Path(sysconfig.get_path("stdlib"), "typing.py").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(source * 4).ids[:16384]])
    assert ids.shape[1] == 16384
    with torch.inference_mode():
        logits = reference_model(ids[:, :-1], logits_to_keep=1024).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, -1024:]).item()
    assert loss < 0.65 * math.log(tokenizer.get_vocab_size())


# --- training ------------------------------------------------------------------------------------


def test_the_training_model_equals_transformers_with_and_without_yarn(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], reference_model: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from tiny_model.model import Shape, TinyLlama

    model = TinyLlama(Shape(), generator=torch.Generator().manual_seed(0))
    tensors = safetensors_torch.load_file(MODEL / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    rope = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    plain_config = transformers.LlamaConfig.from_pretrained(MODEL)
    plain_config.rope_parameters = rope
    plain = transformers.LlamaForCausalLM.from_pretrained(
        MODEL, config=plain_config, dtype=torch.float32
    )
    ids = torch.randint(0, 2048, (1, 600), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for other, yarn in ((reference_model, True), (plain, False)):
            torch.testing.assert_close(model(ids, yarn=yarn), other(ids).logits)


def test_training_twice_gives_the_same_hash() -> None:
    options = (
        "--check-reproducible --steps 4 --layers 1 --vocab-size 300 --context 32 --max-files 8"
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options.split()],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = re.findall(r"\b[0-9a-f]{64}\b", done.stdout)[-2:]
    assert first == second


def test_another_corpus_is_warned_about(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for name in "ab":
        (library / f"{name}.py").write_text(f"def {name}(x):\n    return x\n" * 40, "utf-8")
    options = "--steps 1 --layers 1 --vocab-size 300 --context 32 --check-reproducible --corpus"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options.split(), str(library)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the corpus differs from the recorded one" in done.stdout.replace("\n", " ")
