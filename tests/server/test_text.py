# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Streamed text equals a decode of the whole, stop strings cut alike however text is cut, templates as the oracle's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from front_fakes import CORPUS, SPECIAL, byte_fallback_tokenizer, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.chat_template import ChatTemplate, load_chat_template
from kvxfer.server.text import AnswerText, Detokenizer, StopStrings, Text

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}
REPLACEMENT = "\ufffd"


def whole_answer(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    """The oracle: what transformers' decode of prompt and answer has beyond that of the prompt."""
    oracle = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return oracle.decode(prompt + answer, **options)[len(oracle.decode(prompt, **options)) :]


def streamed(tokenizer: Tokenizer, prompt: list[int], groups: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=True)
    return [*(detokenizer.push(group) for group in groups), detokenizer.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "text", [*CORPUS, "def main hello world 🙂é x = x", "  two  spaces ", "👩‍👩‍👧"]
)
@pytest.mark.parametrize("group", [1, 2, 5])
def test_streamed_text_equals_the_whole_decode(kind: str, text: str, group: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    prompt = tokenizer.encode("def main").ids
    groups = [ids[at : at + group] for at in range(0, len(ids), group)]
    pieces = streamed(tokenizer, prompt, groups)
    assert "".join(pieces) == whole_answer(tokenizer, prompt, ids)
    assert REPLACEMENT not in "".join(pieces), "half a character was shown"


@given(data=st.data(), ids=st.lists(st.integers(0, 255), min_size=1, max_size=60))
@settings(max_examples=150)
def test_any_bytes_stream_to_the_whole_decode(data: st.DataObject, ids: list[int]) -> None:
    """Random bytes are seldom UTF-8: what is shown still adds up to one decode of everything."""
    alphabet = [BYTE_LEVEL.token_to_id(c) for c in BYTE_LEVEL.get_vocab() if len(c) == 1]
    ids = [alphabet[i % len(alphabet)] for i in ids]
    size = data.draw(st.integers(1, 7))
    groups = [ids[at : at + size] for at in range(0, len(ids), size)]
    prompt = BYTE_LEVEL.encode("x").ids
    assert "".join(streamed(BYTE_LEVEL, prompt, groups)) == whole_answer(BYTE_LEVEL, prompt, ids)


def test_incomplete_characters_are_held_back_and_shown_at_the_end() -> None:
    ids = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    pieces = streamed(BYTE_FALLBACK, BYTE_FALLBACK.encode("x").ids, [[i] for i in ids])
    assert pieces == ["", "", "€", ""]
    cut = streamed(BYTE_FALLBACK, BYTE_FALLBACK.encode("x").ids, [[i] for i in ids[:2]])
    assert cut[:2] == ["", ""]
    assert set(cut[2]) == {REPLACEMENT}


def test_first_word_keeps_its_space() -> None:
    """Llama 2's decoder drops the space before a text's first word: an answer's first word is not that."""
    ids = [BYTE_FALLBACK.token_to_id("▁hello")]
    assert BYTE_FALLBACK.decode(ids) == "hello"
    assert streamed(BYTE_FALLBACK, BYTE_FALLBACK.encode("x").ids, [ids])[0] == " hello"


def test_a_character_begun_in_the_prompt_is_finished_in_the_answer() -> None:
    ids = BYTE_LEVEL.encode("x = 'ж").ids
    whole = "".join(streamed(BYTE_LEVEL, ids[:-1], [ids[-1:]]))
    assert whole.endswith("ж")
    assert REPLACEMENT not in whole


def test_endless_bytes_are_shown_in_bounded_time() -> None:
    bad = BYTE_LEVEL.token_to_id("à")  # byte 0xE0: opens a character that never comes
    pieces = streamed(BYTE_LEVEL, [], [[bad] for _ in range(200)])
    assert pieces[150] or any(pieces[:150])
    assert "".join(pieces) == REPLACEMENT * 200


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    end = BYTE_LEVEL.token_to_id(SPECIAL[0])
    ids = [*BYTE_LEVEL.encode("hello").ids, end]
    assert "".join(streamed(BYTE_LEVEL, [], [ids])) == "hello"
    shown = Detokenizer(BYTE_LEVEL, [], skip_special_tokens=False)
    assert shown.push(ids) == "hello<|end|>"


def cut_at_stop(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    finder = StopStrings(stops)
    text = "".join(finder.push(piece) for piece in pieces)
    return text + finder.flush(), finder.hit


@given(
    text=st.text(alphabet="abc", max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 11), max_size=11),
)
@settings(max_examples=400)
def test_stop_strings_cut_alike_however_text_arrives(
    text: str, stops: list[str], cuts: set[int]
) -> None:
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    # The oracle looks at every prefix of the text, as a client that sees one character at a time would.
    expected: tuple[str, str | None] = (text, None)
    for end in range(1, len(text) + 1):
        ends_here = [stop for stop in stops if text[:end].endswith(stop)]
        if ends_here:
            stop = max(ends_here, key=len)
            expected = (text[: end - len(stop)], stop)
            break
    assert cut_at_stop(stops, pieces) == expected


def test_nothing_of_a_stop_string_is_ever_shown() -> None:
    finder = StopStrings(["\n\n", "END"])
    assert [finder.push(piece) for piece in ["a\n", "b", "E", "N", "X", "\n"]] == [
        "a",
        "\nb",
        "",
        "",
        "ENX",
        "",
    ]
    assert finder.push("\nmore") == ""
    assert finder.hit == "\n\n"
    assert finder.push("later") == ""


def test_answer_stops_inside_a_token_and_leaves_out_stop_tokens() -> None:
    text = Text(BYTE_LEVEL, None, vocab_size=330)
    ids = text.encode("hello, world!")
    answer = text.answer([], stops=["o, w"])
    assert "".join(answer.push([i]) for i in ids) == "hell"
    assert answer.stopped
    assert answer.flush() == ""
    bang = ids[-1]
    answer = text.answer([], stop_token_ids=[bang])
    assert answer.push(ids) + answer.flush() == text.decode(ids[:-1])


TEMPLATE = """{%- if not messages %}{{ raise_exception('no messages') }}{% endif -%}
{{ bos_token }}
{%- for message in messages %}
    {%- if loop.index0 > 20 %}{% break %}{% endif %}
    {%- if message.role == 'assistant' %}
<|assistant|>{% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {%- else %}
<|{{ message['role'] }}|>{{ message['content'] }}
    {%- endif %}
{{ eos_token }}
{% endfor %}
{%- set ns = namespace(last='') %}
{%- for m in messages %}{% set ns.last = m.role %}{% endfor %}
{{- ns.last }} {{ {'a': '<b>é'} | tojson }} {{ dict(x=1) }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}<no-think>{% endif %}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello world"}],
    [
        {"role": "system", "content": "  brief  "},
        {"role": "user", "content": "naïve?"},
        {"role": "assistant", "content": " no \n"},
        {"role": "user", "content": "<b>"},
    ],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize(
    "options", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}]
)
def test_template_and_ids_equal_transformers(
    messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=BYTE_LEVEL, bos_token=SPECIAL[1], eos_token=SPECIAL[0]
    )
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[0]}
    ours = Text(BYTE_LEVEL, ChatTemplate(TEMPLATE, special), vocab_size=330)
    theirs = {"add_generation_prompt": True, "chat_template": TEMPLATE, **options}
    assert ours.template is not None
    assert ours.template.render(messages, **options) == oracle.apply_chat_template(
        messages, tokenize=False, **theirs
    )
    expected = oracle.apply_chat_template(messages, tokenize=True, return_dict=False, **theirs)
    assert ours.encode_chat(messages, **options) == expected


def test_template_says_no_in_its_own_words() -> None:
    with pytest.raises(InvalidArgumentError, match="no messages"):
        ChatTemplate(TEMPLATE, {}).render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{% set ns = namespace(_x=1) %}",
        "{{ messages.append(1) }}",
        "{{ dict.__class__.__base__.__subclasses__() }}",
    ],
)
def test_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidArgumentError, match="refuses"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_template_that_does_not_compile_is_a_start_up_error() -> None:
    with pytest.raises(InvalidArgumentError, match="line 1"):
        ChatTemplate("{% if %}", {})


def test_template_is_found_in_its_three_places(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    render = [{"role": "user", "content": "x"}]

    def rendered() -> str:
        template = load_chat_template(tmp_path)
        assert template is not None
        return template.render(render)

    config.write_text(
        json.dumps({"chat_template": "one{{ eos_token }}", "eos_token": {"content": "E"}})
    )
    assert rendered() == "oneE"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert rendered() == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert rendered() == "three"


def test_tokenizer_json_alone_is_enough_and_its_truncation_is_ignored(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text.load(tmp_path, vocab_size=330)
    assert text.decode(text.encode(CORPUS[0])) == CORPUS[0]
    with pytest.raises(InvalidArgumentError, match="chat template"):
        text.encode_chat(CHATS[0])


def test_without_a_tokenizer_only_ids_are_taken(tmp_path: Path) -> None:
    text = Text.load(tmp_path, vocab_size=10)
    with pytest.raises(InvalidArgumentError, match="token ids"):
        text.encode("hello")
    answer = text.answer([1, 2])
    assert isinstance(answer, AnswerText)
    assert answer.push([3]) + answer.flush() == ""


def test_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match=r"tokenizer\.json"):
        Text.load(tmp_path, vocab_size=10)
