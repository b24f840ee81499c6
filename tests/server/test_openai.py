# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Bodies become token requests as vLLM's users expect, or a refusal that names the field and its value."""

from __future__ import annotations

import json
from typing import Any

import pytest
from front_fakes import BYTE_LEVEL

from kvxfer.server.chat_template import ChatTemplate
from kvxfer.server.openai import Call, Limits, error_body, parse_call
from kvxfer.server.text import Text
from kvxfer.server.wire import RequestRefusedError

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {})
TEXT = Text(BYTE_LEVEL, TEMPLATE, vocab_size=330)
LIMITS = Limits(("tiny", "alias"), max_model_len=64, deadline_s=30.0)


def parse(body: Any, *, chat: bool = False, text: Text = TEXT) -> Call:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_call(content, chat=chat, text=text, limits=LIMITS, request_id="r1")


def completion(**fields: Any) -> Call:
    return parse({"prompt": "hello", **fields})


def chat(**fields: Any) -> Call:
    return parse({"messages": [{"role": "user", "content": "hi"}], **fields}, chat=True)


def refusal(body: Any, **options: Any) -> RequestRefusedError:
    with pytest.raises(RequestRefusedError) as caught:
        parse(body, **options)
    error = error_body(caught.value)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return caught.value


def test_sampling_fields_arrive() -> None:
    call = completion(
        n=3,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=2,
        seed=-1,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3],
        stop="END",
        cache_salt="me",
        user="ignored",
        kv_transfer_params={"role": "decode"},
    )
    (request,) = call.requests
    sampling = request.sampling
    assert (sampling.n, sampling.max_tokens, sampling.min_tokens) == (3, 7, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0.5,
        0.9,
        5,
        0.1,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 2)
    assert sampling.seed == 2**63 - 1
    assert sampling.ignore_eos
    assert sampling.stop_token_ids == (3,)
    assert call.stops == ("END",)
    assert request.cache_salt == "me"
    assert request.kv_transfer_params is None, "a client's kv_transfer_params must not get through"
    assert request.prompt == tuple(TEXT.encode("hello"))
    assert request.deadline_s == 30.0


def test_null_is_as_if_absent() -> None:
    names = (
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "model",
    )
    sampling = completion(**dict.fromkeys(names)).requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.n) == (1.0, 1.0, 0, 1)


def test_absent_seed_is_drawn_anew() -> None:
    assert len({completion().requests[0].sampling.seed for _ in range(4)}) == 4


