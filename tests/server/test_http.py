# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The front as a client sees it, over a real socket: bodies, streams, errors in every case, and leaving early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from front_fakes import BYTE_LEVEL, LETTERS, FakeBackend, Script, answer_ids, serving

from kvxfer.server.chat_template import ChatTemplate
from kvxfer.server.http import create_app
from kvxfer.server.text import Text
from kvxfer.server.wire import (
    ErrorEvent,
    Finish,
    Queued,
    RequestRefusedError,
    TokenEvent,
    TokenRequest,
    Tokens,
    Usage,
)

TEXT = Text(
    BYTE_LEVEL,
    ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {}),
    vocab_size=330,
)


class Front:
    """A served app over a fake backend, whose script each test sets."""

    def __init__(self, client: httpx.Client, backend: FakeBackend) -> None:
        self.client = client
        self.backend = backend

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def lines(self, path: str = "/v1/completions", **body: Any) -> list[str]:
        with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [line for line in answer.iter_lines() if line]

    def expected(self, number: int = -1, choice: int = 0) -> str:
        return TEXT.decode(answer_ids(self.backend.requests[number], choice))


@pytest.fixture(scope="module")
def served() -> Iterator[Front]:
    backend = FakeBackend()
    app = create_app(backend, TEXT, ["tiny"], max_body_nbytes=4096)

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("a bug")

    with serving(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield Front(client, backend)


@pytest.fixture
def front(served: Front) -> Iterator[Front]:
    yield served
    served.backend.script = served.backend.plain


def messages_of(lines: list[str]) -> list[dict[str, Any]]:
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_completion_body(front: Front) -> None:
    answer = front.post(prompt="hello", max_tokens=5, return_token_ids=True)
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["text"] == front.expected()
    assert choice["finish_reason"] == "length"
    assert choice["token_ids"] == answer_ids(front.backend.requests[-1], 0)
    num_prompt = len(TEXT.encode("hello"))
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 5,
        "total_tokens": num_prompt + 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_chat_body(front: Front) -> None:
    body = front.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=3
    ).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": front.expected()}
    assert body["id"].startswith("chatcmpl-")


def test_choices_and_prompts_keep_their_order(front: Front) -> None:
    body = front.post(prompt=["hello", "world"], n=2, max_tokens=4, echo=True).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    by_prompt = {TEXT.decode(r.prompt): r for r in front.backend.requests[-2:]}
    expected = [
        prompt + TEXT.decode(answer_ids(by_prompt[prompt], i))
        for prompt in ("hello", "world")
        for i in (0, 1)
    ]
    assert [c["text"] for c in body["choices"]] == expected
    assert body["usage"]["completion_tokens"] == 16


def test_stream_adds_up_to_the_body(front: Front) -> None:
    chunks = messages_of(front.lines(prompt="hello", max_tokens=6))
    assert all("usage" not in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(c["text"] for c in choices) == front.expected()
    assert [c["finish_reason"] for c in choices] == [None] * 6 + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_chat_stream_begins_with_the_role_of_each_choice(front: Front) -> None:
    lines = front.lines(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        n=2,
        max_tokens=3,
        stream_options={"include_usage": True},
    )
    *chunks, last = messages_of(lines)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks)
    for i in (0, 1):
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all(set(delta) == {"content"} for delta in deltas[1:])
        assert "".join(d["content"] for d in deltas) == front.expected(choice=i)


def test_streamed_prompts_are_told_apart(front: Front) -> None:
    chunks = messages_of(front.lines(prompt=["hello", "x"], max_tokens=3, echo=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    by_prompt = {TEXT.decode(r.prompt): r for r in front.backend.requests[-2:]}
    for i, prompt in enumerate(("hello", "x")):
        assert texts[i] == prompt + TEXT.decode(answer_ids(by_prompt[prompt], 0))


def test_stop_string_cuts_closes_and_is_not_billed(front: Front) -> None:
    whole = front.post(prompt="hello", max_tokens=40).json()["choices"][0]["text"]
    stop = whole[7:9]
    assert front.backend.closed.acquire(timeout=5)
    body = front.post(prompt="hello", max_tokens=40, stop=[stop]).json()
    assert body["choices"][0]["text"] == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == whole.index(stop) + 2
    assert front.backend.closed.acquire(timeout=5)
    lines = front.lines(prompt="hello", max_tokens=40, stop=stop)
    texts = [c["text"] for chunk in messages_of(lines) for c in chunk["choices"]]
    assert "".join(texts) == whole[: whole.index(stop)]


def test_models_health_version_metrics(front: Front) -> None:
    (model,) = front.client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 64)
    assert front.client.get("/v1/models/tiny").json() == model
    assert front.client.get("/v1/models/other").status_code == 404
    assert front.client.get("/health").status_code == 200
    assert front.client.get("/metrics").text == "fake 1\n"
    assert "version" in front.client.get("/version").json()
    assert front.client.get("/readiness").status_code == 200
    front.backend.is_ready = (False, "no decode worker")
    answer = front.client.get("/readiness")
    front.backend.is_ready = (True, "")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no decode worker")


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("ask", "status", "code"),
    [
        (lambda c: c.get("/nowhere"), 404, "not_found"),
        (lambda c: c.get("/v1/completions"), 405, "method_not_allowed"),
        (lambda c: c.post("/v1/completions", content=b"{"), 400, "invalid_json"),
        (lambda c: c.post("/v1/completions", content=b"x" * 5000), 413, "body_too_large"),
        (lambda c: c.post("/v1/completions", content=b"x" * 40_000), 413, "body_too_large"),
        (
            lambda c: c.post("/v1/completions", json={"prompt": "x", "model": "y"}),
            404,
            "model_not_found",
        ),
        (lambda c: c.post("/v1/completions", json={"prompt": [400]}), 400, "invalid_value"),
        (lambda c: c.post("/v1/chat/completions", json={"messages": 3}), 400, "invalid_value"),
        (lambda c: c.get("/bug"), 500, "internal"),
    ],
)
def test_every_error_has_openais_form(
    front: Front, ask: Callable[[httpx.Client], httpx.Response], status: int, code: str
) -> None:
    error = error_of(ask(front.client), status)
    assert error["code"] == code
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


