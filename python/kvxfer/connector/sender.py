# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Prefill's side of a handoff by push: offer, be granted, write each layer as it is computed, commit.

Sources are given back (Quiet) only when every write of the handoff is quiesced, after an abort too: else
the bytes of the next request would be sent in this one's name. Nobody waits for the receiver's accept;
commit is repeated without holding blocks. A failed write ends the attempt; nothing is ever posted again.
docs/handoff.md has the table of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvxfer.connector.context import (
    Context,
    Tombstones,
    check_blocks,
    check_handoff_id,
    check_mappable,
)
from kvxfer.connector.events import Declined, DuplicateHandoffError, End, Failed, Granted, Quiet
from kvxfer.connector.protocol import (
    Abort,
    Accept,
    Commit,
    Decline,
    Grant,
    Offer,
    clip_text,
)
from kvxfer.connector.push import Push
from kvxfer.errors import InvalidArgumentError, KvxferError, PeerDisconnectedError
from kvxfer.layout import KVLayout

if TYPE_CHECKING:
    from kvxfer.transfer import RemoteRegion

__all__ = ["Sender"]


class _State(Enum):
    CONNECTING = auto()
    OFFERED = auto()
    GRANTED = auto()  # the owner has yet to allocate its blocks
    SENDING = auto()
    COMMITTED = auto()  # all is posted; writes may still be under way, and commit is repeated
    CLOSING = auto()  # failed; some write may still read the sources


@dataclass
class _Handoff:
    handoff: str
    peer: str
    address: str
    num_tokens: int
    deadline: float
    state: _State = _State.CONNECTING
    grant: Grant | None = None
    target: KVLayout | None = None
    remote: RemoteRegion | None = None
    push: Push | None = None  # from start() on: there are blocks to give back
    accepted: bool = False
    quiet_told: bool = False
    first_tokens: tuple[int, ...] = ()
    cached_tokens: int = 0


