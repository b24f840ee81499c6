# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Real transfer engines and a real model under two engine threads: what arrives is what was computed, bit
for bit, and the answer is made of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_model import request_of

from kvxfer import KVLayout, TransferEngine
from kvxfer.connector import Endpoint
from kvxfer.server.config import load_config
from kvxfer.server.engine.blocks import BlockPool
from kvxfer.server.engine.loop import EngineLoop
from kvxfer.server.engine.requests import Delivery
from kvxfer.server.engine.runner import Runner, torch_views
from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Event, Limits, Output, Role, Sequence
from kvxfer.server.metrics import Metrics
from kvxfer.server.model import CausalLM
from kvxfer.server.weights import load_weights, parse_dtype
from kvxfer.server.wire import KVTransferParams, PeerRef, PrefillReply, TokenRequest, Tokens, Usage
from kvxfer.testing.cluster import wait_until
from kvxfer.testing.models import make_random_checkpoint

BLOCK_SIZE = 16
PROMPT = [(7 * i) % 251 for i in range(150)]


class Side:
    """One worker without its HTTP: engine thread, model, cache and transfer engine."""

    def __init__(self, name: str, model_dir: Path) -> None:
        cfg = load_config(model_dir)
        dtype = parse_dtype("float32", cfg)
        layout = KVLayout.hnd(
            num_layers=cfg.num_layers,
            num_blocks=40,
            block_size=BLOCK_SIZE,
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            dtype="float32",
        )
        self.engine = TransferEngine(name, secret="a secret of sixteen bytes or more")
        region = self.engine.allocate(layout.nbytes, name="kv")
        self.views = layout.views(region.array)
        model = CausalLM(cfg, load_weights(model_dir, cfg, dtype), dtype)
        self.runner = Runner(model, torch_views(self.views, dtype), BLOCK_SIZE, num_threads=1)
        self.scheduler = Scheduler(
            BlockPool(40, BLOCK_SIZE),
            Limits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=600),
            copy_block=self.runner.copy_block,
        )
        self.loop = EngineLoop(
            self.scheduler,
            self.runner,
            Endpoint(self.engine, region, layout, model_id="model"),
            self.engine.fileno(),
            Metrics(),
            deliver=self._deliver,
        )
        self.loop.start()

    def _deliver(self, batch: list[Delivery]) -> None:
        for sink, event in batch:
            sink(event)

    def open(
        self, spec: TokenRequest, role: Role, other: Side
    ) -> tuple[list[Event], threading.Event]:
        peer = PeerRef(
            engine=other.engine.address,
            incarnation=other.engine.incarnation,
            signature="s",
            model="model",
        )
        if role != "local":
            params = KVTransferParams(role=role, peer=peer)
            spec = msgspec.structs.replace(spec, kv_transfer_params=params)
        events: list[Event] = []
        ended = threading.Event()

        def sink(event: Event) -> None:
            events.append(event)
            if not isinstance(event, Tokens) and hasattr(event, "timeline"):
                ended.set()

        self.loop.submit(spec, role, sink)
        return events, ended

    def kv_of(self, blocks: list[int], num_tokens: int) -> np.ndarray[Any, Any]:
        """All layers and parts of these tokens, copied."""
        parts = [
            part[blocks].reshape(-1, *part.shape[2:])[:num_tokens]
            for layer in self.views
            for part in layer
        ]
        return np.stack(parts)

    def whole(self) -> bool:
        counts = self.loop.snapshot.blocks
        return self.loop.idle and counts.active == counts.leased == 0

    def close(self) -> None:
        self.loop.close()
        self.engine.close()


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    make_random_checkpoint(tmp_path, "llama", seed=3, num_heads=4, num_kv_heads=2, head_dim=32)
    prefill, decode = Side("prefill", tmp_path), Side("decode", tmp_path)
    yield prefill, decode
    prefill.close()
    decode.close()


def ids_of(events: list[Event]) -> list[int]:
    return [i for event in events if isinstance(event, Tokens) for i in event.ids]


def on_accept(side: Side, act: Callable[[Sequence], None]) -> None:
    """Runs ``act`` when the KV has arrived, before the first step that reads it."""
    activate = side.scheduler.activate

    def acting(sequence: Sequence, first_tokens: list[int]) -> list[Output]:
        act(sequence)
        return activate(sequence, first_tokens)

    side.scheduler.activate = acting  # type: ignore[method-assign]


def hand_off(prefill: Side, decode: Side, name: str) -> list[int]:
    spec = request_of(PROMPT, 12, ignore_eos=True, name=name)
    answer, answered = decode.open(spec, "decode", prefill)
    reply, replied = prefill.open(spec, "prefill", decode)
    assert answered.wait(60), answer
    assert replied.wait(60), reply
    assert isinstance(answer[-1], Usage), answer
    assert isinstance(reply[-1], PrefillReply)
    assert reply[-1].status == "handed_off"
    for side in (prefill, decode):
        wait_until(side.whole, 20, "all blocks to come back")
    return ids_of(answer)


def test_moved_kv_is_bitwise_equal_and_the_answer_that_of_a_lone_worker(
    sides: tuple[Side, Side],
) -> None:
    prefill, decode = sides
    sent: list[np.ndarray[Any, Any]] = []
    arrived: list[np.ndarray[Any, Any]] = []
    on_accept(decode, lambda s: arrived.append(decode.kv_of(s.block_ids, len(PROMPT))))
    remove = prefill.scheduler.remove

    def keep(sequence: Sequence) -> None:
        sent.append(prefill.kv_of(sequence.block_ids, len(PROMPT)))
        remove(sequence)

    prefill.scheduler.remove = keep  # type: ignore[method-assign]
    handed = hand_off(prefill, decode, "moved")
    assert np.isfinite(sent[0]).all()
    assert np.abs(sent[0]).min(axis=(1, 2, 3)).max() > 0, "the prompt's KV is all zeros"
    assert sent[0].tobytes() == arrived[0].tobytes()

    alone, ended = prefill.open(
        request_of(PROMPT, 12, ignore_eos=True, name="alone", cache_salt="x"), "local", decode
    )
    assert ended.wait(60)
    assert ids_of(alone) == handed


def test_zeroing_the_moved_kv_changes_the_answer(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides

    def wipe(sequence: Sequence) -> None:
        for layer in decode.views:
            for part in layer:
                part[sequence.block_ids] = 0

    on_accept(decode, wipe)
    wiped = hand_off(prefill, decode, "wiped")
    alone, ended = prefill.open(
        request_of(PROMPT, 12, ignore_eos=True, name="alone", cache_salt="x"), "local", decode
    )
    assert ended.wait(60)
    good = ids_of(alone)
    assert wiped[0] == good[0], "the first token came with the commit"
    assert wiped != good
