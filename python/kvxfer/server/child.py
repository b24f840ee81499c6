# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""An HTTP app as the launcher's child: announces itself, drains on SIGTERM, leaves when the launcher is gone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from kvxfer.errors import InvalidArgumentError

__all__ = ["bind", "serve_app"]

log = logging.getLogger(__name__)
_KEEP_ALIVE_S = 65  # longer than what proxies and clients pool, so that they close first
_LAST_WORDS_S = 5.0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InvalidArgumentError: the port is in use or no port at all, or the host is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise InvalidArgumentError(f"port {port} is not between 0 and 65535; 0 takes a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise InvalidArgumentError(
                f"cannot listen on {host}, port {port}: {error.strerror}; see --host and --port"
            ) from error
        raise InvalidArgumentError(
            f"port {port} on {host} is in use; choose another with --port (0 takes a free one)"
        ) from error
    return sock


class _Server(uvicorn.Server):
    """uvicorn with our signals: its own handling would re-raise SIGTERM after a clean end."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


def serve_app(
    app: ASGIApp,
    sock: socket.socket,
    *,
    shutdown_timeout_s: float,
    on_drain: Callable[[], None],
    drained: Callable[[], Coroutine[Any, Any, None]] | None = None,
    announcement: Mapping[str, Any] | None = None,
    announce_fd: int | None = None,
    lifeline_fd: int | None = None,
) -> int:
    """Serves until SIGTERM, SIGINT or the lifeline's end; then drains, for ``shutdown_timeout_s`` at most.

    A second signal ends what still runs. Returns the exit status.

    Args:
        drained: awaited after ``on_drain`` and before the door closes; a worker goes on answering its
            router's polls meanwhile, or it would be given up with its work unfinished.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(shutdown_timeout_s)),
    )

    def announce() -> None:
        if announce_fd is not None:
            with os.fdopen(announce_fd, "wb") as pipe:
                pipe.write(json.dumps(announcement).encode() + b"\n")

    server = _Server(config, announce)

    leaving: asyncio.Task[None] | None = None

    async def leave() -> None:
        if drained is not None:
            try:
                await asyncio.wait_for(drained(), shutdown_timeout_s)
            except asyncio.TimeoutError:
                log.warning("the drain took longer than %g s and is cut short", shutdown_timeout_s)
        server.should_exit = True

    def stop() -> None:
        nonlocal leaving
        if leaving is not None:
            server.should_exit = server.force_exit = True
        else:
            on_drain()
            leaving = asyncio.create_task(leave())

    def launcher_gone() -> None:
        assert lifeline_fd is not None
        if os.read(lifeline_fd, 1):
            return
        asyncio.get_running_loop().remove_reader(lifeline_fd)
        # Nobody is left to kill this process if its drain hangs.
        last_resort = threading.Timer(shutdown_timeout_s + _LAST_WORDS_S, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        if leaving is None:
            stop()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        if lifeline_fd is not None:
            loop.add_reader(lifeline_fd, launcher_gone)
        await server.serve(sockets=[sock])
        if leaving is not None:
            leaving.cancel()

    asyncio.run(main())
    return 0 if server.started else 1
