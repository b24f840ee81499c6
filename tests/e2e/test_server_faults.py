# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Workers are killed and clients leave in mid-request: nobody hangs, nothing leaks, no silent 200."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvxfer.testing.cluster import Cluster, wait_until

LONG = {"max_tokens": 400, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture
def cluster(random_llama: Path) -> Iterator[Cluster]:
    with Cluster(random_llama, "--prefill", "1", "--decode", "1") as running:
        yield running


class Stream(threading.Thread):
    """Reads one streamed completion on a thread: ids so far, whether it ended well, when it spoke last."""

    def __init__(self, cluster: Cluster, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self.cluster, self.prompt = cluster, prompt
        self.ids: list[int] = []
        self.done = False
        self.error = ""
        self.started = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for line in self.cluster.stream_lines({**LONG, "prompt": self.prompt}):
                payload = line.removeprefix("data: ")
                if payload == "[DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    message = json.loads(payload)
                    if "error" in message:
                        self.error = message["error"]["message"]
                    for choice in message.get("choices", []):
                        self.ids += choice.get("token_ids") or []
                    if len(self.ids) >= 5:
                        self.started.set()
        except (httpx.HTTPError, RuntimeError) as error:
            self.error = repr(error)
        self.started.set()


def idle_and_whole(cluster: Cluster) -> bool:
    """Every block is back: free + cached + active + leased == total, nothing active or leased."""
    try:
        blocks = cluster.blocks()
    except httpx.HTTPError:
        return False
    return bool(blocks) and blocks["active"] == blocks["leased"] == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_kill_in_mid_request_continues_or_says_so(cluster: Cluster, role: str) -> None:
    prompt = list(range(1, 200))
    expected = cluster.complete(prompt, **LONG)["choices"][0]["token_ids"]  # type: ignore[index]
    stream = Stream(cluster, prompt)
    assert stream.started.wait(20), cluster.output
    os.kill(cluster.worker(role), signal.SIGKILL)
    killed = time.monotonic()
    count = len(stream.ids)
    wait_until(
        lambda: stream.done or bool(stream.error) or len(stream.ids) > count,
        5,
        "the stream to go on",
    )
    stream.join(timeout=60)
    assert not stream.is_alive(), "the stream hangs"
    if stream.done:
        assert stream.ids == expected, "the continued answer differs from the undisturbed one"
    else:
        assert stream.error, "an answer was cut off with neither [DONE] nor an error"
    wait_until(lambda: idle_and_whole(cluster), 40, "all blocks to come back")
    # The launcher respawned the worker: the next request is handed off again.
    wait_until(lambda: len(cluster.children("--role")) == 2, 40, "the worker to be respawned")
    wait_until(cluster.ready, 60, "the respawned worker to serve")
    assert time.monotonic() - killed < 120
    assert cluster.complete(prompt, **LONG)["choices"][0]["token_ids"] == expected  # type: ignore[index]


def test_client_that_leaves_frees_both_sides(cluster: Cluster) -> None:
    body = {**LONG, "max_tokens": 1500, "prompt": list(range(1, 300))}
    for _ in range(3):
        with cluster.client.stream(
            "POST", "/v1/completions", json={**body, "stream": True}
        ) as answer:
            assert next(answer.iter_lines())
    wait_until(lambda: idle_and_whole(cluster), 10, "all blocks to come back")
    running = [
        v for k, v in cluster.metrics().items() if k.startswith("kvxfer:num_requests_running")
    ]
    assert sum(running) == 0


def test_without_a_prefill_worker_decode_answers_alone(random_llama: Path) -> None:
    with Cluster(random_llama, "--prefill", "0", "--decode", "1") as alone:
        answer = alone.complete([1, 2, 3], max_tokens=5)
        assert answer["usage"]["completion_tokens"] == 5  # type: ignore[index]


def test_sigterm_lets_running_answers_finish(cluster: Cluster) -> None:
    stream = Stream(cluster, list(range(1, 50)))
    assert stream.started.wait(20)
    cluster.process.send_signal(signal.SIGTERM)
    stream.join(timeout=40)
    assert stream.done, stream.error
    assert cluster.process.wait(timeout=45) == 0


def test_a_killed_launcher_leaves_no_orphans(random_llama: Path) -> None:
    cluster = Cluster(random_llama)
    children = cluster.children()
    assert len(children) >= 2
    cluster.process.kill()
    cluster.process.wait()
    wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in children),
        40,
        "the children to leave",
    )
    cluster.close()
