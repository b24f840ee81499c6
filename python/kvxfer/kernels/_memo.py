# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What was found once for arguments like these."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["remember"]

K = TypeVar("K")
V = TypeVar("V")


def remember(memo: dict[K, V], key: K, value: V, most: int) -> V:
    """Keep ``value`` under ``key`` and return it; a memo of ``most`` entries begins anew, so that none grows for ever."""
    if len(memo) >= most:
        memo.clear()
    memo[key] = value
    return value
