# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Typed access to the fields of a JSON file that others wrote, with errors that name file, field and value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvxfer.errors import InvalidArgumentError

__all__ = ["Fields", "read_json"]


class Fields:
    """Typed access to a JSON object; each error names the field and the value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, name: str, message: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self.where}: {name} {message}")

    def refused(self, name: str, why: str) -> InvalidArgumentError:
        return self.error(name, f"= {self.values.get(name)!r} is not supported: {why}")

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        above: float = 0.0,
        below: float = 1e30,
    ) -> float:
        """A JSON integer becomes a float: torch cannot compute with one above 2^63."""
        return float(self._bounded(name, default, above, below))

    def optional(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def count(
        self, name: str, default: int | None = None, *, above: int = 0, below: int = 2**31
    ) -> int:
        value = self._bounded(name, default, above, below)
        if not isinstance(value, int):
            raise self.error(name, f"must be a whole number, not {value!r}")
        return value

    def _bounded(self, name: str, default: float | None, above: float, below: float) -> float:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, not {value!r}")
        if not above < value < below:
            raise self.error(name, f"must be above {above:g} and below {below:g}, not {value!r}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(name, f"must be a token id or a list of them, not {value!r}")
        return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
