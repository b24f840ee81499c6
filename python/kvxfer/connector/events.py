# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the owner of the blocks is told about its handoffs, and the settings of every timer.

``expect()`` and ``offer()`` each end in exactly one of Accepted, Failed or (sender) Declined, unless the
owner itself declined. Blocks named in ``grant()`` come back with Accepted, or with Quiet after Failed;
blocks named in ``start()`` come back with Quiet, which also follows a good end. Nothing follows the end.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from kvxfer.errors import InvalidArgumentError

__all__ = [
    "ENDS",
    "Accepted",
    "Declined",
    "DuplicateHandoffError",
    "End",
    "Event",
    "Failed",
    "Granted",
    "HandoffConfig",
    "Offered",
    "Quiet",
]

End = Literal[
    "accepted", "declined", "client_gone", "peer_lost", "expired", "write_failed", "refused"
]
ENDS: tuple[End, ...] = get_args(End)


class DuplicateHandoffError(InvalidArgumentError):
    """The handoff id is already open here, or ended here a short while ago; an attempt needs a fresh one."""


@dataclass(frozen=True)
class Offered:
    """Receiver: a prefill worker is ready to start; answer with ``grant`` or ``decline``, now or later."""

    handoff: str
    num_tokens: int
    peer: str  # incarnation


@dataclass(frozen=True)
class Granted:
    """Sender: the decode worker reserved blocks for these tokens; allocate now, then ``start``."""

    handoff: str
    token_begin: int
    token_end: int


@dataclass(frozen=True)
class Declined:
    """Sender: the decode worker computes this prompt itself; drop the request. Ends the handoff."""

    handoff: str
    reason: str


@dataclass(frozen=True)
class Accepted:
    """Receiver: every byte has landed, the lease is closed and quiet, the blocks are the owner's. The good end."""

    handoff: str
    num_tokens: int
    first_tokens: tuple[int, ...]
    cached_tokens: int
    nbytes: int
    transport: str


@dataclass(frozen=True)
class Failed:
    """The handoff will not succeed. Blocks that were granted or started stay leased until Quiet."""

    handoff: str
    cause: str
    end: End
    retryable: bool


@dataclass(frozen=True)
class Quiet:
    """No byte of this handoff can be read from or land in the blocks any more: free or keep them."""

    handoff: str


Event = Offered | Granted | Declined | Accepted | Failed | Quiet


@dataclass(frozen=True, kw_only=True)
class HandoffConfig:
    """Timers run on the endpoint's own clock; durations, never instants, cross between processes."""

    beat_s: float = 1.0  # one message per peer: renewals; repeats of offers and commits
    # Beats come from the thread that also runs the model, and one step on a crowded CPU can take seconds.
    # A killed peer is seen at once through its connection; this timer is for a stopped one.
    lost_after_s: float = 10.0
    lease_ttl_s: float = 30.0
    renew_s: float = 5.0  # a sign of life extends the lease at most this often
    unknown_offer_s: float = 5.0  # an offer may arrive before the leg that announces it
    tombstone_s: float = 60.0  # two lease times: no message of an ended handoff can still matter
    write_deadline_s: float = 30.0
    connect_timeout_s: float = 5.0
    # Bounds on what peers can make us remember.
    max_unknown_offers: int = 1024
    max_tombstones: int = 65536
    max_arrivals: int = 1 << 20  # bits of one lease's arrival set: chunks x layers

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value > 0:
                raise InvalidArgumentError(
                    f"HandoffConfig.{item.name} must be positive, not {value}"
                )
        if self.renew_s + self.beat_s >= self.lease_ttl_s:
            raise InvalidArgumentError(
                f"HandoffConfig.lease_ttl_s={self.lease_ttl_s} must exceed renew_s + beat_s = "
                f"{self.renew_s + self.beat_s}, or leases end while their sender is alive"
            )
