# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The owner's handles: a region of memory that peers may be given access to, and a lease on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from kvxfer import _transfer
from kvxfer.errors import InvalidArgumentError

__all__ = ["BlockIds", "Int64Array", "Lease", "Offsets", "Region", "Registration", "own", "theirs"]

Int64Array = npt.NDArray[np.int64]
BlockIds = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Offsets = Int64Array | int | np.int64


def _int64(name: str, values: Sequence[int]) -> Int64Array:
    """Whole numbers as they are: NumPy would cut 1.9 to 1, and take "1" for 1."""
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise InvalidArgumentError(f"{name}[{i}] must be an int, not {value!r}")
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidArgumentError(f"{name}[{i}] = {value} does not fit into 64 bits")
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True)
class Registration:
    """How far a transport is with a region that it has to register (verbs pins memory, for each rail).

    ``state``: ``"running"``; ``"done"``; ``"failed"``, and ``reason`` says why; or ``"dropped"``: the
    region was deregistered, or the engine closed, before it was done.
    ``nbytes_done`` of ``nbytes``: the region's bytes, counted once for each rail.
    ``detail``: what there is to say of one that is done, such as by which way a NIC reaches a GPU's
    memory; else empty.
    """

    state: str
    nbytes_done: int
    nbytes: int
    reason: str | None
    detail: str = ""


class Region:
    """Registered or allocated memory of this process, one linear offset space.

    To drop the object does not deregister it: the engine keeps the region, and its memory, and
    peers reach it, until ``engine.deregister(region)`` or ``engine.close()``.
    """

    def __init__(self, core: _transfer.Region) -> None:
        self._core = core

    @property
    def name(self) -> str:
        """What peers find it by: ``peer.regions[name]``."""
        return self._core.name

    @property
    def nbytes(self) -> int:
        """Its size, of all buffers together."""
        return self._core.nbytes

    @property
    def writable(self) -> bool:
        """False for a read-only buffer, which can be a source but not a destination."""
        return self._core.writable

    @property
    def device(self) -> str:
        """``"cpu"``, or ``"cuda:N"``: memory of that GPU, which verbs alone moves and no CPU touches."""
        return self._core.device

    @property
    def piece_offsets(self) -> tuple[int, ...]:
        """Where each of the registered buffers begins in the region's offset space."""
        return tuple(self._core.piece_offsets)

    @property
    def page_nbytes(self) -> int:
        """Size of the pages of allocated memory, 0 of registered memory."""
        return self._core.page_nbytes

    @property
    def fill_gb_per_s(self) -> float:
        """The rate at which the pages of allocated memory were filled."""
        return self._core.fill_gb_per_s

    @property
    def backing(self) -> str:
        """What allocated memory is made of, in words, and why not of huge pages; else empty."""
        return self._core.backing

    @property
    def registration(self) -> dict[str, Registration]:
        """By transport, those that register memory. Until it is done they move the bytes otherwise:
        verbs in messages, slower.
        """
        return {
            transport: Registration(
                state,
                done,
                nbytes,
                text if state == "failed" else None,
                text if state == "done" else "",
            )
            for transport, state, done, nbytes, text in self._core.registration
        }

    def wait_registered(self, timeout_s: float | None = None) -> None:
        """Returns when no transport registers the region any more; ``registration`` says how it went.

        Raises:
            RegistrationError: a transport that ``transports=`` names could not. ``write``, ``read`` and
                ``grant`` of the region raise it too.
            TransferTimeoutError: not within ``timeout_s``; it goes on.
            InvalidArgumentError: the region was deregistered meanwhile.
        """
        self._core.wait_registered(timeout_s)

    @cached_property
    def array(self) -> npt.NDArray[np.uint8]:
        """The bytes, as a view that keeps the memory alive; a region of one buffer in host memory only."""
        if self.device != "cpu":
            raise InvalidArgumentError(
                f"region {self.name!r} is memory of {self.device}, which the CPU cannot touch; "
                "use the tensors it was made of"
            )
        if len(self.piece_offsets) != 1:
            raise InvalidArgumentError(
                f"region {self.name!r} has {len(self.piece_offsets)} pieces and no single array; "
                "use the buffers it was made of"
            )
        return np.frombuffer(memoryview(self._core), np.uint8)

    def __repr__(self) -> str:
        return f"<Region {self.name!r}, {self.nbytes} bytes>"


