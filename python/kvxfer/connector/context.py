# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the sender's and the receiver's state machines share: the engine, peers, tombstones, counters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvxfer.connector.events import Event, Failed, HandoffConfig
from kvxfer.connector.links import Links
from kvxfer.connector.protocol import Message
from kvxfer.errors import InvalidArgumentError, LayoutError
from kvxfer.layout import KVLayout, plan_transfer

if TYPE_CHECKING:
    from kvxfer.transfer import Region, TransferEngine

__all__ = [
    "Context",
    "Tombstone",
    "Tombstones",
    "check_blocks",
    "check_handoff_id",
    "check_mappable",
]

_HANDOFF_ID = re.compile(r"[0-9A-Za-z._:-]{1,64}")


@dataclass
class Context:
    engine: TransferEngine
    region: Region
    layout: KVLayout
    model_id: str
    config: HandoffConfig
    clock: Callable[[], float]
    counters: Counter[str]
    links: Links
    events: list[Event] = field(default_factory=list)  # for the next poll()
    beat: Callable[[], None] = lambda: None  # sends the beat when it is due; cheap when it is not

    def drop(self, reason: str) -> None:
        """A message that is not for us any more, or never was."""
        self.counters[f"dropped_{reason}"] += 1

    def end(self, role: str, end: str) -> None:
        self.counters[f"{role}_{end}"] += 1


@dataclass(frozen=True)
class Tombstone:
    """An ended handoff: what to answer to its late messages, and what to tell an owner who comes later still."""

    expires: float
    reply: tuple[type[Message], dict[str, Any]] | None
    failed: Failed | None = None
    known: bool = True  # to the owner; a peer's abort can come before our own leg


class Tombstones:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._ended: dict[str, Tombstone] = {}

    def add(
        self,
        handoff: str,
        *,
        reply: tuple[type[Message], dict[str, Any]] | None = None,
        failed: Failed | None = None,
        known: bool = True,
    ) -> None:
        expires = self._context.clock() + self._context.config.tombstone_s
        self._ended.pop(handoff, None)
        self._ended[handoff] = Tombstone(expires, reply, failed, known)
        if len(self._ended) > self._context.config.max_tombstones:
            del self._ended[next(iter(self._ended))]

    def get(self, handoff: str) -> Tombstone | None:
        return self._ended.get(handoff)

    def purge(self, now: float) -> None:
        while self._ended:
            handoff = next(iter(self._ended))  # oldest first: all live equally long
            if self._ended[handoff].expires > now:
                return
            del self._ended[handoff]


def check_handoff_id(handoff: str) -> None:
    if not isinstance(handoff, str) or not _HANDOFF_ID.fullmatch(handoff):
        raise InvalidArgumentError(
            f"handoff id {str(handoff)[:80]!r}: 1 to 64 characters of 0-9 A-Z a-z . _ : - are expected"
        )


def check_mappable(source: KVLayout, target: KVLayout) -> None:
    """Raises LayoutError unless one sender with ``source`` fills ``target`` by plain spans."""
    for name in ("tp_size", "tp_rank", "layers"):
        ours, theirs = getattr(source, name), getattr(target, name)
        if ours != theirs:
            raise LayoutError(
                name, f"prefill has {ours}, decode has {theirs}; a handoff is between equal ranks"
            )
    plan_transfer(source, target, [0], [0], 1, by_layer=True, kind="direct")


def check_blocks(
    layout: KVLayout, blocks: npt.NDArray[np.int32], token_begin: int, token_end: int
) -> None:
    """Raises InvalidArgumentError unless the list, from token 0, has one block of its own for each wanted token."""
    first, end = token_begin // layout.block_size, -(-token_end // layout.block_size)
    used = blocks[first:end]
    if len(used) != end - first:
        raise InvalidArgumentError(
            f"{len(blocks)} blocks of {layout.block_size} tokens do not reach token {token_end}"
        )
    if used.min() < 0 or used.max() >= layout.num_blocks or len(np.unique(used)) != len(used):
        raise InvalidArgumentError(
            f"block ids {used[:8].tolist()}... must be distinct and within the {layout.num_blocks} blocks"
        )
