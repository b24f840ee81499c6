# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One leg of a request, its sequences (one per choice), and what a step computes of them: plain data.

Only the engine thread touches these.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvxfer.server.wire import PrefillReply, TokenEvent, TokenRequest

__all__ = [
    "Chunk",
    "Event",
    "Limits",
    "Output",
    "Request",
    "Role",
    "Sequence",
    "Sink",
    "State",
]

Role = Literal["local", "prefill", "decode"]
Event = TokenEvent | PrefillReply
Sink = Callable[[Event], None]  # called on the HTTP side's thread, never on the engine's


class State(enum.Enum):
    """Memory that outlives its sequence (a lease that is not quiet yet) is a handoff's, not a state here."""

    WAITING = "waiting"  # queued; on the decode side also: nobody offered yet. Holds no block
    OFFERED = "offered"  # prefill: decode was asked for blocks. decode: waits for blocks of its own
    GRANTED = "granted"  # prefill: decode has the blocks, now this side waits for its own
    RESERVED = "reserved"  # decode: blocks are granted to the peer, who fills them
    PREFILLING = "prefilling"
    RUNNING = (
        "running"  # one id short of computed: each step computes that one and samples the next
    )
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    spec: TokenRequest
    role: Role
    sink: Sink
    received: float  # monotonic, as every time here
    sequences: list[Sequence] = field(default_factory=list)
    cached_tokens: int | None = (
        None  # None until the first block lookup, here or on the prefill side
    )
    timeline: dict[str, float] = field(default_factory=dict)
    last_token: float | None = None
    ended: bool = False

    @property
    def deadline(self) -> float:
        return self.received + self.spec.deadline_s

    def mark(self, stage: str, now: float) -> None:
        """The first time counts: a preempted sequence starts twice, its request did not."""
        self.timeline.setdefault(stage, now - self.received)


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    choice: int
    ids: list[int]  # prompt, then answers; the last may not be computed yet
    state: State = State.WAITING
    num_computed: int = 0  # ids whose KV is in block_ids
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(
        default_factory=list
    )  # of the full blocks of ids, extended on demand
    num_published: int = 0  # of block_ids, how many the pool knows by hash
    num_chunks: int = 0  # prefill chunks computed so far: the handoff's chunk index

    @property
    def num_prompt(self) -> int:
        return len(self.request.spec.prompt)

    @property
    def num_outputs(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def history(self) -> list[int]:
        """Ids that count as answers, those of earlier attempts included."""
        return self.ids[self.num_prompt - self.request.spec.position0 :]


@dataclass(frozen=True, slots=True)
class Limits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_waiting: int = 1024
    max_waiting_tokens: int = 4_000_000


class Chunk(NamedTuple):
    """Compute ``ids[begin:end]`` of this sequence; sample if that reaches its last id."""

    sequence: Sequence
    begin: int
    end: int
    num_samples: int  # choices to draw from the last token's logits; 0 for all chunks but the last


class Output(NamedTuple):
    sequence: Sequence
    token: int
    finish: Literal["stop", "length"] | None
