# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What each dtype name of a layout means in bytes, and which NumPy dtype stands for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvxfer.errors import LayoutError

__all__ = ["DTYPES", "SHORT_NAMES", "itemsize_of", "meaning_of", "numpy_dtype"]

# NumPy has neither bfloat16 nor fp8: their bytes travel as unsigned integers of the same size.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float8_e4m3": np.dtype(np.uint8),
    "float8_e5m2": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),  # opaque rows: never converted
}

# Libraries add what their type leaves out: "fn" for finite.
SHORT_NAMES = {"float8_e4m3fn": "float8_e4m3"}


def numpy_dtype(name: str, field: str = "dtype") -> np.dtype[Any]:
    """The NumPy dtype that holds ``name``'s bytes."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise LayoutError(field, f"{name!r} is not one of {', '.join(DTYPES)}") from None


def itemsize_of(name: str, field: str = "dtype") -> int:
    """Bytes of one element of ``name``."""
    return numpy_dtype(name, field).itemsize


def meaning_of(array: Any) -> str | None:
    """What an array's own dtype says that its elements are; None for integers, which are bytes of no told meaning.

    Integers hold what libraries have no type for, and raw memory: of these a layout's dtype is believed. A dtype that
    is a number format of its own (``float16``) is compared with the layout's.
    """
    name = str(getattr(array, "dtype", "int")).removeprefix("torch.")
    return None if name.startswith(("int", "uint")) else SHORT_NAMES.get(name, name)