def test_default_max_tokens() -> None:
    num_prompt = len(TEXT.encode("hello"))
    assert completion().requests[0].sampling.max_tokens == 16
    assert completion(max_tokens=None).requests[0].sampling.max_tokens == 64 - num_prompt
    assert parse({"prompt": [1] * 60}).requests[0].sampling.max_tokens == 4
    (request,) = chat().requests
    assert request.sampling.max_tokens == 64 - len(request.prompt)
    assert chat(max_completion_tokens=5, max_tokens=9).requests[0].sampling.max_tokens == 5
    assert chat(max_tokens=9).requests[0].sampling.max_tokens == 9


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", [TEXT.encode("hello")]),
        (["hello", "x"], [TEXT.encode("hello"), TEXT.encode("x")]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompt_forms(prompt: Any, expected: list[list[int]]) -> None:
    call = parse({"prompt": prompt})
    assert [list(request.prompt) for request in call.requests] == expected
    assert len({request.request_id for request in call.requests}) == len(expected)
    assert all(request.request_id.startswith("cmpl-r1") for request in call.requests)


def test_echo_shows_prompts_as_given_or_decoded() -> None:
    ids = TEXT.encode("world")
    assert parse({"prompt": ["hello", ids], "echo": True}).echo == ("hello", "world")


def test_chat_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = parse({"messages": [{"role": "user", "content": parts}]}, chat=True)
    assert TEXT.decode(call.requests[0].prompt) == "user: a\nb\n"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": -1}, "max_tokens", ["-1"]),
        ({"max_tokens": 0}, "max_tokens", ["0"]),
        ({"max_tokens": "x"}, "max_tokens", ["int", "str"]),
        ({"max_tokens": 64}, "max_tokens", ["64", str(len(TEXT.encode("hello")))]),
        ({"temperature": -0.1}, "temperature", ["-0.1"]),
        ({"temperature": 1e300}, "temperature", ["1e+300"]),
        ({"top_p": 0}, "top_p", ["0"]),
        ({"top_p": 1.1}, "top_p", ["1.1"]),
        ({"top_k": -2}, "top_k", ["-2"]),
        ({"min_p": 2}, "min_p", ["2"]),
        ({"n": 0}, "n", ["0"]),
        ({"n": 1000}, "n", ["1000", "128"]),
        ({"presence_penalty": 3}, "presence_penalty", ["3"]),
        ({"stop": ["a"] * 5}, "stop", ["5", "4"]),
        ({"stop": ""}, "stop", ["empty"]),
        ({"stop": 3}, "stop", ["int"]),
        ({"stop_token_ids": [999]}, "stop_token_ids", ["999", "330"]),
        ({"min_tokens": 20, "max_tokens": 5}, "min_tokens", ["20", "5"]),
        ({"prompt": [1, 330]}, "prompt", ["330"]),
        ({"prompt": [-1]}, "prompt", ["-1"]),
        ({"prompt": [1] * 64}, "prompt", ["64"]),
        ({"prompt": [1] * 200}, "prompt", ["200", "64"]),
        ({"prompt": []}, "prompt", ["empty"]),
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": [[]]}, "prompt", ["[]"]),
        ({"prompt": [1, "a"]}, "prompt", ["entry 0"]),
        ({"prompt": [True]}, "prompt", ["True"]),
        ({"prompt": ["a"] * 300}, "prompt", ["300", "256"]),
        ({"prompt": {"a": 1}}, "prompt", ["object"]),
        ({"prompt": None}, "prompt", ["null"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
        (
            {"stream": True, "stream_options": {"include_usage": 3}},
            "stream_options",
            ["include_usage"],
        ),
        ({"best_of": 2}, "best_of", ["best_of 2", "n 1"]),
        ({"suffix": "x"}, "suffix", ["suffix"]),
        ({"logprobs": 0}, "logprobs", ["logprobs"]),
        ({"logit_bias": {"1": 5}}, "logit_bias", ["logit_bias"]),
        ({"tools": [{"type": "function"}]}, "tools", ["tools"]),
        ({"response_format": {"type": "json_object"}}, "response_format", ["response_format"]),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], param: str, words: list[str]) -> None:
    error = refusal({"prompt": "hello", **fields})
    assert error.status == 400
    assert error.param == param
    for word in (param, *words):
        assert word in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "logprobs": False},
        {"suffix": "", "best_of": 1, "logit_bias": {}, "response_format": {"type": "text"}},
        {"repetition_penalty": 1.0, "something_new": [1]},
    ],
)
def test_unsupported_fields_that_ask_for_nothing_pass(fields: dict[str, Any]) -> None:
    assert completion(**fields).requests


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": NaN}'])
def test_malformed_json(body: bytes) -> None:
    error = refusal(body)
    assert (error.status, error.code) == (400, "invalid_json")
    assert "JSON" in error.message


@pytest.mark.parametrize("body", [[], 3, "x", None])
def test_json_that_is_no_object(body: Any) -> None:
    assert "object" in refusal(body).message


def test_lone_surrogate_is_refused_or_encoded() -> None:
    """Legal in JSON's escapes, no Unicode text: it must not become a 500."""
    assert refusal(rb'{"prompt": "\ud800"}').status == 400


def test_missing_prompt_and_messages_are_named() -> None:
    assert refusal({}).param == "prompt"
    assert refusal({}, chat=True).param == "messages"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "text"),
        (["x"], "object"),
    ],
)
def test_bad_messages(messages: Any, words: str) -> None:
    error = refusal({"messages": messages}, chat=True)
    assert (error.status, error.param) == (400, "messages")
    assert words in error.message


def test_unknown_model_is_a_404_that_names_both() -> None:
    error = refusal({"prompt": "x", "model": "gpt-9"})
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "gpt-9" in error.message
    assert "tiny" in error.message
    assert completion(model="alias").model == "alias"
    assert completion().model == "tiny"


def test_without_tokenizer_ids_are_taken_and_given() -> None:
    text = Text(None, None, vocab_size=330)
    error = refusal({"prompt": "hello"}, text=text)
    assert error.param == "prompt"
    assert "token ids" in error.message
    assert parse({"prompt": [1]}, text=text).return_token_ids


def test_chat_without_template_is_refused() -> None:
    text = Text(BYTE_LEVEL, None, vocab_size=330)
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert "chat template" in refusal(body, chat=True, text=text).message
