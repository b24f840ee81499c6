# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The router's view of its workers: who is there, who is lost, whom to pick.

One asyncio thread owns all of this. A worker is polled each half second; it is lost at once when its
connection fails, after three seconds of silence when it does not answer (a stopped process keeps its
sockets), and ended when its incarnation changes. Whoever has a leg open on it is told then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import msgspec

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.tasks import end_tasks
from kvxfer.server.wire import WorkerState

__all__ = ["POLICIES", "Pair", "Policy", "Pool", "WorkerView", "least_loaded", "round_robin"]

log = logging.getLogger(__name__)
_STATE = msgspec.json.Decoder(WorkerState)


@dataclass(eq=False)
class WorkerView:
    url: str
    state: WorkerState | None = None  # the last one heard
    up: bool = False
    why: str = "not heard of yet"  # while it is not up
    last_heard: float = 0.0
    misses: int = 0  # polls in a row without an answer in time
    in_flight: int = 0  # this router's open legs
    leaving: bool = False  # asked to be dropped: no new legs
    on_lost: set[Callable[[str], None]] = field(default_factory=set)

    @property
    def id(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def usable(self) -> bool:
        return self.up and not self.leaving and self.condition == "ready"

    @property
    def condition(self) -> str:
        if not self.up or self.state is None:
            return self.why
        if self.state.draining:
            return "draining"
        return "ready" if self.state.ready else "not ready, by its own word"

    @property
    def role(self) -> str:
        return "unknown" if self.state is None else self.state.role

    @property
    def load(self) -> float:
        """Requests there: the poll may be half a second old and other routers have theirs, so the greater."""
        polled = 0 if self.state is None else self.state.running + self.state.waiting
        return max(self.in_flight, polled)

    @property
    def usage(self) -> float:
        """Part of its blocks that is in use."""
        if self.state is None or not self.state.total:
            return 1.0
        return (self.state.active + self.state.leased) / self.state.total


Policy = Callable[[Sequence[WorkerView], int], WorkerView]


def round_robin(views: Sequence[WorkerView], turn: int) -> WorkerView:
    return views[turn % len(views)]


def least_loaded(views: Sequence[WorkerView], turn: int) -> WorkerView:
    """Fewest requests, then fewest used blocks; equals take turns."""
    ranked = min(
        range(len(views)),
        key=lambda i: (views[i].load, views[i].usage, (i - turn) % len(views)),
    )
    return views[ranked]


POLICIES: dict[str, Policy] = {"round_robin": round_robin, "least_loaded": least_loaded}


@dataclass(frozen=True)
class Pair:
    """Who answers one attempt; without prefill the decode worker (or a ``both``) does all of it."""

    decode: WorkerView
    prefill: WorkerView | None


class Pool:
    def __init__(
        self,
        client: httpx.AsyncClient,
        policy: Policy,
        *,
        poll_interval_s: float = 0.5,
        poll_timeout_s: float = 1.0,
        lost_after_s: float = 3.0,
    ) -> None:
        self._client = client
        self._policy = policy
        self._poll_interval_s = poll_interval_s
        self._poll_timeout_s = poll_timeout_s
        self._lost_after_s = lost_after_s
        self._views: dict[str, WorkerView] = {}
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._turns = {"decode": 0, "prefill": 0}
        self._waiting: set[asyncio.Future[None]] = set()  # who waits for a worker to come up
        self.draining = False

    @property
    def views(self) -> list[WorkerView]:
        return list(self._views.values())

    @property
    def max_model_len(self) -> int | None:
        """The shortest of those known: an answer may move from one worker to another."""
        known = [view.state.max_model_len for view in self.views if view.state is not None]
        return min(known, default=None)

    async def add(self, url: str) -> WorkerView:
        """Asks the worker who it is, and goes on asking. The same URL again only asks at once."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidArgumentError(f"worker URL {url!r} is not of the form http://host:port")
        new = WorkerView(url.rstrip("/"), last_heard=time.monotonic())
        view = self._views.setdefault(new.id, new)
        view.leaving = False
        await self.refresh(view)
        if view.id not in self._polls:
            self._polls[view.id] = asyncio.create_task(self._poll(view))
        return view

    def remove(self, worker_id: str) -> WorkerView | None:
        """No new legs there; dropped when the open ones have ended."""
        view = self._views.get(worker_id)
        if view is not None:
            view.leaving = True
            self._drop_if_left(view)
        return view

    async def close(self) -> None:
        await end_tasks(*self._polls.values())
        self._polls.clear()

    # -- picking -----------------------------------------------------------------------------------------

    def pick(self, avoid: Iterable[str] = ()) -> Pair | None:
        """A decode (or both) worker and a prefill worker of the same model; None if nobody can answer.

        ``avoid`` names workers that failed this request: they are taken only if there is nobody else.
        """
        usable = [view for view in self.views if view.usable]
        decoders = [view for view in usable if view.role in ("decode", "both")]
        if not decoders:
            return None
        decode = self._choose("decode", decoders, avoid)
        if decode.role == "both":
            return Pair(decode, None)
        assert decode.state is not None
        model = decode.state.model
        feeders = [v for v in usable if v.state and v.role == "prefill" and v.state.model == model]
        # A prefill worker that just failed this request is no help: decode alone is.
        feeders = [view for view in feeders if view.id not in set(avoid)]
        return Pair(decode, self._choose("prefill", feeders, ()) if feeders else None)

    def _choose(self, role: str, views: list[WorkerView], avoid: Iterable[str]) -> WorkerView:
        avoided = set(avoid)
        views = [view for view in views if view.id not in avoided] or views
        self._turns[role] += 1
        return self._policy(views, self._turns[role] - 1)

    async def pick_within(self, avoid: Iterable[str], timeout_s: float) -> Pair | None:
        """Like ``pick``, but waits for somebody to come up."""
        end = time.monotonic() + timeout_s
        while (pair := self.pick(avoid)) is None:
            left_s = end - time.monotonic()
            if left_s <= 0:
                return None
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await asyncio.wait((waiter,), timeout=left_s)
            finally:
                self._waiting.discard(waiter)
        return pair

    def why_none(self) -> str:
        told = "; ".join(f"{v.id} ({v.role}): {v.condition}" for v in self.views)
        return f"no usable decode worker ({told or 'no worker is registered'})"

    # -- legs --------------------------------------------------------------------------------------------

    def opened(self, view: WorkerView, on_lost: Callable[[str], None]) -> None:
        view.in_flight += 1
        view.on_lost.add(on_lost)

    def closed(self, view: WorkerView, on_lost: Callable[[str], None]) -> None:
        view.in_flight -= 1
        view.on_lost.discard(on_lost)
        self._drop_if_left(view)

    def _drop_if_left(self, view: WorkerView) -> None:
        if view.leaving and view.in_flight == 0 and self._views.get(view.id) is view:
            del self._views[view.id]
            self._polls.pop(view.id).cancel()

    # -- polling -----------------------------------------------------------------------------------------

    async def _poll(self, view: WorkerView) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            await self.refresh(view)

    async def refresh(self, view: WorkerView) -> None:
        """Asks once and draws the conclusions."""
        silent_until = view.last_heard + self._lost_after_s
        timeout_s = min(self._poll_timeout_s, max(0.05, silent_until - time.monotonic()))
        try:
            answer = await self._client.get(f"{view.url}/internal/state", timeout=timeout_s)
            answer.raise_for_status()
            state = _STATE.decode(answer.content)
        except httpx.TimeoutException:
            view.misses += 1
            # Two at least: one may be our own loop's, held up by something else.
            if view.misses > 1 and time.monotonic() >= silent_until:
                self._lost(view, f"no answer for {self._lost_after_s:g} s")
        except httpx.HTTPStatusError as error:
            self._lost(view, f"GET /internal/state answered {error.response.status_code}")
        except (httpx.TransportError, msgspec.DecodeError) as error:
            self._lost(view, f"{type(error).__name__}: {error}" if str(error) else repr(error))
        else:
            self._heard(view, state)

    def _heard(self, view: WorkerView, state: WorkerState) -> None:
        view.last_heard, view.misses = time.monotonic(), 0
        if view.up and view.state is not None and view.state.incarnation != state.incarnation:
            self._lost(view, "it was restarted")
        if not view.up:
            log.info("worker %s (%s) is up", view.id, state.role)
        view.state, view.up, view.why = state, True, ""
        if view.usable:
            for waiter in self._waiting:
                waiter.set_result(None)
            self._waiting.clear()

    def _lost(self, view: WorkerView, why: str) -> None:
        if view.up:
            log.warning("worker %s (%s) is lost: %s", view.id, view.role, why)
        view.up, view.why = False, why
        for tell in list(view.on_lost):
            tell(why)
        view.on_lost.clear()
