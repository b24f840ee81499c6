# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The two 8-bit float formats as tables: 256 codes, and the search for the nearest of them.

Source: OCP 8-bit Floating Point Specification (OFP8) 1.0; e4m3 is its E4M3, which PyTorch calls e4m3fn.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST", "float8_values", "to_float8"]

F32 = npt.NDArray[np.float32]

# The largest finite magnitude of each dtype that needs a scale.
LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
_FORMATS = {"float8_e4m3": (3, 7), "float8_e5m2": (2, 15)}  # mantissa bits, exponent bias


@cache
def float8_values(dtype: str) -> F32:
    """The value of each code, ``[256]`` float32."""
    mantissa_bits, bias = _FORMATS[dtype]
    codes = np.arange(256)
    exponent = (codes & 0x7F) >> mantissa_bits
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = np.ldexp(1 + fraction, exponent - bias)
    values = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), normal)
    if dtype == "float8_e4m3":
        values[codes & 0x7F == 0x7F] = np.nan
    else:
        values[codes & 0x7F == 0x7C] = np.inf
        values[codes & 0x7F > 0x7C] = np.nan
    table: F32 = np.where(codes & 0x80, -values, values).astype(np.float32)
    return table


def to_float8(values: F32, dtype: str) -> npt.NDArray[np.uint8]:
    """The code of the nearest value, of two the even one; what is larger than all becomes the largest."""
    finite = float8_values(dtype)[: 0x7F if dtype == "float8_e4m3" else 0x7C].astype(np.float64)
    magnitude = np.minimum(np.abs(values).astype(np.float64), finite[-1])
    above = np.clip(np.searchsorted(finite, magnitude), 1, len(finite) - 1)
    below = above - 1
    to_above, to_below = finite[above] - magnitude, magnitude - finite[below]
    even = np.where(above % 2 == 0, above, below)
    code = np.where(to_above < to_below, above, np.where(to_below < to_above, below, even))
    code = np.where(np.isnan(values), 0x7F, code)  # a NaN in both formats
    return (code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)
