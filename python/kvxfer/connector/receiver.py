# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Decode's side of a handoff by push: reserve on the offer, accept on commit *and* the full arrival set.

Blocks go back to the owner only when the lease is quiet: with Accepted, or with Quiet after Failed. Revoking
is begun, never awaited. docs/handoff.md has the table of states.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from kvxfer.connector.context import (
    Context,
    Tombstones,
    check_handoff_id,
    check_mappable,
)
from kvxfer.connector.events import Accepted, DuplicateHandoffError, End, Failed, Offered, Quiet
from kvxfer.connector.protocol import (
    Abort,
    Accept,
    Commit,
    Decline,
    Grant,
    Message,
    Offer,
    clip_text,
)
from kvxfer.connector.reservation import Reservation
from kvxfer.errors import InvalidArgumentError, KvxferError, LayoutError

if TYPE_CHECKING:
    pass

__all__ = ["Receiver"]


class _State(Enum):
    EXPECTED = auto()  # the leg is open, no offer yet
    OFFERED = auto()  # the owner has yet to grant
    RESERVED = auto()  # writes may land
    ACCEPTING = auto()  # complete; the lease is closing
    CLOSING = auto()  # failed; the lease is closing


@dataclass
class _Handoff:
    handoff: str
    deadline: float
    state: _State = _State.EXPECTED
    peer: str = ""  # from the offer on
    offer: Offer | None = None
    reserved: Reservation | None = None


