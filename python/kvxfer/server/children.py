# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One child process of the launcher: started in a session of its own, heard, stopped, never orphaned.

A child holds the read end of the launcher's lifeline: when the launcher is gone, however it went, the pipe
ends, and the child drains and leaves. When it is ready it says so, once, on a pipe of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvxfer.errors import UnavailableError

__all__ = ["Child", "ChildFailedError"]

_KEPT_LINES = 30


class ChildFailedError(UnavailableError):
    """A child ended, or said nothing for too long, while starting; the message holds its last lines."""


class Child:
    """``on_line(name, line)`` gets each line that it writes."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        lifeline_fd: int,
        pass_fds: Sequence[int] = (),
        on_line: Callable[[str, str], None],
    ) -> None:
        self.name = name
        self.announcement: dict[str, Any] = {}
        self.started_at = 0.0
        self._command = list(command)
        self._env = dict(env)
        self._lifeline_fd = lifeline_fd
        self._pass_fds = tuple(pass_fds)
        self._on_line = on_line
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, timeout_s: float) -> None:
        """Returns when the child has announced itself.

        Raises:
            ChildFailedError: it did not; it is not running any more.
        """
        announce_read, announce_write = os.pipe()
        command = [
            *self._command,
            *("--announce-fd", str(announce_write)),
            *("--lifeline-fd", str(self._lifeline_fd)),
        ]
        self.started_at = time.monotonic()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._env,
                pass_fds=(announce_write, self._lifeline_fd, *self._pass_fds),
                start_new_session=True,  # Ctrl-C reaches the launcher only, which stops its parts in order
            )
        except BaseException:
            os.close(announce_read)
            raise
        finally:
            os.close(announce_write)
        self._reader = asyncio.create_task(self._read_lines())
        try:
            line = await asyncio.wait_for(_read_line(announce_read), timeout_s)
        except asyncio.TimeoutError:
            self.kill()
            await self.wait()
            raise self._failure(f"was not ready within {timeout_s:g} s") from None
        except BaseException:
            self.kill()
            raise
        if not line:
            status = await self.wait()
            raise self._failure(f"ended with {describe_status(status)} while starting")
        self.announcement = json.loads(line)

    def _failure(self, what: str) -> ChildFailedError:
        said = "".join(f"\n  | {line}" for line in self._last_lines) or " it said nothing"
        return ChildFailedError(f"{self.name} {what}; its last lines:{said}")

    async def _read_lines(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while True:
            try:
                raw = await self._process.stdout.readline()
            except ValueError:  # a line beyond the reader's limit; it was dropped
                raw = b"(a very long line)\n"
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            self._last_lines.append(line)
            self._on_line(self.name, line)

    async def wait(self) -> int:
        """Its exit status (negative: the signal that ended it), all its lines read."""
        assert self._process is not None
        status = await self._process.wait()
        if self._reader is not None:
            # A grandchild that inherited the pipe would keep it open.
            await asyncio.wait((self._reader,), timeout=1.0)
            self._reader.cancel()
        return status

    def send(self, number: int) -> None:
        """To the child alone."""
        if self._process is not None and self.alive:
            self._process.send_signal(number)

    def kill(self) -> None:
        """The child and whatever it started."""
        if self._process is not None and self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


async def _read_line(fd: int) -> bytes:
    """One line from a pipe, or nothing when its writer is gone. Closes it."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb")
    )
    try:
        return await reader.readline()
    finally:
        transport.close()


def describe_status(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
