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

import numpy as np
import numpy.typing as npt

from kvxfer.connector.context import (
    Context,
    Tombstones,
    check_blocks,
    check_handoff_id,
    check_mappable,
)
from kvxfer.connector.events import Accepted, DuplicateHandoffError, End, Failed, Offered, Quiet
from kvxfer.connector.protocol import (
    MAX_BLOCKS,
    Abort,
    Accept,
    Commit,
    Decline,
    Grant,
    Message,
    Offer,
    clip_text,
    expected_arrivals,
)
from kvxfer.errors import InvalidArgumentError, KvxferError, LayoutError, LeaseError
from kvxfer.layout import plan_transfer

if TYPE_CHECKING:
    from kvxfer.transfer import Lease

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
    grant: dict[str, Any] | None = None  # repeated as it was when the offer is repeated
    lease: Lease | None = None
    lease_until: float = 0.0
    nbytes: int = 0
    num_arrived: int = 0
    commit: Commit | None = None
    expected: npt.NDArray[np.int64] | None = None


class Receiver:
    """All methods are called by the owner's one thread; events come from ``Endpoint.poll``."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: dict[str, _Handoff] = {}
        self._tombstones = Tombstones(context)
        self._early: dict[str, tuple[str, Offer, float]] = {}  # offers whose leg is yet to open
        self._wire = context.layout.to_wire()

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
        if not 0 <= token_begin < token_end <= item.offer.num_tokens:
            raise InvalidArgumentError(
                f"grant of handoff {handoff}: tokens [{token_begin}, {token_end}) of {item.offer.num_tokens}; "
                "at least one token must be wanted (decline otherwise)"
            )
        context, layout = self._context, self._context.layout
        blocks = np.asarray(block_ids, dtype=np.int32).reshape(-1)
        check_blocks(layout, blocks, token_begin, token_end)
        if len(blocks) > MAX_BLOCKS:
            raise InvalidArgumentError(
                f"grant of handoff {handoff}: {len(blocks)} blocks, one message names {MAX_BLOCKS}; use "
                "bigger blocks for prompts of this length"
            )
        # Our own bytes of those tokens, all layers: what may be written and nothing beside it.
        spans = plan_transfer(
            layout, layout, blocks, blocks, token_end, first_token=token_begin, kind="direct"
        )
        offsets, sizes = spans.dst_offsets, spans.nbytes
        max_chunks = min(
            item.offer.max_chunks,
            item.offer.num_tokens,
            max(1, context.config.max_arrivals // len(layout.layers)),
        )
        ttl_s = context.config.lease_ttl_s
        item.lease = context.engine.grant(
            context.region,
            offsets,
            sizes,
            ttl_s=ttl_s,
            peer=item.peer,
            num_arrivals=max_chunks * len(layout.layers),
        )
        item.lease_until = context.clock() + ttl_s
        item.nbytes = int(np.sum(sizes))
        item.state = _State.RESERVED
        item.grant = {
            "token_begin": int(token_begin),
            "token_end": int(token_end),
            "max_chunks": max_chunks,
            "ttl_s": ttl_s,
            "region": context.region.name,
            "lease": bytes(item.lease.token),
            "layout": self._wire,
            "block_ids": blocks,
        }
        context.links.send(item.peer, Grant, handoff=handoff, **item.grant)

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
        elif item.state is _State.RESERVED and item.commit is None and item.grant is not None:
            self._context.links.send(peer, Grant, handoff=item.handoff, **item.grant)

    def on_commit(self, peer: str, message: Commit) -> None:
        item = self._find(peer, message.handoff)
        if item is None or item.state is not _State.RESERVED or item.commit is not None:
            return
        assert item.grant is not None
        assert item.offer is not None
        ends = message.chunk_ends.astype(np.int64)
        if (
            message.num_tokens != item.offer.num_tokens
            or not 0 < len(ends) <= item.grant["max_chunks"]
            or ends[-1] != message.num_tokens
            or (np.diff(ends, prepend=0) <= 0).any()
            or not len(message.first_tokens)
        ):
            cause = (
                f"a commit of {message.num_tokens} tokens in {len(ends)} chunks with "
                f"{len(message.first_tokens)} first tokens contradicts the offer of {item.offer.num_tokens}"
            )
            self._fail(item, cause, "write_failed", retryable=True)
            return
        item.commit = message
        item.expected = expected_arrivals(
            message.chunk_ends,
            item.grant["token_begin"],
            item.grant["token_end"],
            len(self._context.layout.layers),
        )
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
            if item is not None and item.state is _State.RESERVED:
                self._extend(item, now)

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
            if item.lease is not None:
                self._look(item, now)
            if item.handoff not in self._open or item.state in (_State.ACCEPTING, _State.CLOSING):
                continue
            if item.lease is not None and (item.lease.expired or now >= item.lease_until):
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
        waiting = [
            item
            for item in self._open.values()
            if item.state not in (_State.ACCEPTING, _State.CLOSING)
        ]
        return min(
            (
                min(item.deadline, item.lease_until) if item.lease else item.deadline
                for item in waiting
            ),
            default=None,
        )

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

    def _look(self, item: _Handoff, now: float) -> None:
        """What the lease shows: new arrivals, completeness, quiet."""
        lease = item.lease
        assert lease is not None
        if item.state is _State.RESERVED:
            self._look_at_arrivals(item, lease, now)
        if item.handoff not in self._open or not lease.quiet:
            return  # a failure above came here again and may have ended it
        if item.state is _State.ACCEPTING:
            self._accept(item)
        elif item.state is _State.CLOSING:
            del self._open[item.handoff]
            self._context.events.append(Quiet(item.handoff))

    def _look_at_arrivals(self, item: _Handoff, lease: Lease, now: float) -> None:
        num_arrived = lease.num_arrived
        if num_arrived != item.num_arrived:
            item.num_arrived = num_arrived
            link = self._context.links.get(item.peer)
            if link is not None:
                link.last_heard = now  # bytes are a sign of life too
            self._extend(item, now)
        if item.state is not _State.RESERVED or item.expected is None:
            return
        if num_arrived >= len(item.expected):
            if np.array_equal(lease.arrived, item.expected):
                item.state = _State.ACCEPTING
                lease.begin_revoke()
            elif num_arrived > len(item.expected):
                cause = "arrivals outside the committed chunks"
                self._fail(item, cause, "write_failed", retryable=True)

    def _accept(self, item: _Handoff) -> None:
        commit, context = item.commit, self._context
        assert commit is not None
        assert item.grant is not None
        transport = commit.transport or self._busiest_transport(item.peer)
        del self._open[item.handoff]
        context.events.append(
            Accepted(
                item.handoff,
                item.grant["token_end"],
                tuple(int(token) for token in commit.first_tokens),
                commit.cached_tokens,
                item.nbytes,
                transport,
            )
        )
        context.end("receiver", "accepted")
        context.counters[f"bytes_received_{transport}"] += item.nbytes
        self._tombstones.add(item.handoff, reply=(Accept, {}))
        self._answer(item.peer, item.handoff)

    def _busiest_transport(self, peer: str) -> str:
        """For a commit that was sent before any write had chosen its transport."""
        transports = self._context.engine.stats()["peers"].get(peer, {}).get("transport", {})
        return max(
            transports, key=lambda name: transports[name]["bytes_received"], default="unknown"
        )

    def _extend(self, item: _Handoff, now: float) -> None:
        config = self._context.config
        assert item.lease is not None
        if now < item.lease_until - config.lease_ttl_s + config.renew_s:
            return
        try:
            item.lease.extend(config.lease_ttl_s)
        except LeaseError as error:
            self._fail(item, f"the lease ended: {error}", "expired", retryable=True)
            return
        item.lease_until = now + config.lease_ttl_s

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
        if item.lease is None:
            del self._open[item.handoff]
        else:
            item.lease.begin_revoke()
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
