# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The handoff between two processes over the real engine: bytes, aborts, deaths, late writes."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("kvxfer._transfer", reason="the transfer engine is not built")

from handoff_process import HEAD_DIM, NUM_HEADS, NUM_LAYERS, Child, Prefill, Worker, kv_of

from kvxfer.connector import Accepted, Failed, Granted, Offered, Quiet
from kvxfer.connector.protocol import MAX_MESSAGE_NBYTES
from kvxfer.transfer import MAX_NOTIFICATION_NBYTES, probe_transports

ENDS = [48, 96, 131]  # chunks; the last block is partial
SOON_S = 5.0  # "within seconds", on a machine that others use too


@pytest.fixture(params=["tcp", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    reason = dict(probe_transports()).get(request.param, "not compiled in")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.fixture
def decode(transport: str) -> Iterator[Worker]:
    worker = Worker("decode", transport)
    yield worker
    worker.close()


@pytest.fixture
def prefill(transport: str) -> Iterator[Child]:
    child = Child("prefill", transport)
    yield child
    child.process.send_signal(signal.SIGCONT)
    assert child.close() in (0, -signal.SIGKILL)


def begin(decode: Worker, prefill: Child, *, layers: int, cached: int = 0) -> tuple[str, list[int]]:
    """Up to the moment when the sender has posted so many layers."""
    handoff = uuid.uuid4().hex
    decode.endpoint.receiver.expect(handoff, deadline_s=60.0)
    prefill.tell(
        "offer",
        handoff=handoff,
        seed=7,
        ends=ENDS,
        layers=layers,
        address=decode.engine.address,
        incarnation=decode.engine.incarnation,
    )
    assert decode.wait_event(Offered).num_tokens == ENDS[-1]
    num_blocks = -(-ENDS[-1] // decode.layout.block_size)
    blocks = list(range(3, 3 + 2 * num_blocks, 2))
    decode.endpoint.receiver.grant(handoff, blocks, token_begin=cached, token_end=ENDS[-1])
    assert prefill.wait("posted")["layers"] == layers
    return handoff, blocks


def untouched(decode: Worker, blocks: list[int]) -> bool:
    others = sorted(set(range(decode.layout.num_blocks)) - set(blocks))
    return all((part[others] == 0).all() for layer in decode.views for part in layer)


@pytest.mark.parametrize("cached", [0, 24, 50])
def test_the_kv_arrives_bitwise(
    decode: Worker, prefill: Child, transport: str, cached: int
) -> None:
    handoff, blocks = begin(decode, prefill, layers=NUM_LAYERS * len(ENDS), cached=cached)
    accepted = decode.wait_event(Accepted)
    prefill.wait("Quiet")
    for layer in range(NUM_LAYERS):
        for part in range(2):
            wanted = kv_of(7, layer, part, ENDS[-1])
            for token in range(ENDS[-1]):
                got = decode.token_view(layer, part, blocks, token)
                if token < cached:
                    assert (got == 0).all()
                else:
                    np.testing.assert_array_equal(
                        got.view(np.uint32), wanted[token].view(np.uint32)
                    )
    assert untouched(decode, blocks)
    nbytes = (ENDS[-1] - cached) * NUM_LAYERS * 2 * NUM_HEADS * HEAD_DIM * 4
    assert isinstance(accepted, Accepted)
    assert (accepted.handoff, accepted.first_tokens) == (handoff, (5,))
    assert (accepted.nbytes, accepted.transport) == (nbytes, transport)
    assert decode.endpoint.stats()["bytes_received"] == {transport: nbytes}
    (peer,) = decode.engine.stats()["peers"].values()
    assert peer["transport"][transport]["bytes_received"] >= nbytes


def test_many_handoffs_at_once_share_a_connection(decode: Worker, prefill: Child) -> None:
    """One after another in the blocks of the one before: nothing is mixed up."""
    for _ in range(5):
        _, blocks = begin(decode, prefill, layers=NUM_LAYERS * len(ENDS))
        decode.wait_event(Accepted)
        wanted = kv_of(7, 2, 1, ENDS[-1])
        got = [decode.token_view(2, 1, blocks, token) for token in range(ENDS[-1])]
        np.testing.assert_array_equal(np.stack(got), wanted)
        decode.array[:] = 0
        decode.log.clear()
    assert len(decode.engine.stats()["peers"]) == 1


def test_an_abort_of_decode_in_mid_transfer_ends_both(decode: Worker, prefill: Child) -> None:
    handoff, _ = begin(decode, prefill, layers=6)
    decode.endpoint.receiver.abort(handoff, "client gone")
    assert decode.wait_event(Failed).end == "client_gone"
    decode.wait_event(Quiet)
    assert prefill.wait("Failed")["end"] in ("client_gone", "write_failed")
    prefill.wait("Quiet")


def test_an_abort_of_prefill_in_mid_transfer_ends_both(decode: Worker, prefill: Child) -> None:
    handoff, _ = begin(decode, prefill, layers=6)
    prefill.tell("abort", handoff=handoff)
    assert prefill.wait("Failed")["end"] == "client_gone"
    prefill.wait("Quiet")
    failed = decode.wait_event(Failed)
    assert (failed.end, failed.retryable) == ("client_gone", True)
    decode.wait_event(Quiet)


def test_a_killed_prefill_fails_the_handoff_within_seconds(decode: Worker, prefill: Child) -> None:
    begin(decode, prefill, layers=6)
    prefill.process.kill()
    failed = decode.wait_event(Failed, SOON_S)
    assert (failed.end, failed.retryable) == ("peer_lost", True)
    decode.wait_event(Quiet, SOON_S)
    assert decode.endpoint.next_deadline() is None


def test_a_killed_decode_fails_the_handoff_within_seconds(transport: str) -> None:
    child, worker = Child("decode", transport), Worker("prefill", transport)
    try:
        child.tell("expect", handoff="h", blocks=list(range(20)))
        sender = Prefill(worker, "h", 7, ENDS)
        sender.offer(child.address, child.incarnation)
        worker.wait_event(Granted)
        sender.start()
        sender.post(6)
        child.process.kill()
        failed = worker.wait_event(Failed, SOON_S)
        assert (failed.end, failed.retryable) == ("peer_lost", True)
        worker.wait_event(Quiet, SOON_S)
        sender.post(NUM_LAYERS * len(ENDS))  # the forward pass goes on to its end: ignored
        assert worker.endpoint.stats()["layers_after_end"] > 0
    finally:
        worker.close()
        assert child.close() == -signal.SIGKILL


def test_a_stopped_prefill_does_not_hold_the_blocks(decode: Worker, prefill: Child) -> None:
    """And what it posts when it wakes is refused: the blocks were given to somebody else."""
    handoff, _ = begin(decode, prefill, layers=6)
    prefill.process.send_signal(signal.SIGSTOP)
    decode.endpoint.receiver.abort(handoff, "the router lost the prefill worker")
    decode.wait_event(Quiet, SOON_S)
    decode.array[:] = 0xAB
    # It works on before it hears of the abort.
    prefill.tell("post", layers=NUM_LAYERS * len(ENDS))
    prefill.process.send_signal(signal.SIGCONT)
    assert prefill.wait("Failed")["end"] in ("client_gone", "write_failed")
    prefill.wait("Quiet")
    assert (decode.array == 0xAB).all()


def test_a_write_after_the_lease_ended_is_refused_and_counted(
    decode: Worker, prefill: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    handoff, _ = begin(decode, prefill, layers=6)
    # Its abort is lost, so that the sender goes on in good faith.
    monkeypatch.setattr(decode.endpoint.receiver, "_answer", lambda peer, handoff: None)
    decode.endpoint.receiver.abort(handoff, "client gone")
    decode.wait_event(Quiet)
    decode.array[:] = 0xAB
    prefill.tell("post", layers=NUM_LAYERS * len(ENDS))
    failed = prefill.wait("Failed")
    assert (failed["end"], failed["retryable"]) == ("write_failed", True)
    prefill.wait("Quiet")
    assert decode.engine.stats()["late_writes_refused"] > 0
    assert (decode.array == 0xAB).all()


def test_the_biggest_message_fits_the_engines_notification() -> None:
    assert MAX_MESSAGE_NBYTES <= MAX_NOTIFICATION_NBYTES