class Receiver:
    """All methods are called by the owner's one thread; events come from ``Endpoint.poll``."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: dict[str, _Handoff] = {}
        self._tombstones = Tombstones(context)
        self._early: dict[str, tuple[str, Offer, float]] = {}  # offers whose leg is yet to open

    # -- the owner's calls ---------------------------------------------------------------------------------

    def expect(self, handoff: str, *, deadline_s: float) -> None:
        """The leg opened: a prefill worker will offer this handoff.

        Raises:
            DuplicateHandoffError: the id is open here or ended lately (HTTP 409).
        """
        check_handoff_id(handoff)
        if not deadline_s > 0:
            raise InvalidArgumentError(
                f"expect of handoff {handoff}: deadline_s={deadline_s} is not positive"
            )
        tombstone = self._tombstones.get(handoff)
        if handoff in self._open or (tombstone is not None and tombstone.known):
            raise DuplicateHandoffError(f"handoff {handoff} was expected before; draw a fresh id")
        if tombstone is not None and tombstone.failed is not None:
            # The peer gave it up before our leg opened.
            self._tombstones.add(handoff, reply=tombstone.reply, failed=tombstone.failed)
            self._context.events.append(tombstone.failed)
            self._context.end("receiver", tombstone.failed.end)
            return
        item = _Handoff(handoff, self._context.clock() + deadline_s)
        self._open[handoff] = item
        early = self._early.pop(handoff, None)
        if early is not None:
            self._take_offer(item, early[0], early[1])

    def grant(
        self, handoff: str, block_ids: npt.ArrayLike, *, token_begin: int, token_end: int
    ) -> None:
        """Lets the prefill worker write tokens [token_begin, token_end) into the blocks, listed from token 0.

        Raises:
            InvalidArgumentError: blocks or tokens that do not fit; the offer stays open.
        """
        item = self._open.get(handoff)
        if item is None and self._tombstones.get(handoff) is not None:
            # It failed between Offered and this call; no lease was ever given on the blocks.
            self._context.events.append(Quiet(handoff))
            return
        if item is None or item.state is not _State.OFFERED or item.offer is None:
            state = "not known here" if item is None else item.state.name
            raise InvalidArgumentError(
                f"grant of handoff {handoff}, which is {state}; once, after Offered"
            )
        item.reserved = Reservation(
            self._context, item.peer, item.offer, block_ids, token_begin, token_end
        )
        item.state = _State.RESERVED
        self._send_grant(item, item.reserved)

    def decline(self, handoff: str, reason: str) -> None:
        """The owner computes the prompt itself. Ends the handoff without an event; no-op if it ended already."""
        item = self._open.get(handoff)
        if item is None and self._tombstones.get(handoff) is not None:
            return
        if item is None or item.state is not _State.OFFERED:
            state = "not known here" if item is None else item.state.name
            raise InvalidArgumentError(
                f"decline of handoff {handoff}, which is {state}; after Offered"
            )
        self._decline(item, reason, refused=False)
        self._context.end("receiver", "declined")

    def abort(self, handoff: str, cause: str) -> None:
        """The leg closed. Idempotent; after Accepted a no-op; also for an id that is yet to be expected."""
        check_handoff_id(handoff)
        item = self._open.get(handoff)
        if item is not None:
            self._fail(item, cause, "client_gone", retryable=False)
        elif self._tombstones.get(handoff) is None:
            self._bury(handoff, Failed(handoff, clip_text(cause), "client_gone", False))
            early = self._early.pop(handoff, None)
            if early is not None:
                self._answer(early[0], handoff)

    def shut_down(self, cause: str) -> None:
        for item in list(self._open.values()):
            self._fail(item, cause, "peer_lost", retryable=True)

    # -- messages ------------------------------------------------------------------------------------------

    def on_offer(self, peer: str, message: Offer) -> None:
        item = self._open.get(message.handoff)
        if item is None:
            if self._tombstones.get(message.handoff) is not None:
                self._context.drop("late")
                self._answer(peer, message.handoff)
            else:
                self._keep_early(peer, message)
        elif item.state is _State.EXPECTED:
            self._take_offer(item, peer, message)
        elif item.peer != peer:
            self._context.drop("foreign")
        elif item.state is _State.CLOSING:
            self._answer(peer, item.handoff)
        elif item.reserved is not None and item.reserved.commit is None:
            self._send_grant(item, item.reserved)

    def on_commit(self, peer: str, message: Commit) -> None:
        item = self._find(peer, message.handoff)
        if item is None or item.state is not _State.RESERVED or item.reserved is None:
            return
        if item.reserved.commit is not None:
            return  # a repeat
        problem = item.reserved.take_commit(message)
        if problem:
            self._fail(item, problem, "write_failed", retryable=True)
        else:
            self._look(item, self._context.clock())

    def on_abort(self, peer: str, message: Abort) -> None:
        item = self._open.get(message.handoff)
        if item is not None and item.state is not _State.EXPECTED and item.peer != peer:
            self._context.drop("foreign")
        elif item is not None and item.state is not _State.ACCEPTING:
            self._fail(item, message.cause, message.end, retryable=message.retryable, tell=False)
        elif item is None:
            self._context.drop("late" if self._tombstones.get(message.handoff) else "unknown")
            self._early.pop(message.handoff, None)
            if self._tombstones.get(message.handoff) is None:
                failed = Failed(message.handoff, message.cause, message.end, message.retryable)
                self._bury(message.handoff, failed, known=False)

    def on_renew(self, peer: str, handoffs: tuple[str, ...]) -> None:
        """The sender works on these: their leases live on. One that ended here is told its end again."""
        now = self._context.clock()
        for handoff in handoffs:
            item = self._find(peer, handoff, silent=handoff in self._early)
            if item is not None and item.state is _State.RESERVED and item.reserved is not None:
                item.reserved.extend(now)

    def on_lost(self, peer: str, cause: str) -> None:
        for handoff in [name for name, early in self._early.items() if early[0] == peer]:
            del self._early[handoff]
        for item in [item for item in self._open.values() if item.peer == peer]:
            if item.state is _State.RESERVED:
                self._look(
                    item, self._context.clock()
                )  # the set decides: what landed is whole without its sender
            if item.state is not _State.ACCEPTING:
                self._fail(item, cause, "peer_lost", retryable=True)

    # -- time ----------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Arrivals and leases, then deadlines."""
        for item in list(self._open.values()):
            self._look(item, now)
            if item.handoff not in self._open or item.state in (_State.ACCEPTING, _State.CLOSING):
                continue
            if item.reserved is not None and item.reserved.is_over(now):
                self._fail(item, "the sender stopped renewing its lease", "expired", retryable=True)
            elif now >= item.deadline:
                self._fail(item, "the request's deadline passed", "expired", retryable=False)

    def repeat(self, now: float) -> None:
        """Each beat: forget old offers and tombstones."""
        for handoff in [name for name, early in self._early.items() if early[2] <= now]:
            del self._early[handoff]
            self._context.drop("unknown")
        self._tombstones.purge(now)

    def held(self, peer: str) -> list[str]:
        """The handoffs that a Renew to ``peer`` lists."""
        states = (_State.OFFERED, _State.RESERVED)
        return [
            item.handoff
            for item in self._open.values()
            if item.peer == peer and item.state in states
        ]

    def next_deadline(self) -> float | None:
        times: list[float] = []
        for item in self._open.values():
            if item.state not in (_State.ACCEPTING, _State.CLOSING):
                times.append(item.deadline)
                if item.reserved is not None:
                    times.append(item.reserved.until)
        return min(times, default=None)

    @property
    def num_closing(self) -> int:
        return sum(item.state is _State.CLOSING for item in self._open.values())

    def open_handoffs(self) -> list[str]:
        return list(self._open)

    # -- inner ---------------------------------------------------------------------------------------------

    def _find(self, peer: str, handoff: str, *, silent: bool = False) -> _Handoff | None:
        """The open handoff that ``peer`` may speak of; a message for an ended one is answered with its end."""
        item = self._open.get(handoff)
        if item is not None and item.state is _State.EXPECTED:
            return None  # its offer was lost, and is repeated
        if item is not None:
            if item.peer == peer and item.state is not _State.CLOSING:
                return item
            if item.peer == peer:
                self._answer(peer, handoff)
            else:
                self._context.drop("foreign")
        elif not silent:
            self._context.drop("late" if self._tombstones.get(handoff) else "unknown")
            self._answer(peer, handoff)
        return None

    def _keep_early(self, peer: str, offer: Offer) -> None:
        early = self._early.get(offer.handoff)
        if early is not None and early[0] != peer:
            self._context.drop("foreign")
        elif early is None and len(self._early) >= self._context.config.max_unknown_offers:
            self._context.drop("unknown")  # it is repeated each beat
        else:
            until = self._context.clock() + self._context.config.unknown_offer_s
            self._early[offer.handoff] = (peer, offer, until)

    def _take_offer(self, item: _Handoff, peer: str, offer: Offer) -> None:
        item.peer, item.offer = peer, offer
        item.state = _State.OFFERED
        try:
            self._check_offer(peer, offer)
        except KvxferError as error:
            self._decline(item, str(error), refused=True)
            failed = Failed(item.handoff, clip_text(str(error)), "refused", False)
            self._context.events.append(failed)
            self._context.end("receiver", "refused")
            return
        self._context.events.append(Offered(item.handoff, offer.num_tokens, peer))

    def _check_offer(self, peer: str, offer: Offer) -> None:
        if offer.model != self._context.model_id:
            raise LayoutError(
                "model", f"prefill serves {offer.model!r}, decode {self._context.model_id!r}"
            )
        link = self._context.links.get(peer)
        if link is None:
            raise InvalidArgumentError(f"peer {peer} is gone")
        check_mappable(link.layout(offer.layout), self._context.layout)

    def _decline(self, item: _Handoff, reason: str, *, refused: bool) -> None:
        values = {"reason": clip_text(reason), "refused": refused}
        del self._open[item.handoff]
        self._tombstones.add(item.handoff, reply=(Decline, values))
        self._answer(item.peer, item.handoff)

    def _send_grant(self, item: _Handoff, reserved: Reservation) -> None:
        self._context.links.send(item.peer, Grant, handoff=item.handoff, **reserved.grant)

    def _look(self, item: _Handoff, now: float) -> None:
        """What the lease shows: new arrivals, completeness, quiet."""
        reserved = item.reserved
        if reserved is None:
            return
        if item.state is _State.RESERVED:
            if reserved.look():  # bytes are a sign of life too
                reserved.extend(now)
                link = self._context.links.get(item.peer)
                if link is not None:
                    link.last_heard = now
            if reserved.is_complete:
                item.state = _State.ACCEPTING
                reserved.lease.begin_revoke()
            elif reserved.is_wrong:
                cause = "arrivals outside the committed chunks"
                self._fail(item, cause, "write_failed", retryable=True)
                return  # which looked again
        if not reserved.lease.quiet:
            return
        if item.state is _State.ACCEPTING:
            self._accept(item, reserved)
        elif item.state is _State.CLOSING:
            del self._open[item.handoff]
            self._context.events.append(Quiet(item.handoff))

    def _accept(self, item: _Handoff, reserved: Reservation) -> None:
        commit, context = reserved.commit, self._context
        assert commit is not None
        transport = commit.transport or self._busiest_transport(item.peer)
        del self._open[item.handoff]
        context.events.append(
            Accepted(
                item.handoff,
                reserved.token_end,
                tuple(int(token) for token in commit.first_tokens),
                commit.cached_tokens,
                reserved.nbytes,
                transport,
            )
        )
        context.end("receiver", "accepted")
        context.counters[f"bytes_received_{transport}"] += reserved.nbytes
        self._tombstones.add(item.handoff, reply=(Accept, {}))
        self._answer(item.peer, item.handoff)

    def _busiest_transport(self, peer: str) -> str:
        """For a commit that was sent before any write had chosen its transport."""
        transports = self._context.engine.stats()["peers"].get(peer, {}).get("transport", {})
        return max(
            transports, key=lambda name: transports[name]["bytes_received"], default="unknown"
        )

    def _fail(
        self, item: _Handoff, cause: str, end: End, *, retryable: bool, tell: bool = True
    ) -> None:
        if item.state is _State.CLOSING:
            return
        failed = Failed(item.handoff, clip_text(cause), end, retryable)
        self._context.events.append(failed)
        self._context.end("receiver", end)
        item.state = _State.CLOSING
        self._bury(item.handoff, failed)
        if tell and item.peer:
            self._answer(item.peer, item.handoff)
        if item.reserved is None:
            del self._open[item.handoff]
        else:
            item.reserved.lease.begin_revoke()
            self._look(item, self._context.clock())

    def _bury(self, handoff: str, failed: Failed, *, known: bool = True) -> None:
        values = {
            "to": "sender",
            "end": failed.end,
            "cause": failed.cause,
            # That our client went says nothing of the peer's leg: if it still stands, a retry may help.
            "retryable": failed.retryable or failed.end == "client_gone",
        }
        self._tombstones.add(handoff, reply=(Abort, values), failed=failed, known=known)

    def _answer(self, peer: str, handoff: str) -> None:
        """Tells a sender the end of a handoff (again)."""
        tombstone = self._tombstones.get(handoff)
        reply: tuple[type[Message], dict[str, Any]]
        if tombstone is not None and tombstone.reply is not None:
            reply = tombstone.reply
        else:
            cause = "no such handoff"
            reply = Abort, {"to": "sender", "end": "peer_lost", "cause": cause, "retryable": True}
        self._context.links.send(peer, reply[0], handoff=handoff, **reply[1])
