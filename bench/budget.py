# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""How long a run may take, and a report that is on the disk however the run ends."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from common import write_json


class Budget:
    """Seconds for a list of phases, each with a share; what one leaves over is for those after it."""

    def __init__(self, seconds: float | None, shares: Iterable[float]) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._left = list(shares)

    def next_deadline(self) -> float:
        """When the phase that begins now should end, by ``time.monotonic()``."""
        share, rest = self._left.pop(0), sum(self._left)
        now = time.monotonic()
        return now + max(0.0, self._end - now) * share / (share + rest)


class Report:
    """Rows and ratios as they come, written each time; ``stopped`` says why the run is not whole."""

    def __init__(self, path: Path | str | None, facts: Mapping[str, Any]) -> None:
        self._path = path
        self.found: dict[str, Any] = {
            "schema": 3,
            "stopped": "it is still running, or was killed",
            "facts": facts,
            "rows": [],
            "ratios": [],
            "skipped": {},
        }

    def add(self, rows: Iterable[dict[str, Any]], found: Iterable[dict[str, Any]] = ()) -> None:
        self.found["rows"] += rows
        self.found["ratios"] += found
        self.write()

    def write(self, stopped: str | None = "it is still running, or was killed") -> None:
        self.found["stopped"] = stopped
        write_json(self._path, self.found)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that what was measured is written before the end."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