class Sender:
    """All methods are called by the owner's one thread; events come from ``Endpoint.poll``."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: dict[str, _Handoff] = {}
        self._tombstones = Tombstones(context)
        self._wire = context.layout.to_wire()

    # -- the owner's calls ---------------------------------------------------------------------------------

    def offer(
        self,
        handoff: str,
        *,
        peer_address: str,
        peer_incarnation: str,
        num_tokens: int,
        deadline_s: float,
    ) -> None:
        """Asks the decode worker for blocks. Holds none itself until Granted.

        Raises:
            DuplicateHandoffError: the id is open here or ended lately.
        """
        check_handoff_id(handoff)
        if num_tokens < 1 or not deadline_s > 0:
            raise InvalidArgumentError(
                f"offer of handoff {handoff}: num_tokens={num_tokens}, deadline_s={deadline_s}; "
                "both must be positive"
            )
        tombstone = self._tombstones.get(handoff)
        if handoff in self._open or (tombstone is not None and tombstone.known):
            raise DuplicateHandoffError(f"handoff {handoff} was offered before; draw a fresh id")
        if tombstone is not None and tombstone.failed is not None:
            # The peer gave it up before our leg opened.
            self._tombstones.add(handoff, failed=tombstone.failed)
            self._context.events.append(tombstone.failed)
            self._context.end("sender", tombstone.failed.end)
            return
        deadline = self._context.clock() + deadline_s
        item = _Handoff(handoff, peer_incarnation, peer_address, int(num_tokens), deadline)
        self._open[handoff] = item
        link = self._context.links.get(peer_incarnation)
        if link is not None and link.peer.alive:
            self._send_offer(item)
        else:
            self._context.links.connect(peer_address, peer_incarnation)

    def start(self, handoff: str, block_ids: npt.ArrayLike) -> None:
        """Names the source blocks, from token 0 on, prefix-cached ones included. They stay ours until Quiet.

        Raises:
            InvalidArgumentError: the blocks do not hold the granted tokens; the grant stays open.
        """
        item = self._find_own(handoff)
        if item is None:
            # It failed between Granted and this call; nothing was or will be read from the blocks.
            self._context.events.append(Quiet(handoff))
            return
        if item.state is not _State.GRANTED or item.grant is None:
            raise InvalidArgumentError(
                f"start of handoff {handoff}, which is {item.state.name}; once, after Granted"
            )
        assert item.target is not None
        assert item.remote is not None
        blocks = np.asarray(block_ids, dtype=np.int64).reshape(-1)
        item.push = Push(
            self._context, handoff, item.num_tokens, item.grant, item.target, item.remote, blocks
        )
        item.state = _State.SENDING

    def layer_done(
        self, handoff: str, *, chunk_index: int, layer: int, token_begin: int, token_end: int
    ) -> None:
        """This layer's KV of tokens up to ``token_end`` is in the source blocks: posts its write.

        Chunk 0 also carries the tokens before ``token_begin``, which the prefix cache supplied. Called
        within the forward pass: costs one plan for each chunk and one post for each layer.
        """
        self._context.beat()  # a long pass must not look like a dead worker
        item = self._open.get(handoff)
        if item is None or item.state is not _State.SENDING or item.push is None:
            self._find_own(handoff)
            self._context.counters["layers_after_end"] += 1
            return
        error = item.push.layer_done(chunk_index, layer, token_begin, token_end)
        if error is not None:
            self._write_failed(item, error)

    def commit(
        self, handoff: str, *, num_chunks: int, first_tokens: Sequence[int], cached_tokens: int
    ) -> None:
        """All layers of all chunks are posted, and the first token of each choice is sampled."""
        item = self._find_own(handoff)
        if item is None or item.state is not _State.SENDING or item.push is None:
            return
        item.push.check_complete(num_chunks)
        item.first_tokens, item.cached_tokens = tuple(first_tokens), int(cached_tokens)
        if not item.first_tokens:
            raise InvalidArgumentError(f"commit of handoff {handoff} without a first token")
        item.state = _State.COMMITTED
        self._send_commit(item)

    def abort(self, handoff: str, cause: str) -> None:
        """The leg closed. Idempotent; also for an id that is yet to be offered."""
        check_handoff_id(handoff)
        item = self._open.get(handoff)
        if item is not None:
            self._fail(item, cause, "client_gone", retryable=False)
        elif self._tombstones.get(handoff) is None:
            self._tombstones.add(
                handoff, failed=Failed(handoff, clip_text(cause), "client_gone", False)
            )

    def shut_down(self, cause: str) -> None:
        for item in list(self._open.values()):
            self._fail(item, cause, "peer_lost", retryable=True)

    # -- messages ------------------------------------------------------------------------------------------

    def on_connected(self, address: str, peer: str, problem: str) -> None:
        for item in list(self._open.values()):
            if item.state is _State.CONNECTING and (item.address, item.peer) == (address, peer):
                if problem:
                    self._fail(item, problem, "peer_lost", retryable=True, tell=False)
                else:
                    self._send_offer(item)

    def on_grant(self, peer: str, message: Grant) -> None:
        item = self._find(peer, message.handoff, answer=True)
        if item is None or item.state is not _State.OFFERED:
            return  # a repeat, or one that _find answered
        try:
            self._check_grant(item, message)
        except KvxferError as error:
            link = self._context.links.get(peer)
            if link is None or not link.peer.alive:  # its regions went with it
                self._fail(item, f"peer {peer} is gone", "peer_lost", retryable=True)
            else:
                self._fail(item, f"unusable grant: {error}", "refused", retryable=False)
            return
        item.grant = message
        item.state = _State.GRANTED
        self._context.events.append(Granted(item.handoff, message.token_begin, message.token_end))

    def on_decline(self, peer: str, message: Decline) -> None:
        item = self._find(peer, message.handoff, answer=False)
        if item is None or item.state not in (_State.OFFERED, _State.CONNECTING):
            return
        if message.refused:
            self._fail(item, message.reason, "refused", retryable=False, tell=False)
            return
        self._context.events.append(Declined(item.handoff, message.reason))
        self._bury(item, "declined")

    def on_accept(self, peer: str, message: Accept) -> None:
        item = self._find(peer, message.handoff, answer=False)
        if item is not None and item.state is _State.COMMITTED and not item.accepted:
            item.accepted = True
            self._settle(item)

    def on_abort(self, peer: str, message: Abort) -> None:
        item = self._find(peer, message.handoff, answer=False)
        if item is not None:
            self._fail(item, message.cause, message.end, retryable=message.retryable, tell=False)
        elif message.handoff not in self._open and self._tombstones.get(message.handoff) is None:
            failed = Failed(message.handoff, message.cause, message.end, message.retryable)
            self._tombstones.add(message.handoff, failed=failed, known=False)

    def on_renew(self, peer: str, handoffs: tuple[str, ...]) -> None:
        """The receiver still holds blocks for these; one that we ended and whose abort was lost is told again."""
        for handoff in handoffs:
            self._find(peer, handoff, answer=True)

    def on_lost(self, peer: str, cause: str) -> None:
        for item in [item for item in self._open.values() if item.peer == peer]:
            if item.state is not _State.CONNECTING:
                self._fail(item, cause, "peer_lost", retryable=True)

    # -- time ----------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Ended writes, then deadlines."""
        for item in list(self._open.values()):
            if item.push is not None:
                self._settle(item)
            if now >= item.deadline and item.handoff in self._open:
                self._fail(item, "the request's deadline passed", "expired", retryable=False)

    def repeat(self, now: float) -> None:
        """Each beat: what is unanswered, and old tombstones."""
        for item in list(self._open.values()):
            if item.state is _State.OFFERED:
                self._send_offer(item)
            elif item.state is _State.COMMITTED and not item.accepted:
                self._send_commit(item)
        self._tombstones.purge(now)

    def held(self, peer: str) -> list[str]:
        """The handoffs that a Renew to ``peer`` lists."""
        return [
            item.handoff
            for item in self._open.values()
            if item.peer == peer
            and item.state not in (_State.CONNECTING, _State.CLOSING)
            and not item.accepted
        ]

    def next_deadline(self) -> float | None:
        waiting = [
            item.deadline
            for item in self._open.values()
            if item.state is not _State.CLOSING and not item.accepted
        ]
        return min(waiting, default=None)

    @property
    def num_closing(self) -> int:
        return sum(item.state is _State.CLOSING for item in self._open.values())

    def open_handoffs(self) -> list[str]:
        return list(self._open)

    # -- inner ---------------------------------------------------------------------------------------------

    def _find_own(self, handoff: str) -> _Handoff | None:
        """For the owner: None once it has ended. Raises for an id that was never offered."""
        item = self._open.get(handoff)
        if item is None and self._tombstones.get(handoff) is None:
            raise InvalidArgumentError(f"handoff {handoff} was not offered here, or ended long ago")
        return item

    def _find(self, peer: str, handoff: str, *, answer: bool) -> _Handoff | None:
        """The open handoff that ``peer`` may speak of; a message for an ended one is answered with its end."""
        item = self._open.get(handoff)
        if item is not None:
            if item.peer == peer:
                return item
            self._context.drop("foreign")
            return None
        self._context.drop("late" if self._tombstones.get(handoff) else "unknown")
        if answer:
            tombstone = self._tombstones.get(handoff)
            if tombstone is None:
                self._send_abort(peer, handoff, "no such handoff", "peer_lost", retryable=True)
            elif tombstone.reply is not None:
                cls, values = tombstone.reply
                self._context.links.send(peer, cls, handoff=handoff, **values)
            elif tombstone.failed is not None:
                failed = tombstone.failed
                self._send_abort(
                    peer, handoff, failed.cause, failed.end, retryable=failed.retryable
                )
        return None

    def _check_grant(self, item: _Handoff, grant: Grant) -> None:
        link = self._context.links.get(item.peer)
        if link is None:
            raise PeerDisconnectedError(f"peer {item.peer} is gone")
        target = link.layout(grant.layout)
        check_mappable(self._context.layout, target)
        check_blocks(target, grant.block_ids, grant.token_begin, grant.token_end)
        if not grant.token_begin < grant.token_end <= item.num_tokens:
            raise InvalidArgumentError(
                f"tokens [{grant.token_begin}, {grant.token_end}) of {item.num_tokens}"
            )
        remote = link.peer.regions.get(grant.region)
        if remote is None:
            raise InvalidArgumentError(f"the peer has no region {grant.region!r}")
        if target.nbytes > remote.nbytes:
            raise InvalidArgumentError(
                f"a layout of {target.nbytes} bytes over a region of {remote.nbytes}"
            )
        item.target, item.remote = target, remote

    def _settle(self, item: _Handoff) -> None:
        """Looks at the writes: the first failure ends the attempt, the last quiesced one frees the sources."""
        failure = item.push.settle() if item.push is not None else None
        # After accept the receiver's set has spoken: a write whose acknowledgement was lost did land.
        if failure is not None and item.state is not _State.CLOSING and not item.accepted:
            self._write_failed(item, failure)
            return
        if item.state not in (_State.COMMITTED, _State.CLOSING):
            return
        if item.push is not None and not item.push.quiesced:
            return
        if item.push is not None and not item.quiet_told:
            item.quiet_told = True
            self._context.events.append(Quiet(item.handoff))
        if item.state is _State.CLOSING:
            del self._open[item.handoff]  # its tombstone was set when it failed
        elif item.accepted:
            self._bury(item, "accepted")

    def _write_failed(self, item: _Handoff, error: KvxferError) -> None:
        if isinstance(error, PeerDisconnectedError):
            self._fail(item, str(error), "peer_lost", retryable=True)
        else:
            self._fail(item, f"a write failed: {error}", "write_failed", retryable=True)

    def _fail(
        self, item: _Handoff, cause: str, end: End, *, retryable: bool, tell: bool = True
    ) -> None:
        if item.state is _State.CLOSING:
            return
        cause = clip_text(cause)
        if item.state is _State.COMMITTED and (item.quiet_told or item.accepted):
            # For the owner it has ended well (or will, by Quiet): its part is done.
            if item.quiet_told:
                self._bury(item, end)
            return
        failed = Failed(item.handoff, cause, end, retryable)
        self._context.events.append(failed)
        self._context.end("sender", end)
        if tell and item.state is not _State.CONNECTING:
            self._send_abort(item.peer, item.handoff, cause, end, retryable=retryable)
        item.state = _State.CLOSING
        if item.push is not None:
            item.push.cancel()
        self._tombstones.add(item.handoff, failed=failed)
        self._settle(item)

    def _bury(self, item: _Handoff, end: End) -> None:
        del self._open[item.handoff]
        self._context.end("sender", end)
        self._tombstones.add(item.handoff)

    def _send_offer(self, item: _Handoff) -> None:
        item.state = _State.OFFERED
        layout = self._context.layout
        # Chunks end on block ends, but the last.
        chunks = -(-item.num_tokens // layout.block_size) + 1
        self._context.links.send(
            item.peer,
            Offer,
            handoff=item.handoff,
            num_tokens=item.num_tokens,
            max_chunks=chunks,
            layout=self._wire,
            model=self._context.model_id,
        )

    def _send_commit(self, item: _Handoff) -> None:
        assert item.push is not None
        self._context.links.send(
            item.peer,
            Commit,
            handoff=item.handoff,
            num_tokens=item.num_tokens,
            cached_tokens=item.cached_tokens,
            transport=item.push.transport()[:64],
            chunk_ends=np.array(item.push.chunk_ends, np.int32),
            first_tokens=np.array(item.first_tokens, np.int32),
        )

    def _send_abort(
        self, peer: str, handoff: str, cause: str, end: End, *, retryable: bool
    ) -> None:
        # That our client went says nothing of the peer's: if its leg still stands, another attempt may help.
        retryable = retryable or end == "client_gone"
        self._context.links.send(
            peer,
            Abort,
            handoff=handoff,
            to="receiver",
            end=end,
            cause=clip_text(cause),
            retryable=retryable,
        )
