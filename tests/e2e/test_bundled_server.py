# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a person sees who types `make serve` and follows the README."""

from __future__ import annotations

import json
import re

import httpx

from kvxfer.testing.cluster import Cluster


def test_def_becomes_python(bundled: Cluster) -> None:
    answer = bundled.complete("def ", max_tokens=40)
    text = answer["choices"][0]["text"]  # type: ignore[index]
    assert re.match(r"\w+\(.*", text), text


def test_bytes_moved_are_in_metrics(bundled: Cluster) -> None:
    def moved() -> float:
        metrics = bundled.metrics()
        return sum(v for k, v in metrics.items() if k.startswith("kvxfer:kv_transfer_bytes_total"))

    before = moved()
    prompt = list(range(300, 400))
    bundled.complete(prompt, max_tokens=2)
    # 5 layers, K and V, 2 heads of 64 in float32; each side counts what it sent or received.
    assert moved() - before >= 100 * 5 * 2 * 2 * 64 * 4
    names = [k for k in bundled.metrics() if k.startswith("kvxfer:kv_transfer_bytes_total")]
    assert all("transport=" in name for name in names)


def test_stream_ends_with_usage_and_done(bundled: Cluster) -> None:
    body = {
        "prompt": "import ",
        "max_tokens": 8,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    lines = list(bundled.stream_lines(body))
    assert lines[-1] == "data: [DONE]"
    messages = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert messages[-1]["choices"] == []
    assert messages[-1]["usage"]["completion_tokens"] <= 8
    text = "".join(c["text"] for m in messages for c in m["choices"])
    whole = bundled.complete("import ", max_tokens=8)["choices"][0]["text"]  # type: ignore[index]
    assert text == whole


def test_chat_and_models(bundled: Cluster) -> None:
    (model,) = bundled.client.get("/v1/models").raise_for_status().json()["data"]
    body = {
        "model": model["id"],
        "messages": [{"role": "user", "content": "def main"}],
        "max_tokens": 8,
    }
    answer = bundled.client.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["object"] == "chat.completion"


def test_request_id_comes_back(bundled: Cluster) -> None:
    answer = bundled.client.post(
        "/v1/completions",
        json={"prompt": "x", "max_tokens": 1},
        headers={"X-Request-Id": "mine-17"},
    )
    assert answer.headers["x-request-id"] == "mine-17"


def test_seeded_sampling_repeats(bundled: Cluster) -> None:
    def ask(seed: int) -> str:
        answer = bundled.complete("class ", max_tokens=24, temperature=0.8, seed=seed)
        return str(answer["choices"][0]["text"])  # type: ignore[index]

    assert ask(5) == ask(5)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_prompt_of_sixteen_thousand_tokens(bundled: Cluster) -> None:
    prompt = [(17 * i) % 1500 + 300 for i in range(16000)]
    answer = bundled.complete(prompt, max_tokens=4, ignore_eos=True)
    assert answer["usage"]["prompt_tokens"] == 16000  # type: ignore[index]
    assert answer["usage"]["completion_tokens"] == 4  # type: ignore[index]


def test_health(bundled: Cluster) -> None:
    assert bundled.client.get("/health").status_code == 200
    assert bundled.client.get("/readiness").status_code == 200


def test_internal_routes_are_closed_to_strangers(bundled: Cluster) -> None:
    worker_ports = re.findall(r"http://127\.0\.0\.1:(\d+)", bundled.output)
    for path in ("/workers",):
        assert httpx.post(bundled.url + path, json={"url": "http://127.0.0.1:9"}).status_code in (
            401,
            403,
        )
    for port in worker_ports:
        url = f"http://127.0.0.1:{port}"
        if url != bundled.url:
            assert httpx.get(url + "/internal/state").status_code == 401
