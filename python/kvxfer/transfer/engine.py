# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""``TransferEngine``: the typed face of the native engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, SupportsIndex

from kvxfer import _transfer
from kvxfer._transfer import BlockView, Peer, RemoteRegion, Signal, Transfer
from kvxfer.errors import InvalidArgumentError
from kvxfer.transfer._calls import checked, peer_of, refusal
from kvxfer.transfer.config import EngineConfig
from kvxfer.transfer.region import BlockIds, Int64Array, Lease, Offsets, Region, own, theirs
from kvxfer.transfer.secret import user_secret

__all__ = ["Notification", "PeerEvent", "TransferEngine"]


@dataclass(frozen=True)
class Notification:
    """A message of a peer, seen only after the data it was sent with."""

    peer: Peer
    payload: bytes


@dataclass(frozen=True)
class PeerEvent:
    """A peer came (``connected``) or went (``lost``, with the cause)."""

    kind: str
    peer: Peer
    cause: str = field(default="")


class TransferEngine:
    """Registers memory, connects to peers, and moves bytes between the two.

    Every method may be called from any thread; those that can block release the GIL. Mistakes in
    the arguments raise at the call. What goes wrong with a transfer, a lost peer included, is its
    end: ``xfer.state``, ``xfer.error``, raised by ``xfer.wait()`` and ``await xfer``.

    Args:
        name: what peers and error messages call this engine.
        listen: "host:port"; port 0 lets the system choose. Other hosts than loopback need a secret.
        transports: which may be used, for example ``("tcp",)``; None: all that work here, best
            first. One that is named and does not work here is an error, never skipped; what a peer
            asks over one that is not named is refused. (Sessions are set up over tcp in any case.)
        secret: shared by all engines that may talk to each other; None: this user's own.
    """

    def __init__(
        self,
        name: str,
        *,
        listen: str = "127.0.0.1:0",
        transports: Sequence[str] | None = None,
        secret: bytes | str | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        if isinstance(transports, str):
            raise InvalidArgumentError(
                f'transports must be a sequence of names like ("tcp",), not the string {transports!r}'
            )
        if transports is not None and len(transports) == 0:
            raise InvalidArgumentError("transports is empty; None means all that work here")
        if isinstance(secret, str):
            secret = secret.encode()
        if not isinstance(secret, bytes | bytearray | memoryview | None):
            raise InvalidArgumentError(f"secret must be bytes or text, not {type(secret).__name__}")
        if config is not None and not isinstance(config, EngineConfig):
            raise InvalidArgumentError(
                f"config must be an EngineConfig, not {type(config).__name__}"
            )
        self._config = config or EngineConfig()
        try:
            self._core = _transfer.Engine(
                name=name,
                listen=listen,
                transports=list(transports or ()),
                secret=user_secret() if secret is None else bytes(secret),
                secret_is_explicit=secret is not None,
                config=self._config.native(),
            )
        except TypeError as error:
            raise refusal("TransferEngine", error, locals()) from None

    @property
    def name(self) -> str:
        """What peers and error messages call it."""
        return self._core.name

    @property
    def address(self) -> str:
        """``host:port`` where it listens: what a peer connects to.

        With ``listen="0.0.0.0:0"`` it is ``0.0.0.0:PORT``, which tells peers elsewhere only the
        port: give them the name or address by which they reach this host, and that port. Likewise
        for ``[::]``.
        """
        return self._core.address

    @property
    def incarnation(self) -> str:
        """32 hex digits, new for each engine object: who this engine is to its peers."""
        return self._core.incarnation

    @property
    def closed(self) -> bool:
        """True after ``close()``, and in a child that was forked from the engine's process."""
        return self._core.closed

    # ------------------------------------------------------------------ memory

    @checked
    def allocate(
        self, nbytes: SupportsIndex, name: str | None = None, *, require_lease: bool = False
    ) -> Region:
        """Zeroed memory that peers on this host may map to read; only this process can write it.

        As for ``register``, much of it is registered in the background.
        """
        core = self._core.allocate(
            nbytes, name=self._region_name(name), require_lease=require_lease, shareable=True
        )
        return Region(core)

    @checked
    def register(
        self,
        buffer: Any,
        name: str | None = None,
        *,
        require_lease: bool = False,
        share: str = "auto",
    ) -> Region:
        """Memory that exists, C-contiguous: buffer protocol or DLPack on the CPU, or a GPU's memory by
        ``__cuda_array_interface__`` (torch's CUDA tensors have it).

        A list of buffers becomes one region with one offset space (``region.piece_offsets``). The
        buffers are kept alive until the region is deregistered or the engine closed, and its last
        ``Region`` and transfer are gone. No two of them may share memory.

        Where a transport has to register much (verbs pins memory), that goes on in the background:
        ``region.registration``, ``region.wait_registered()``. The region can be used at once.

        A GPU's memory is moved by verbs alone, and registered before this returns; ``share="never"`` is
        not for it. Buffers of one region are all in host memory, or all in one GPU's. What kernels have
        written there must be finished before it is sent, and kernels that read what has come must be
        launched after it has (docs/verbs.md).

        Raises:
            RegistrationError: a transport that ``transports=`` names cannot register it; or it is a GPU's
                memory, and no transport of this engine reaches it.
            UnavailableError: it is said to be a GPU's memory, and CUDA does not work here.
        """
        if share not in ("auto", "never"):
            raise InvalidArgumentError(f'share must be "auto" or "never", not {share!r}')
        core = self._core.register(
            buffer,
            name=self._region_name(name),
            require_lease=require_lease,
            shareable=share != "never",
        )
        return Region(core)

    @checked
    def deregister(self, region: Region, timeout_s: float | None = 5.0) -> None:
        """Returns when no peer can reach the memory any more. Refused while own transfers use it.

        One that is being registered is stopped first, which takes at most one call of a device.
        """
        self._core.deregister(own(region), timeout_s)

    def _region_name(self, name: str | None) -> str:
        return self._core.unused_region_name() if name is None else name

    # ------------------------------------------------------------------ peers

    @checked
    def connect(self, address: str, timeout_s: float = 5.0) -> Peer:
        """The peer that listens at ``address``; the same object when it is connected already.

        Who listens there is found out by a handshake each time. Ctrl-C and ``close()`` end the waiting.

        Raises:
            TransportError: nobody listens, or the secrets differ.
            TransferTimeoutError: no answer within ``timeout_s``.
        """
        return self._core.connect(address, timeout_s)

    def peer_events(self) -> list[PeerEvent]:
        """Peers that came or went since the last call."""
        return [PeerEvent(*event) for event in self._core.peer_events()]

    @checked
    def explain(self, peer: Peer) -> str:
        """Which transports carry requests to this peer, and why the others do not."""
        return self._core.explain(peer_of(peer))

    # ------------------------------------------------------------------ transfers

    def write(
        self,
        region: Region,
        remote: RemoteRegion,
        local_offsets: Offsets,
        remote_offsets: Offsets,
        nbytes: Offsets,
        *,
        bases: Int64Array | None = None,
        notify: bytes | None = None,
        arrival: SupportsIndex | None = None,
        lease: bytes | None = None,
        deadline_s: float | None = None,
        after: Transfer | Signal | None = None,
    ) -> Transfer:
        """Copies spans of ``region`` into ``remote``; returns at once.

        Args:
            local_offsets: int64 ``[n]`` or an int; likewise ``remote_offsets`` and ``nbytes``.
            bases: int64 ``[m, 2]``: the span list is repeated at each (local, remote) pair.
            notify: message that the peer sees after all bytes; ``MAX_NOTIFICATION_NBYTES``.
            arrival: with a lease, the index to set; without one, the tag to count under.
            lease: token of the owner's lease.
            deadline_s: from now; default ``config.deadline_s``.
            after: the state is ``held``, and no byte is touched, before this transfer is done or
                this ``Signal`` set. Deadline and ``cancel()`` hold meanwhile; if a transfer that is
                waited for fails, this one ends as ``cancelled``.
        Raises:
            InvalidArgumentError: out of range, overlapping destinations, wrong dtype, read-only
                destination, closed engine, foreign region: nothing was sent.
            LeaseError: the token is of another incarnation.
            BackPressureError: ``EngineConfig.max_pending`` transfers to this peer have not ended, or
                ``max_pending_spans`` spans of them: wait for some, then offer it again.
        """
        try:
            return self._core.submit(
                False,
                own(region),
                theirs(remote),
                local_offsets,
                remote_offsets,
                nbytes,
                bases,
                notify,
                arrival,
                lease,
                self._deadline(deadline_s),
                after,
            )
        except TypeError as error:
            raise refusal("write", error, locals()) from None

    def read(
        self,
        region: Region,
        remote: RemoteRegion,
        local_offsets: Offsets,
        remote_offsets: Offsets,
        nbytes: Offsets,
        *,
        bases: Int64Array | None = None,
        notify: bytes | None = None,
        arrival: SupportsIndex | None = None,
        lease: bytes | None = None,
        deadline_s: float | None = None,
        after: Transfer | Signal | None = None,
    ) -> Transfer:
        """Copies spans of ``remote`` into ``region``; arguments as for ``write``.

        ``notify`` and ``arrival`` tell the owner that its bytes have been read.
        """
        try:
            return self._core.submit(
                True,
                own(region),
                theirs(remote),
                local_offsets,
                remote_offsets,
                nbytes,
                bases,
                notify,
                arrival,
                lease,
                self._deadline(deadline_s),
                after,
            )
        except TypeError as error:
            raise refusal("read", error, locals()) from None

    def write_blocks(
        self,
        region: Region,
        remote: RemoteRegion,
        local_view: BlockView,
        remote_view: BlockView,
        local_blocks: BlockIds,
        remote_blocks: BlockIds,
        *,
        notify: bytes | None = None,
        arrival: SupportsIndex | None = None,
        lease: bytes | None = None,
        deadline_s: float | None = None,
        after: Transfer | Signal | None = None,
    ) -> Transfer:
        """Copies blocks of one pool into blocks of another, all layers of the views; returns at once.

        Neighbours, also across layers, travel as one piece. Errors name the position in the arrays.

        Args:
            local_view: where the blocks of ``region`` lie; ``remote_view`` likewise. They agree in
                ``nbytes`` and ``num_layers``; strides and bases are each side's own.
            local_blocks: int32 or int64 ``[n]``; ``remote_blocks`` likewise. Sources may repeat,
                destinations may not.
        The other arguments and the errors are those of ``write``.
        """
        try:
            return self._core.submit_blocks(
                False,
                own(region),
                theirs(remote),
                local_view,
                remote_view,
                local_blocks,
                remote_blocks,
                notify,
                arrival,
                lease,
                self._deadline(deadline_s),
                after,
            )
        except TypeError as error:
            raise refusal("write_blocks", error, locals()) from None

    def read_blocks(
        self,
        region: Region,
        remote: RemoteRegion,
        local_view: BlockView,
        remote_view: BlockView,
        local_blocks: BlockIds,
        remote_blocks: BlockIds,
        *,
        notify: bytes | None = None,
        arrival: SupportsIndex | None = None,
        lease: bytes | None = None,
        deadline_s: float | None = None,
        after: Transfer | Signal | None = None,
    ) -> Transfer:
        """Copies blocks of ``remote`` into ``region``; arguments as for ``write_blocks``."""
        try:
            return self._core.submit_blocks(
                True,
                own(region),
                theirs(remote),
                local_view,
                remote_view,
                local_blocks,
                remote_blocks,
                notify,
                arrival,
                lease,
                self._deadline(deadline_s),
                after,
            )
        except TypeError as error:
            raise refusal("read_blocks", error, locals()) from None

    @checked
    def notify(
        self,
        peer: Peer,
        payload: bytes,
        *,
        deadline_s: float | None = None,
        after: Transfer | Signal | None = None,
    ) -> Transfer:
        """Sends a message alone. It is ordered after nothing but ``after``."""
        return self._core.notify(peer_of(peer), payload, self._deadline(deadline_s), after)

    def _deadline(self, deadline_s: float | None) -> float:
        return self._config.deadline_s if deadline_s is None else deadline_s

    def notifications(self) -> list[Notification]:
        """Messages that came since the last call.

        Of each peer at most 256 wait here unread, ``MAX_NOTIFICATION_NBYTES`` at most; further ones wait at the peer,
        and end by their deadlines. So who has many peers, and never asks, holds that much of each.
        """
        return [Notification(*each) for each in self._core.notifications()]

    # ------------------------------------------------------------------ leases and arrivals

    @checked
    def grant(
        self,
        region: Region,
        offsets: Offsets,
        nbytes: Offsets,
        *,
        ttl_s: float,
        peer: Peer | str | None = None,
        num_arrivals: SupportsIndex = 0,
    ) -> Lease:
        """Lets a peer (or whoever holds the token) write and read just these spans for a time."""
        who = peer.incarnation if isinstance(peer, Peer) else peer
        core = self._core.grant(
            own(region), offsets, nbytes, ttl_s=ttl_s, peer=who, num_arrivals=num_arrivals
        )
        return Lease(core, region)

    @checked
    def arrivals(self, tag: SupportsIndex, peer: Peer) -> int:
        """How many transfers without a lease have arrived under ``tag`` from this peer."""
        return self._core.arrivals(tag, peer_of(peer))

    @checked
    def wait_arrivals(
        self, tag: SupportsIndex, peer: Peer, n: SupportsIndex, timeout_s: float | None = None
    ) -> None:
        """Returns when ``arrivals(tag, peer) >= n``.

        Raises:
            TransferTimeoutError: not within ``timeout_s``.
            PeerDisconnectedError: the peer is gone, so the rest will never arrive.
        """
        self._core.wait_arrivals(tag, peer_of(peer), n, timeout_s)

    # ------------------------------------------------------------------ the application's loop

    def fileno(self) -> int:
        """An eventfd, readable after a notification, peer event, arrival or quiet lease, and after
        the end of a transfer, once more when it is ``quiesced`` later than that.
        """
        return self._core.fileno()

    def clear_wakeup(self) -> None:
        """Call this first, then look at what there is: nothing is missed."""
        self._core.clear_wakeup()

    def stats(self) -> dict[str, Any]:
        """Counters of this engine; they only grow, unless the text says that they are of now.

        ``transport``: ``{transport: counters}`` over all peers, also those that are gone. Our own
            transfers: ``requests`` handed to a transport, ``bytes_written`` (accepted by the peer)
            and ``bytes_read`` (landed here), ``notifications_sent``. Those of peers:
            ``requests_served`` (accepted), ``refused``, ``bytes_received`` (their writes),
            ``bytes_served`` (their reads), ``notifications_received``, and ``bytes_sunk``: came for a
            request that was refused, revoked or had ended, and were thrown away.
        ``peers``: ``{incarnation: {"name", "address", "alive", "transport"}}``; ``transport`` as above.
        ``transfers``: ours, by how they ended, ``done``, ``failed``, ``timed_out`` and ``cancelled``;
            and of now: ``in_flight``, and ``unquiesced``: ended, but not ``quiesced`` yet.
        ``spans``: ``given`` by the arguments (spans times bases, blocks times layers), and ``posted``
            after neighbours were joined.
        ``quarantine``: of now: ``nbytes`` that an ended transfer or lease may still touch, and
            ``age_s``, the seconds since the oldest of these ended.
        ``refused``: ``{reason: count}`` of the peers' requests that this engine refused.
        ``registration``: of now, ``{transport: {"regions", "running", "failed", "nbytes", "nbytes_done"}}``
            of the transports that register memory; see ``region.registration``.
        ``late_events``: ends that came for a transfer which had ended otherwise.
        ``late_writes_refused``: requests that came with a lease, or landed in a region, that was not
            open any more.
        ``leases_open`` (of now), ``leases_expired``; ``wakeups`` of the progress thread.
        ``handshakes_refused``; ``last_handshake_refusal``: the address, and why. Empty: none yet.
        """
        return self._core.stats()

    def close(self) -> None:
        """Ends everything: own transfers are cancelled, leases and regions closed. Idempotent."""
        self._core.close()

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"<TransferEngine {self.name!r} at {self.address}{state}>"
