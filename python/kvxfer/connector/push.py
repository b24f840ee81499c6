# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The writes of one handoff: chunk by chunk, layer by layer, each posted once, each awaited until quiesced.

Arrival index = chunk x layers + layer. The plan is made once for each chunk; a layer costs one post.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvxfer.connector.context import Context
from kvxfer.connector.protocol import Grant
from kvxfer.errors import InvalidArgumentError, KvxferError
from kvxfer.layout import KVLayout, TransferPlan, plan_transfer

if TYPE_CHECKING:
    from kvxfer.transfer import RemoteRegion, Transfer

__all__ = ["Push"]

_Int64 = npt.NDArray[np.int64]


class _Chunk:
    def __init__(self, index: int, end: int, plan: TransferPlan | None) -> None:
        self.index, self.end = index, end
        self.plan = plan  # None: the receiver wants nothing of it
        self.posted: set[int] = set()

    def spans(self, plan: TransferPlan, layer: int) -> tuple[_Int64, _Int64, _Int64, _Int64 | None]:
        """(source offsets, target offsets, nbytes, bases) of one layer."""
        if len(plan.groups) == 1:
            return (*plan.template, plan.for_layer(layer))
        # K and V without a common template (unequal widths): written out, since a layer is one transfer.
        parts = [
            group.template.repeated(group.bases[group.layers == layer]) for group in plan.groups
        ]
        return (
            np.concatenate([part.src for part in parts]),
            np.concatenate([part.dst for part in parts]),
            np.concatenate([part.nbytes for part in parts]),
            None,
        )


class Push:
    def __init__(
        self,
        context: Context,
        handoff: str,
        num_tokens: int,
        grant: Grant,
        target: KVLayout,
        remote: RemoteRegion,
        blocks: _Int64,
    ) -> None:
        """Raises InvalidArgumentError when the blocks do not hold the granted tokens."""
        self._context, self._handoff, self._num_tokens = context, handoff, num_tokens
        self._grant, self._target, self._remote, self._blocks = grant, target, remote, blocks
        self._layer_at = {layer: at for at, layer in enumerate(context.layout.layers)}
        self._chunk: _Chunk | None = None
        self._writes: list[Transfer] = []  # not yet quiesced
        self.chunk_ends: list[int] = []
        self.nbytes: dict[str, int] = {}  # moved, by transport
        # The whole range once, so that a mistake in the list shows here and not in a forward pass.
        self._plan(grant.token_begin, grant.token_end)

    def layer_done(
        self, chunk_index: int, layer: int, token_begin: int, token_end: int
    ) -> KvxferError | None:
        """Posts one layer. Returns what ends the attempt, if anything; raises for the caller's mistakes."""
        position = self._layer_at.get(layer)
        if position is None:
            raise InvalidArgumentError(
                f"layer {layer} is not held here, {tuple(self._layer_at)} are"
            )
        chunk = self._chunk
        if chunk is None or chunk.index != chunk_index:
            if chunk_index == len(self.chunk_ends) == self._grant.max_chunks:
                return KvxferError(
                    f"the grant allows {self._grant.max_chunks} chunks, one more came"
                )
            chunk = self._chunk = self._open_chunk(chunk_index, token_begin, token_end)
        if token_end != chunk.end or position in chunk.posted:
            raise InvalidArgumentError(
                f"handoff {self._handoff}, chunk {chunk_index}, layer {layer} up to token {token_end}: the "
                f"chunk ends at {chunk.end} and each of its layers comes once"
            )
        chunk.posted.add(position)
        if chunk.plan is None:
            return None
        source, target, nbytes, bases = chunk.spans(chunk.plan, layer)
        try:
            write = self._context.engine.write(
                self._context.region,
                self._remote,
                source,
                target,
                nbytes,
                bases=bases,
                arrival=chunk_index * len(self._layer_at) + position,
                lease=self._grant.lease,
                deadline_s=self._context.config.write_deadline_s,
            )
        except KvxferError as error:
            return error
        self._writes.append(write)
        return None

    def check_complete(self, num_chunks: int) -> None:
        """Raises InvalidArgumentError unless every layer of every chunk was posted, to the last token."""
        posted = len(self._chunk.posted) if self._chunk is not None else 0
        ends = self.chunk_ends
        if num_chunks != len(ends) or ends[-1] != self._num_tokens or posted != len(self._layer_at):
            raise InvalidArgumentError(
                f"commit of handoff {self._handoff} with num_chunks={num_chunks}: chunks ending at {ends} of "
                f"{self._num_tokens} tokens were posted, {posted} of {len(self._layer_at)} layers of the last"
            )

    def settle(self) -> KvxferError | None:
        """Looks at the writes; returns the first failure. ``quiesced`` is up to date afterwards."""
        failure: KvxferError | None = None
        waiting: list[Transfer] = []
        for write in self._writes:
            if not write.done:
                waiting.append(write)
                continue
            if write.state != "done":
                error = write.error
                if not isinstance(error, KvxferError):
                    error = KvxferError(f"a write ended {write.state}: {error}")
                failure = failure or error
            if not write.quiesced:
                waiting.append(write)
            elif write.state == "done":
                name = write.transport or "unknown"
                self.nbytes[name] = self.nbytes.get(name, 0) + write.nbytes_done
                self._context.counters[f"bytes_sent_{name}"] += write.nbytes_done
        self._writes = waiting
        return failure

    def cancel(self) -> None:
        for write in self._writes:
            write.cancel()

    @property
    def quiesced(self) -> bool:
        """No write can read the source blocks any more."""
        return not self._writes

    def transport(self) -> str:
        """What carried the writes, as far as known yet: one name, or several joined by '+'."""
        names = {*self.nbytes, *(write.transport for write in self._writes)}
        return "+".join(sorted(name for name in names if name))

    def _plan(self, begin: int, end: int) -> TransferPlan:
        return plan_transfer(
            self._context.layout,
            self._target,
            self._blocks,
            self._grant.block_ids,
            end,
            first_token=begin,
            by_layer=True,
            kind="direct",
        )

    def _open_chunk(self, index: int, token_begin: int, token_end: int) -> _Chunk:
        ends = self.chunk_ends
        begin = ends[-1] if ends else 0
        follows = token_begin == begin if ends else 0 <= token_begin < token_end
        whole = self._chunk is None or len(self._chunk.posted) == len(self._layer_at)
        if (
            index != len(ends)
            or not follows
            or not whole
            or not begin < token_end <= self._num_tokens
        ):
            raise InvalidArgumentError(
                f"handoff {self._handoff}: chunk {index} of tokens [{token_begin}, {token_end}) does not follow "
                f"whole chunks ending at {ends}, of {self._num_tokens} tokens"
            )
        ends.append(token_end)
        # Chunk 0 reaches down to token 0: the prefix cache supplied what lies before token_begin.
        low, high = max(begin, self._grant.token_begin), min(token_end, self._grant.token_end)
        return _Chunk(index, token_end, self._plan(low, high) if low < high else None)
