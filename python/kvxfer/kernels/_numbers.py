# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that are single numbers: nothing is cut, rounded or read as something else on the way."""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any

import numpy as np

from kvxfer.errors import InvalidArgumentError

__all__ = ["MOST", "finite", "flag", "shown", "whole"]

MOST = 2**31 - 1  # what the kernels' counts of tokens hold


def whole(name: str, value: Any, low: int, high: int | None = None, *, expected: str = "") -> int:
    """An integer from ``low`` to ``high``, Python's or NumPy's; a float or a bool is none, whatever its value.

    Args:
        expected: the range in words, where the numbers alone do not say all.
    """
    number = value if type(value) is int else _index_of(value)
    if number is None or number < low or (high is not None and number > high):
        if not expected:
            expected = f">= {low}" if high is None else f"{low} to {high}"
        kind = "an integer " if number is None else ""
        raise InvalidArgumentError(f"{name}: expected {kind}{expected}, given {shown(value)}")
    return number


def finite(name: str, value: Any, expected: str = "a finite value", *, low: float = -math.inf) -> float:  # fmt: skip
    """A finite float >= ``low`` of any kind of number, a bool excepted; an array of one element without axes is one."""
    number = value if type(value) is float else _float_of(value)
    if number is None or not math.isfinite(number) or number < low:
        raise InvalidArgumentError(f"{name}: expected {expected}, given {shown(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False: the text "false" is neither, and would count as True."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InvalidArgumentError(f"{name}: expected True or False, given {shown(value)}")


def shown(value: Any) -> str:
    """The value for a message; what is long or no value in itself by its kind."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, np.generic):
        return f"{value!s} ({value.dtype})"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {list(shape)}"
    plain = value is None or isinstance(value, int | float | str | bytes | tuple | list | dict)
    return reprlib.repr(value) if plain else f"a {type(value).__name__}"


def _index_of(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _float_of(value: Any) -> float | None:
    if isinstance(value, bool | str | bytes) or getattr(value, "ndim", None) not in (None, 0):
        return None
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind not in "iuf":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
