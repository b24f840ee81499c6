# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks reserved for one handoff: the lease on them, what must arrive under it, and what has.

Which arrivals complete the set is a pure function of the commit's chunks and the granted tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvxfer.connector.context import Context, check_blocks
from kvxfer.connector.protocol import MAX_BLOCKS, Commit, Offer, expected_arrivals
from kvxfer.errors import InvalidArgumentError, LeaseError
from kvxfer.layout import plan_transfer

__all__ = ["Reservation"]


class Reservation:
    def __init__(
        self,
        context: Context,
        peer: str,
        offer: Offer,
        block_ids: npt.ArrayLike,
        token_begin: int,
        token_end: int,
    ) -> None:
        """Raises InvalidArgumentError for blocks or tokens that do not fit; nothing is leased then."""
        where = f"grant of handoff {offer.handoff}"
        if not 0 <= token_begin < token_end <= offer.num_tokens:
            raise InvalidArgumentError(
                f"{where}: tokens [{token_begin}, {token_end}) of {offer.num_tokens}; at least one token "
                "must be wanted (decline otherwise)"
            )
        layout, config = context.layout, context.config
        blocks = np.asarray(block_ids, dtype=np.int32).reshape(-1)
        check_blocks(layout, blocks, token_begin, token_end)
        if len(blocks) > MAX_BLOCKS:
            raise InvalidArgumentError(
                f"{where}: {len(blocks)} blocks, one message names {MAX_BLOCKS}; use bigger blocks for "
                "prompts of this length"
            )
        # Our own bytes of those tokens, all layers: what may be written, and nothing beside it.
        spans = plan_transfer(
            layout, layout, blocks, blocks, token_end, first_token=token_begin, kind="direct"
        )
        self._context, self._offer = context, offer
        self._num_layers = len(layout.layers)
        most = max(1, config.max_arrivals // self._num_layers)
        self._max_chunks = min(offer.max_chunks, offer.num_tokens, most)
        self._tokens = int(token_begin), int(token_end)
        self._expected: npt.NDArray[np.int64] | None = None
        self.commit: Commit | None = None
        self.num_arrived = 0
        self.nbytes = spans.total_nbytes
        self.lease = context.engine.grant(
            context.region,
            spans.dst_offsets,
            spans.nbytes,
            ttl_s=config.lease_ttl_s,
            peer=peer,
            num_arrivals=self._max_chunks * self._num_layers,
        )
        self.until = context.clock() + config.lease_ttl_s
        # Repeated as it is when the offer is repeated.
        self.grant: dict[str, Any] = {
            "token_begin": self._tokens[0],
            "token_end": self._tokens[1],
            "max_chunks": self._max_chunks,
            "ttl_s": config.lease_ttl_s,
            "region": context.region.name,
            "lease": bytes(self.lease.token),
            "layout": layout.to_wire(),
            "block_ids": blocks,
        }

    @property
    def token_end(self) -> int:
        return self._tokens[1]

    def take_commit(self, commit: Commit) -> str:
        """Empty, or what is wrong with it."""
        ends = commit.chunk_ends.astype(np.int64)
        if (
            commit.num_tokens != self._offer.num_tokens
            or not 0 < len(ends) <= self._max_chunks
            or ends[-1] != commit.num_tokens
            or (np.diff(ends, prepend=0) <= 0).any()
            or not len(commit.first_tokens)
        ):
            return (
                f"a commit of {commit.num_tokens} tokens in {len(ends)} chunks with "
                f"{len(commit.first_tokens)} first tokens contradicts the offer of {self._offer.num_tokens}"
            )
        self.commit = commit
        self._expected = expected_arrivals(commit.chunk_ends, *self._tokens, self._num_layers)
        return ""

    def look(self) -> bool:
        """Whether more has arrived since the last look."""
        before, self.num_arrived = self.num_arrived, self.lease.num_arrived
        return self.num_arrived != before

    @property
    def is_complete(self) -> bool:
        """Commit is here and exactly what it promised has arrived."""
        expected = self._expected
        return (
            expected is not None
            and self.num_arrived == len(expected)
            and np.array_equal(self.lease.arrived, expected)
        )

    @property
    def is_wrong(self) -> bool:
        """More has arrived than the commit accounts for."""
        return self._expected is not None and self.num_arrived > len(self._expected)

    def is_over(self, now: float) -> bool:
        return self.lease.expired or now >= self.until

    def extend(self, now: float) -> None:
        """At a sign of life of the sender. Too late is no error: ``is_over`` tells."""
        config = self._context.config
        if now < self.until - config.lease_ttl_s + config.renew_s:
            return
        try:
            self.lease.extend(config.lease_ttl_s)
        except LeaseError:
            self.until = now  # it ended by itself a moment ago
        else:
            self.until = now + config.lease_ttl_s
