# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer worker`: how big its cache is, what it refuses at start, and two real ones with a handoff between."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.config import load_config
from kvxfer.server.wire import (
    ErrorEvent,
    KVTransferParams,
    PeerRef,
    PrefillReply,
    Reserved,
    SamplingParams,
    TokenEvent,
    TokenRequest,
    Tokens,
    Usage,
    WorkerState,
    decode_event,
)
from kvxfer.server.worker import add_arguments, cache_size, check_secret
from kvxfer.testing.cluster import wait_until
from kvxfer.testing.models import make_random_checkpoint
from kvxfer.testing.reference import CLEAR_GAP_RATIO, reference_greedy

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("models") / "qwen3"
    make_random_checkpoint(model_dir, "qwen3", seed=4, num_heads=4, num_kv_heads=2, head_dim=32)
    return model_dir


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["model", *words])


def test_default_cache_holds_two_longest_sequences(checkpoint: Path) -> None:
    cfg = load_config(checkpoint)
    assert cfg.max_model_len == 4096
    assert cache_size(arguments(), cfg, 1024) == (32768 // 16, 4096)
    assert cache_size(arguments("--num-blocks", "100"), cfg, 1024) == (100, 1600)
    # 4 GiB at 1 MiB a token are 4096 tokens.
    assert cache_size(arguments(), cfg, 1 << 20) == (4096 // 16, 4096)
    assert cache_size(arguments(), cfg, 2 << 20) == (2048 // 16, 2048)
    assert cache_size(arguments("--max-model-len", "512"), cfg, 1024)[1] == 512


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--max-model-len", "5000"], "4096"),
        (["--max-model-len", "0"], "from 1 to"),
        (["--num-blocks", "2", "--max-model-len", "100"], "hold 32 tokens"),
        (["--block-size", "0"], "--block-size"),
    ],
)
def test_impossible_sizes_are_refused(checkpoint: Path, words: list[str], told: str) -> None:
    with pytest.raises(InvalidArgumentError, match=told):
        cache_size(arguments(*words), load_config(checkpoint), 1024)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.3.2.1"])
def test_loopback_needs_no_secret(host: str) -> None:
    check_secret(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_other_hosts_need_a_secret(host: str) -> None:
    with pytest.raises(InvalidArgumentError, match="KVXFER_SECRET"):
        check_secret(host, None)
    check_secret(host, SECRET)


def command(model_dir: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "kvxfer", "worker", str(model_dir), "--threads", "1", *words]


def test_unknown_model_is_one_line_and_status_1(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "nowhere"), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


class WorkerProcess:
    def __init__(self, model_dir: Path, role: str, *words: str) -> None:
        announce, announce_end = os.pipe()
        lifeline_end, self.lifeline = os.pipe()
        fds = ("--announce-fd", str(announce_end), "--lifeline-fd", str(lifeline_end))
        self.process = subprocess.Popen(
            command(model_dir, "--role", role, *fds, *words),
            pass_fds=(announce_end, lifeline_end),
            env={**os.environ, "KVXFER_SECRET": SECRET},
            start_new_session=True,
        )
        os.close(announce_end)
        os.close(lifeline_end)
        self.role, self._announce = role, announce

    def wait_until_ready(self) -> None:
        with os.fdopen(self._announce) as pipe:
            line = pipe.readline()
        assert line, f"the {self.role} worker ended with {self.process.wait()}"
        told = json.loads(line)
        assert (told["role"], told["pid"]) == (self.role, self.process.pid)
        self.client = httpx.Client(
            base_url=told["url"],
            headers={"Authorization": f"Bearer {SECRET}"},
            timeout=60,
            trust_env=False,
        )
        self.incarnation = told["incarnation"]

    def state(self) -> WorkerState:
        answer = self.client.get("/internal/state").raise_for_status()
        return msgspec.json.decode(answer.content, type=WorkerState)

    def reference(self) -> PeerRef:
        state = self.state()
        return PeerRef(
            engine=state.engine,
            incarnation=state.incarnation,
            signature=state.signature,
            model=state.model,
        )

    def whole(self) -> bool:
        state = self.state()
        return state.active == state.leased == state.running == state.waiting == 0

    def moved(self, direction: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        wanted = [li for li in lines if "kv_transfer_bytes_total{" in li and direction in li]
        return sum(float(line.rsplit(" ", 1)[1]) for line in wanted)

    def generate(self, spec: TokenRequest) -> Iterator[TokenEvent]:
        body = msgspec.json.encode(spec)
        with self.client.stream("POST", "/internal/generate", content=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                yield decode_event(line.encode())

    def close(self) -> None:
        if hasattr(self, "client"):
            self.client.close()
        with contextlib.suppress(OSError):
            os.close(self.lifeline)  # it drains and leaves
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def started(model_dir: Path) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    # Small steps, so that a long prompt takes many and a test can act in the midst of it.
    sizes = ("--max-num-batched-tokens", "32", "--max-num-seqs", "16")
    with contextlib.ExitStack() as stack:
        workers = [WorkerProcess(model_dir, role, *sizes) for role in ("prefill", "decode")]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:  # both load at the same time
            worker.wait_until_ready()
        yield workers[0], workers[1]


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    with started(checkpoint) as workers:
        yield workers


def request(prompt: list[int], max_tokens: int, name: str, **fields: Any) -> TokenRequest:
    return TokenRequest(
        request_id=name,
        handoff=name.encode().hex().ljust(32, "0"),
        deadline_s=60.0,
        prompt=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        **fields,
    )


class Handoff:
    """Both legs of a request, opened at once; decode's events are read by the test."""

    def __init__(
        self, prefill: WorkerProcess, decode: WorkerProcess, prompt: list[int], n: int, name: str
    ) -> None:
        self.reply: PrefillReply | None = None
        params = KVTransferParams(role="decode", peer=prefill.reference())
        self.spec = request(prompt, n, name, kv_transfer_params=params)
        self.events = decode.generate(self.spec)
        self._thread = threading.Thread(
            target=self._prefill, args=(prefill, decode.reference()), daemon=True
        )
        self._thread.start()

    def _prefill(self, prefill: WorkerProcess, peer: PeerRef) -> None:
        params = KVTransferParams(role="prefill", peer=peer)
        body = msgspec.structs.replace(self.spec, kv_transfer_params=params)
        with contextlib.suppress(httpx.TransportError):
            answer = prefill.client.post("/internal/prefill", content=msgspec.json.encode(body))
            self.reply = msgspec.json.decode(answer.content, type=PrefillReply)

    def join(self) -> PrefillReply | None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the prefill leg hangs"
        return self.reply


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [i for event in events if isinstance(event, Tokens) for i in event.ids]


def test_two_processes_hand_off_and_answer_like_transformers(
    pair: tuple[WorkerProcess, WorkerProcess], checkpoint: Path
) -> None:
    prefill, decode = pair
    generator = np.random.default_rng(1)
    prompts = [generator.integers(0, 256, n).tolist() for n in (1, 16, 17, 33, 100, 300)]
    answers, gaps = reference_greedy(checkpoint, prompts, 8)
    kept = [i for i, gap in enumerate(gaps) if gap > CLEAR_GAP_RATIO]
    assert len(kept) >= 4
    for index in kept:
        before = decode.moved("received")
        handoff = Handoff(prefill, decode, prompts[index], 8, f"h{index}")
        events = list(handoff.events)
        assert ids_of(events) == answers[index]
        assert isinstance(events[-1], Usage)
        reply = handoff.join()
        assert reply is not None
        assert reply.status == "handed_off"
        nbytes = len(prompts[index]) * 2 * 2 * 2 * 32 * 4  # layers, k and v, heads, dim, float32
        assert decode.moved("received") - before == nbytes
        alone = request(prompts[index], 8, f"a{index}", cache_salt="alone")
        assert ids_of(list(decode.generate(alone))) == answers[index]
    wait_until(lambda: prefill.whole() and decode.whole(), 10, "all blocks to come back")
    assert prefill.moved("sent") == decode.moved("received")


def begun(prefill: WorkerProcess, decode: WorkerProcess, name: str) -> Handoff:
    """A handoff of many chunks, of which the first are under way."""
    handoff = Handoff(prefill, decode, [i % 250 for i in range(3500)], 8, name)
    assert any(isinstance(event, Reserved) for event in handoff.events)
    return handoff


def test_leg_closed_in_mid_handoff_frees_both_sides(
    pair: tuple[WorkerProcess, WorkerProcess],
) -> None:
    prefill, decode = pair
    handoff = begun(prefill, decode, "closed")
    handoff.events.close()  # type: ignore[attr-defined]
    reply = handoff.join()
    assert reply is not None
    assert (reply.status, reply.code) == ("failed", "client_gone")
    wait_until(lambda: prefill.whole() and decode.whole(), 10, "all blocks to come back")


def test_killed_prefill_ends_the_leg_and_decode_goes_on_and_drains(checkpoint: Path) -> None:
    with started(checkpoint) as (prefill, decode):
        handoff = begun(prefill, decode, "killed")
        prefill.process.kill()
        last = list(handoff.events)[-1]
        assert isinstance(last, ErrorEvent)
        assert (last.code, last.retryable) == ("peer_lost", True)
        handoff.join()
        wait_until(decode.whole, 5, "decode's blocks to come back")
        events = decode.generate(request([5, 6, 7], 60, "alone"))
        got = [next(events) for _ in range(3)]
        decode.process.send_signal(signal.SIGTERM)
        wait_until(lambda: decode.state().draining, 5, "the drain")
        got += list(events)
        assert len(ids_of(got)) == 60, "SIGTERM cut off an answer"
        assert isinstance(got[-1], Usage)
        assert decode.process.wait(timeout=20) == 0


def test_killed_decode_ends_the_leg_and_prefill_leaves_with_its_launcher(checkpoint: Path) -> None:
    with started(checkpoint) as (prefill, decode):
        handoff = begun(prefill, decode, "killed")
        decode.process.kill()
        with contextlib.suppress(httpx.TransportError):
            list(handoff.events)
        reply = handoff.join()
        assert reply is not None
        assert (reply.status, reply.code, reply.retryable) == ("failed", "peer_lost", True)
        wait_until(prefill.whole, 5, "prefill's blocks to come back")
        os.close(prefill.lifeline)
        assert prefill.process.wait(timeout=20) == 0
