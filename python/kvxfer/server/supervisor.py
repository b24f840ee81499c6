# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Starts the launcher's children, keeps them running, and ends them in order: router, prefill, decode."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from kvxfer.server.children import Child, ChildFailedError, describe_status
from kvxfer.server.tasks import end_tasks

__all__ = ["Plan", "Supervisor"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_STEADY_S = 20.0  # who lived that long did not die of starting
_MAX_ROUTER_DEATHS = 5  # in a row, none of them steady
_LAST_GRACE_S = 5.0


@dataclass(frozen=True)
class Plan:
    sock: socket.socket  # where the router listens
    workers: tuple[
        tuple[str, tuple[str, ...]], ...
    ]  # label and command, in the order of their ending
    router: tuple[str, ...]
    env: Mapping[str, str]
    start_timeout_s: float
    shutdown_timeout_s: float
    greeting: str


class Supervisor:
    def __init__(self, plan: Plan, console: Console, *, url: str) -> None:
        self._plan = plan
        self._console = console
        self._url = url
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._workers: dict[str, Child] = {}
        self._router: Child | None = None
        self._board: _Board | None = None
        self._stop = asyncio.Event()
        self._stopping = False

    @property
    def _children(self) -> list[Child]:
        """In the order of their ending."""
        workers = [
            self._workers[label] for label, _ in self._plan.workers if label in self._workers
        ]
        return [*([self._router] if self._router else []), *workers]

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        stopped = asyncio.create_task(self._stop.wait())
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(self._start())]
        status = 0
        try:
            await asyncio.wait((tasks[0], stopped), return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
                self._greet()
                tasks = [asyncio.create_task(self._keep_router())]
                tasks += [
                    asyncio.create_task(self._keep_worker(label)) for label, _ in self._plan.workers
                ]
                # Only the router's keeper ever returns: it gave up.
                await asyncio.wait((*tasks, stopped), return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        task.result()
        except ChildFailedError as error:
            self._say(str(error))
            status = 1
        finally:
            self._stopping = True
            await end_tasks(stopped, *tasks)
            try:
                await self._end(self._plan.shutdown_timeout_s if status == 0 else _LAST_GRACE_S)
            finally:
                for child in self._children:
                    child.kill()
                os.close(self._lifeline_write)
                os.close(self._lifeline_read)
        return status

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._say("second signal: ending everything now")
            for child in self._children:
                child.kill()
        else:
            wait_s = self._plan.shutdown_timeout_s
            self._say(
                f"stopping: running answers have {wait_s:g} s to end; a second Ctrl-C ends now"
            )
        self._stop.set()

    def _say(self, text: str) -> None:
        # Whoever read our output may have left (`| head`); the server goes on.
        with contextlib.suppress(BrokenPipeError):
            self._console.print(text)

    # -- starting ----------------------------------------------------------------------------------------

    async def _start(self) -> None:
        with _Board(self._console).shown() as board:
            self._board = board
            starts = [
                asyncio.create_task(self._start_worker(label)) for label, _ in self._plan.workers
            ]
            try:
                done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            finally:
                await end_tasks(*starts)
            await self._start_router()
        self._board = None

    async def _start_worker(self, label: str) -> None:
        command = dict(self._plan.workers)[label]
        child = self._workers[label] = self._child(label, command)
        await self._start_child(child)

    async def _start_router(self) -> None:
        command = list(self._plan.router)
        for child in self._workers.values():
            if "url" in child.announcement:
                command += ["--worker", child.announcement["url"]]
        self._router = self._child("router", tuple(command), self._plan.sock.fileno())
        await self._start_child(self._router)

    def _child(self, name: str, command: tuple[str, ...], *fds: int) -> Child:
        return Child(
            name,
            command,
            env=self._plan.env,
            lifeline_fd=self._lifeline_read,
            pass_fds=fds,
            on_line=self._heard,
        )

    async def _start_child(self, child: Child) -> None:
        if self._board is not None:
            self._board.begin(child.name)
        await child.start(self._plan.start_timeout_s)
        if self._board is not None:
            self._board.ready(child.name, time.monotonic() - child.started_at)

    def _heard(self, name: str, line: str) -> None:
        if self._board is not None:  # while starting, lines are kept: they are shown if it fails
            self._board.heard(name, line)
        else:
            self._say(f"{name} | {line}")

    def _greet(self) -> None:
        self._say(f"\nkvxfer is ready at {self._url}")
        for child in self._children:
            self._say(f"  {child.name:<10} pid {child.pid:<8} {child.announcement.get('url', '')}")
        self._say(f"\n{self._plan.greeting}\nCtrl-C stops it.")

    # -- keeping -----------------------------------------------------------------------------------------

    async def _keep_worker(self, label: str) -> None:
        pause_s, url = _FIRST_PAUSE_S, self._workers[label].announcement["url"]
        while True:
            pause_s = await self._mourn(self._workers[label], pause_s)
            try:
                await self._start_worker(label)
            except ChildFailedError as error:
                self._say(str(error))
                continue
            old_url, url = url, self._workers[label].announcement["url"]
            await self._register(url, old_url)
            self._say(f"{label} is back (pid {self._workers[label].pid})")

    async def _keep_router(self) -> None:
        pause_s, deaths = _FIRST_PAUSE_S, 0
        while True:
            assert self._router is not None
            router = self._router
            await self._router.wait()
            deaths = 1 if time.monotonic() - router.started_at > _STEADY_S else deaths + 1
            if deaths > _MAX_ROUTER_DEATHS:
                raise ChildFailedError(f"the router died {deaths} times in a row; giving up")
            pause_s = await self._mourn(router, pause_s)
            try:
                await self._start_router()
            except ChildFailedError as error:
                self._say(str(error))
                continue
            self._say(f"the router is back (pid {self._router.pid})")

    async def _mourn(self, child: Child, pause_s: float) -> float:
        """Waits for its end and then a while; the next pause."""
        status = await child.wait()
        if time.monotonic() - child.started_at > _STEADY_S:
            pause_s = _FIRST_PAUSE_S
        self._say(
            f"{child.name} (pid {child.pid}) died with {describe_status(status)}; "
            f"starting it again in {pause_s:g} s"
        )
        await asyncio.sleep(pause_s)
        return min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _register(self, new_url: str, old_url: str) -> None:
        """Tells the router, until it hears; a router that is being replaced learns it at its start."""
        headers = {"Authorization": f"Bearer {self._plan.env['KVXFER_SECRET']}"}
        async with httpx.AsyncClient(
            base_url=self._url, headers=headers, trust_env=False
        ) as client:
            while True:
                try:
                    answer = await client.post("/workers", json={"url": new_url})
                    answer.raise_for_status()
                    if old_url != new_url:
                        await client.delete(f"/workers/{urlsplit(old_url).netloc}")
                    return
                except httpx.HTTPError as error:
                    self._say(f"the router did not take {new_url} yet: {error!r}")
                    await asyncio.sleep(1.0)

    # -- ending ------------------------------------------------------------------------------------------

    async def _end(self, timeout_s: float) -> None:
        self._plan.sock.close()
        end = time.monotonic() + timeout_s
        roles: list[list[Child]] = []
        for child in self._children:
            kind = child.name.rpartition("-")[0]
            if roles and roles[-1][0].name.rpartition("-")[0] == kind:
                roles[-1].append(child)
            else:
                roles.append([child])
        for group in roles:
            for child in group:
                child.send(signal.SIGTERM)
            waits = [asyncio.create_task(child.wait()) for child in group if child.alive]
            if waits:
                # Each stage has its chance, even if the one before took all the time.
                left_s = max(_LAST_GRACE_S, end - time.monotonic())
                await asyncio.wait(waits, timeout=left_s)
            for child in group:
                if child.alive:
                    self._say(f"{child.name} (pid {child.pid}) did not end in time; killed")
                    child.kill()
            if waits:
                await asyncio.gather(*waits)


class _Board:
    """What starts, for how long, and what it said last: moving lines on a terminal, plain ones elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description}", markup=False),
            )
            self._progress = Progress(*columns, TimeElapsedColumn(), console=console)

    @contextlib.contextmanager
    def shown(self) -> Iterator[_Board]:
        with self._progress or contextlib.nullcontext():
            yield self

    def begin(self, name: str) -> None:
        if self._progress is None:
            self._console.print(f"starting {name}")
        else:
            self._rows[name] = self._progress.add_task(f"{name}: starting", total=1)

    def heard(self, name: str, line: str) -> None:
        if self._progress is not None:
            self._progress.update(self._rows[name], description=f"{name}: {line[:70]}")

    def ready(self, name: str, seconds: float) -> None:
        if self._progress is None:
            self._console.print(f"{name} is ready after {seconds:.1f} s")
        else:
            self._progress.update(self._rows[name], description=f"{name}: ready", completed=1)