def test_a_client_is_told_that_a_bug_ends_its_connection(front: Front) -> None:
    assert front.client.get("/bug").headers["connection"] == "close"
    assert front.client.get("/health").headers.get("connection") != "close"


def test_request_id_is_echoed_or_made(front: Front) -> None:
    def ask(given: str) -> httpx.Response:
        return front.client.post(
            "/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": given}
        )

    answer = ask("mine-17")
    assert answer.headers["x-request-id"] == "mine-17"
    assert answer.json()["id"] == "cmpl-mine-17"
    assert ask("x" * 500).headers["x-request-id"] != "x" * 500
    made = {front.post(prompt="x").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    # Clients repeat ids; what goes downstream does not.
    assert ask("same").headers["x-request-id"] == ask("same").headers["x-request-id"] == "same"
    assert len({r.request_id for r in front.backend.requests[-2:]}) == 2


def refuses(error: Exception) -> Script:
    async def script(request: TokenRequest) -> AsyncIterator[TokenEvent]:
        raise error
        yield Queued()

    return script


def says(*events: TokenEvent) -> Script:
    async def script(request: TokenRequest) -> AsyncIterator[TokenEvent]:
        for event in events:
            yield event

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_keeps_its_status_and_says_when_to_come_back(front: Front, stream: bool) -> None:
    front.backend.script = refuses(
        RequestRefusedError(503, "full", code="overloaded", retry_after_s=2.4)
    )
    answer = front.post(prompt="x", stream=stream)
    assert error_of(answer, 503)["code"] == "overloaded"
    assert answer.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"), [("peer_lost", 503), ("deadline", 504), ("internal", 500)]
)
def test_error_before_the_first_token_is_an_http_status(
    front: Front, stream: bool, code: str, status: int
) -> None:
    front.backend.script = says(Queued(), ErrorEvent(code=code, message="why", retryable=False))
    assert error_of(front.post(prompt="x", stream=stream), status)["message"] == "why"


ONE = Tokens(i=0, ids=(LETTERS[0],), pos=0)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (says(ONE, ErrorEvent(code="peer_lost", message="gone", retryable=True)), "peer_lost"),
        (says(ONE), "internal"),  # a backend that just stops must not look like a good end
        (says(ONE, Usage(prompt_tokens=1, completion_tokens=1)), "internal"),
    ],
)
def test_error_in_mid_stream_is_an_event_without_done(
    front: Front, script: Script, code: str
) -> None:
    front.backend.script = script
    lines = front.lines(prompt="x", stream=True)
    assert lines[-2] == "event: error"
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == code
    assert "data: [DONE]" not in lines
    answer = front.post(prompt="x")
    assert error_of(answer, 500 if code == "internal" else 503)["code"] == code


def test_bug_in_mid_stream_is_an_error_event(front: Front) -> None:
    async def script(request: TokenRequest) -> AsyncIterator[TokenEvent]:
        yield ONE
        raise ZeroDivisionError

    front.backend.script = script
    assert front.lines(prompt="x")[-2] == "event: error"


def test_a_failing_prompt_ends_its_siblings(front: Front) -> None:
    while front.backend.closed.acquire(blocking=False):
        pass

    async def script(request: TokenRequest) -> AsyncIterator[TokenEvent]:
        if len(request.prompt) == 1:
            raise RequestRefusedError(503, "full", code="overloaded")
        yield ONE
        await asyncio.Event().wait()

    front.backend.script = script
    assert error_of(front.post(prompt=[[1], [1, 2]]), 503)
    assert front.backend.closed.acquire(timeout=5)
    assert front.backend.closed.acquire(timeout=5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
def test_client_that_leaves_closes_the_backend(
    front: Front, stream: bool, begun: bool, prompt: Any
) -> None:
    while front.backend.closed.acquire(blocking=False):
        pass
    forever = asyncio.Event()

    async def script(request: TokenRequest) -> AsyncIterator[TokenEvent]:
        yield Queued()
        if begun:
            yield ONE
        await forever.wait()

    front.backend.script = script
    body = {"prompt": prompt, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):  # the client gives up and closes its socket
        front.client.post("/v1/completions", json=body, timeout=0.5)
    for _ in range(1 if prompt == "x" else 2):
        assert front.backend.closed.acquire(timeout=5), "the backend was not closed"


def test_held_back_text_comes_with_the_finish(front: Front) -> None:
    euro = TEXT.encode("€")
    front.backend.script = says(
        Tokens(i=0, ids=tuple(euro[:-1]), pos=0),
        Finish(i=0, reason="length"),
        Usage(prompt_tokens=1, completion_tokens=2),
    )
    (chunk,) = messages_of(front.lines(prompt="x"))
    assert set(chunk["choices"][0]["text"]) == {"\ufffd"}
