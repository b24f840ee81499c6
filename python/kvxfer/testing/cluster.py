# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A whole server as its user starts it (`kvxfer serve`), for end-to-end tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import httpx

__all__ = ["Cluster", "wait_until"]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Polls ``condition`` until true; raises ``TimeoutError`` naming ``what``."""
    end = time.monotonic() + timeout_s
    tick = threading.Event()
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"after {timeout_s} s still waiting for {what}")
        tick.wait(0.02)


class Cluster:
    """Starts `kvxfer serve` on a free port, waits for its URL, ends it with SIGTERM and checks that it is gone."""

    def __init__(
        self, model_dir: Path | None, *arguments: str, start_timeout_s: float = 90.0
    ) -> None:
        command = [sys.executable, "-m", "kvxfer", "serve"]
        if model_dir is not None:
            command.append(str(model_dir))
        command += ["--port", "0", *arguments]
        self._output: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            start_new_session=True,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        try:
            wait_until(self._announced, start_timeout_s, "the server's URL")
        except BaseException:
            self.close()
            raise
        self.client = httpx.Client(base_url=self.url, timeout=60.0)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._output.append(line)

    def _announced(self) -> bool:
        found = re.search(r"(http://[\w.\[\]:]+:\d+)", self.output)
        if found and "curl" in self.output:
            self.url = found[1]
            return True
        if self.process.poll() is not None:
            raise RuntimeError(f"kvxfer serve ended with {self.process.returncode}:\n{self.output}")
        return False

    @property
    def output(self) -> str:
        return "".join(self._output)

    def children(self, word: str = "") -> list[int]:
        """Process ids of the launcher's children whose command line holds ``word``."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                pid = int(entry.name)
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if int(stat[1]) == self.process.pid and stat[0] != "Z" and word in line:
                    found.append(pid)
        return found

    def ready(self) -> bool:
        """Whether the router could serve a request now: false also while it cannot be reached."""
        try:
            return self.client.get("/readiness").status_code == 200
        except httpx.HTTPError:
            return False

    def worker(self, role: str) -> int:
        """Process id of the only worker with this role."""
        (pid,) = self.children(f"--role {role}")
        return pid

    def metrics(self) -> dict[str, float]:
        """The router's /metrics as ``{'name{label="value"}': number}``."""
        text = self.client.get("/metrics").raise_for_status().text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def blocks(self) -> dict[str, float]:
        """Blocks by state, summed over all workers."""
        found: dict[str, float] = {}
        for name, value in self.metrics().items():
            match = re.match(r'kvxfer:blocks\{.*state="(\w+)".*\}', name)
            if match:
                found[match[1]] = found.get(match[1], 0.0) + value
        return found

    def complete(
        self, prompt: str | Sequence[int], *, max_tokens: int, **fields: object
    ) -> dict[str, object]:
        """One non-streamed completion; raises for an HTTP error."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
        answer = self.client.post("/v1/completions", json=body)
        if answer.is_error:
            raise RuntimeError(f"{answer.status_code}: {answer.text}\n{self.output[-4000:]}")
        result: dict[str, object] = answer.json()
        return result

    def stream_lines(self, body: dict[str, object]) -> Iterator[str]:
        """The data lines of one streamed completion."""
        with self.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            answer.raise_for_status()
            yield from (line for line in answer.iter_lines() if line)

    def close(self) -> None:
        """SIGTERM, then a bounded wait; kills what is left and says so."""
        if hasattr(self, "client"):
            self.client.close()
        children = self.children()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=45)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"kvxfer serve did not end on SIGTERM:\n{self.output}") from None
        finally:
            self._reader.join(timeout=5)
            if self.process.stdout is not None:
                self.process.stdout.close()
        left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left:
            raise RuntimeError(f"processes {left} outlived kvxfer serve:\n{self.output}")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
