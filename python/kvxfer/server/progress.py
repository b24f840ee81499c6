# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What of a request's answer the client already has, and how the next attempt goes on from there.

One choice: the ids sent become part of the prompt (``position0`` says how many), so nothing is computed
twice but their KV. Several choices: they share one prompt on the wire and a choice's sample depends on its
index, so the next attempt starts over with the same seed and the ids that were sent are checked and
dropped. Sampling depends on (seed, position, choice) alone, so both continue the same answer; should a
replayed id differ all the same (a near tie in the logits), the answer ends with an error, never with a
seam in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import msgspec

from kvxfer.server.failures import AttemptFailedError
from kvxfer.server.wire import Finish, TokenEvent, TokenRequest, Tokens, Usage

__all__ = ["Progress"]


class Progress:
    def __init__(self, request: TokenRequest, eos_token_ids: frozenset[int]) -> None:
        self._request = request
        self._ends = eos_token_ids if not request.sampling.ignore_eos else frozenset()
        self._ends |= frozenset(request.sampling.stop_token_ids)
        self._sent: list[list[int]] = [[] for _ in range(request.sampling.n)]
        self._at = [
            0
        ] * request.sampling.n  # per choice: ids of its answer that this attempt accounts for
        self._finished: set[int] = set()
        self._attempt = 0
        self.cached_tokens = 0

    @property
    def num_sent(self) -> int:
        return sum(map(len, self._sent))

    def next_attempt(self, deadline_s: float) -> TokenRequest:
        self._attempt += 1
        request = msgspec.structs.replace(
            self._request,
            attempt=self._attempt,
            handoff=secrets.token_hex(16),
            deadline_s=deadline_s,
        )
        if request.sampling.n > 1:
            self._at = [0] * request.sampling.n
            return request
        (sent,) = self._sent
        self._at = [len(sent)]
        sampling = msgspec.structs.replace(
            request.sampling, max_tokens=request.sampling.max_tokens - len(sent)
        )
        return msgspec.structs.replace(
            request,
            prompt=request.prompt + tuple(sent),
            position0=request.position0 + len(sent),
            sampling=sampling,
        )

    def complete(self) -> Iterator[TokenEvent]:
        """The end of an answer whose last id was sent, though its finish was lost; nothing otherwise."""
        sampling = self._request.sampling
        for i, sent in enumerate(self._sent):
            if i in self._finished:
                continue
            if sent and len(sent) > sampling.min_tokens and sent[-1] in self._ends:
                reason = "stop"
            elif len(sent) >= sampling.max_tokens:
                reason = "length"
            else:
                return
            self._finished.add(i)
            yield Finish(i=i, reason=reason)  # type: ignore[arg-type]
        yield self._usage()

    def take(self, event: TokenEvent) -> TokenEvent | None:
        """The event as the client's stream needs it: renumbered, without what it has already."""
        if isinstance(event, Tokens):
            i, sent = event.i, self._sent[event.i]
            known = sent[self._at[i] : self._at[i] + len(event.ids)]
            if list(event.ids[: len(known)]) != known:
                raise AttemptFailedError(
                    "replay_differs",
                    f"the retry's answer differs from what was already sent at token {self._at[i]}",
                    retryable=False,
                )
            self._at[i] += len(event.ids)
            fresh = event.ids[len(known) :]
            if not fresh or i in self._finished:
                return None
            sent += fresh
            return Tokens(i=i, ids=fresh, pos=len(sent) - len(fresh))
        if isinstance(event, Finish):
            if event.i in self._finished:
                return None
            self._finished.add(event.i)
        elif isinstance(event, Usage):
            self.cached_tokens = event.cached_tokens
            return self._usage(event.timeline)
        return event

    def _usage(self, timeline: dict[str, float] | None = None) -> Usage:
        return Usage(
            prompt_tokens=len(self._request.prompt),
            completion_tokens=self.num_sent,
            cached_tokens=self.cached_tokens,
            timeline=timeline or {},
        )
