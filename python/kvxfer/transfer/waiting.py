# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""``await transfer``: one eventfd per event loop, watched only while something is awaited."""

from __future__ import annotations

import asyncio
import weakref

from kvxfer import _transfer

__all__ = ["wait_async"]


class _LoopWatch:
    # It holds no loop: the loop is the weak key that it is kept under.
    def __init__(self) -> None:
        self._watch = _transfer.Watch()
        self._pending: dict[int, set[asyncio.Future[None]]] = {}

    def add(self, transfer: _transfer.Transfer) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if transfer.watch(self._watch):
            future.set_result(None)
            return future
        if not self._pending:
            loop.add_reader(self._watch.fileno(), self._on_ready)
        # Ids are unique in one engine only, so several transfers may share an entry; each future
        # looks at its own transfer when it wakes.
        self._pending.setdefault(transfer.id, set()).add(future)
        future.add_done_callback(lambda f: self._forget(transfer.id, f))
        return future

    def _forget(self, transfer_id: int, future: asyncio.Future[None]) -> None:
        futures = self._pending.get(transfer_id)
        if futures is None:
            return
        futures.discard(future)
        if not futures:
            del self._pending[transfer_id]
        loop = future.get_loop()
        if not self._pending and not loop.is_closed():
            loop.remove_reader(self._watch.fileno())

    def _on_ready(self) -> None:
        for transfer_id in self._watch.take():
            for future in tuple(self._pending.get(transfer_id, ())):
                if not future.done():
                    future.set_result(None)


_watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWatch] = (
    weakref.WeakKeyDictionary()
)


async def wait_async(transfer: _transfer.Transfer) -> None:
    """Returns when the transfer is done; raises its error if it ended otherwise."""
    loop = asyncio.get_running_loop()
    watch = _watches.get(loop)
    if watch is None:
        watch = _watches[loop] = _LoopWatch()
    while not transfer.done:
        await watch.add(transfer)
    error = transfer.error
    if error is not None:
        raise error