class Lease:
    """The right that the owner of a region gave to a peer, and the owner's means to end it.

    To drop the object does not revoke it: the token stays good until ``revoke()``,
    ``begin_revoke()``, the end of its time to live, ``engine.deregister()`` of its region, or
    ``engine.close()``.
    """

    def __init__(self, core: _transfer.Lease, region: Region) -> None:
        self._core = core
        self.region = region

    @property
    def token(self) -> bytes:
        """What the holder passes as ``lease=``; at most 128 bytes, unguessable."""
        return self._core.token

    @property
    def num_arrivals(self) -> int:
        """How many arrival indices it has: 0 to ``num_arrivals - 1``."""
        return self._core.num_arrivals

    @property
    def num_arrived(self) -> int:
        """How many different indices have arrived."""
        return self._core.num_arrived

    @property
    def arrived(self) -> Int64Array:
        """Sorted indices of the transfers that have landed under this lease; a set."""
        return np.asarray(self._core.arrived_indices(), dtype=np.int64)

    def wait_arrived(
        self, indices: Int64Array | Sequence[int] | SupportsIndex, timeout_s: float | None = None
    ) -> None:
        """Returns when all ``indices`` (an int64 array, a list, or one) have arrived.

        Raises:
            InvalidArgumentError: an index is out of range.
            TransferTimeoutError: not within ``timeout_s`` (seconds; None: for ever).
            LeaseError: the lease ended, so the rest will never arrive.
        """
        if isinstance(indices, (list, tuple, range)):
            indices = _int64("indices", indices)
        self._core.wait_arrived(indices, timeout_s)  # type: ignore[arg-type]

    def extend(self, ttl_s: float) -> None:
        """The lease lives for ``ttl_s`` seconds from now.

        Raises:
            LeaseError: it has ended already; grant a new one.
        """
        self._core.extend(ttl_s)

    @property
    def expired(self) -> bool:
        """True when the end of its time to live closed it, and not a revoke."""
        return self._core.expired

    @property
    def closed(self) -> bool:
        """Revoked or expired: nothing new is taken. See ``quiet`` for what was on its way."""
        return self._core.closed

    def begin_revoke(self) -> None:
        """Closes the lease and returns at once; ``quiet`` follows, signalled by the eventfd."""
        self._core.begin_revoke()

    @property
    def quiet(self) -> bool:
        """True when nothing can land under this lease any more, whatever the peer does."""
        return self._core.quiet

    def revoke(self, timeout_s: float | None = None) -> None:
        """Closes the lease and returns when it is quiet.

        Raises:
            TransferTimeoutError: not quiet within ``timeout_s``; the spans stay quarantined.
        """
        self._core.revoke(timeout_s)

    def __repr__(self) -> str:
        state = "quiet" if self.quiet else "closed" if self.closed else "open"
        return f"<Lease on {self.region.name!r}, {state}, {self.num_arrived} arrived>"


def own(region: Region) -> _transfer.Region:
    """The native region of an argument, which may be anything: memory has to be registered first."""
    if isinstance(region, Region):
        return region._core
    raise InvalidArgumentError(
        f"region must be a Region, not {type(region).__name__}: memory is registered first, "
        "region = engine.register(buffer)"
    )


def theirs(remote: _transfer.RemoteRegion) -> _transfer.RemoteRegion:
    """The argument, if it is a region of a peer."""
    if isinstance(remote, _transfer.RemoteRegion):
        return remote
    raise InvalidArgumentError(
        f"remote must be a RemoteRegion, not {type(remote).__name__}: peer.regions[name] is one"
    )
