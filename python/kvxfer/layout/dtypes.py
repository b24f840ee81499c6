# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What each dtype name of a layout means in bytes, and which NumPy dtype stands for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvxfer.errors import LayoutError

__all__ = ["DTYPES", "FP8_MAX", "itemsize_of", "numpy_dtype"]

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

FP8_MAX = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0}


def numpy_dtype(name: str, field: str = "dtype") -> np.dtype[Any]:
    """The NumPy dtype that holds ``name``'s bytes."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise LayoutError(field, f"{name!r} is not one of {', '.join(DTYPES)}") from None


def itemsize_of(name: str, field: str = "dtype") -> int:
    """Bytes of one element of ``name``."""
    return numpy_dtype(name, field).itemsize
