# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which prompts a prefill worker offers, and when: only the next few that it could start.

An offer pins decode memory until this side has computed the prompt, so the rest waits here. One queue per
decode worker: one that has no blocks left holds up nobody who goes to another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvxfer.server.engine.sequence import Sequence

__all__ = ["OfferQueue"]


@dataclass(slots=True)
class _Lane:
    queue: deque[Sequence] = field(default_factory=deque)
    ahead: set[Sequence] = field(default_factory=set)  # offered, not admitted yet


class OfferQueue:
    def __init__(self, *, min_ahead: int, tokens_ahead: int) -> None:
        """Per decode worker: prompts of ``tokens_ahead`` tokens are offered, or ``min_ahead`` of any length."""
        self._min_ahead = min_ahead
        self._tokens_ahead = tokens_ahead
        self._lanes: dict[str, _Lane] = {}

    def waiting(self) -> list[Sequence]:
        return [sequence for lane in self._lanes.values() for sequence in lane.queue]

    def ahead(self) -> list[Sequence]:
        return [sequence for lane in self._lanes.values() for sequence in lane.ahead]

    def add(self, sequence: Sequence) -> None:
        self._lanes.setdefault(_peer_of(sequence), _Lane()).queue.append(sequence)

    def take(self) -> Iterator[Sequence]:
        """Those to be offered now, in order of arrival; they count as ahead from here on."""
        for lane in list(self._lanes.values()):
            while lane.queue and self._has_room(lane):
                sequence = lane.queue.popleft()
                lane.ahead.add(sequence)
                yield sequence

    def withdraw(self, sequence: Sequence) -> bool:
        """Forgets one that was not offered yet; False if it was."""
        lane = self._lanes.get(_peer_of(sequence))
        if lane is None or sequence not in lane.queue:
            return False
        lane.queue.remove(sequence)
        self._drop_if_empty(sequence, lane)
        return True

    def settle(self, sequence: Sequence) -> None:
        """It was admitted, or will never be. Idempotent."""
        lane = self._lanes.get(_peer_of(sequence))
        if lane is not None:
            lane.ahead.discard(sequence)
            self._drop_if_empty(sequence, lane)

    def _has_room(self, lane: _Lane) -> bool:
        if len(lane.ahead) < self._min_ahead:
            return True
        return sum(len(sequence.ids) for sequence in lane.ahead) < self._tokens_ahead

    def _drop_if_empty(self, sequence: Sequence, lane: _Lane) -> None:
        if not lane.queue and not lane.ahead:
            del self._lanes[_peer_of(sequence)]


def _peer_of(sequence: Sequence) -> str:
    params = sequence.request.spec.kv_transfer_params
    return "" if params is None else params.peer.incarnation
