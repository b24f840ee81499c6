# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Conversions between the dtypes of caches, and what of them Triton's interpreter gets wrong.

It cuts float32 off to bfloat16, rounds float8 wrongly, does not saturate, and takes the NaN codes of float8 for
numbers. So under the interpreter conversions go by integer arithmetic; compiled, by the hardware's instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "TRITON_DTYPES",
    "as_operand",
    "largest_of",
    "narrow",
    "operand_dtype",
    "widen",
]

TRITON_DTYPES: dict[str, tl.dtype] = {
    "float32": tl.float32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
    "float8_e4m3": tl.float8e4nv,
    "float8_e5m2": tl.float8e5,
    "int8": tl.int8,
}


@triton.jit  # type: ignore[untyped-decorator]
def largest_of(dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude of an 8-bit dtype that a scale maps a row's largest to."""
    if dtype == tl.float8e4nv:
        return 448.0
    if dtype == tl.float8e5:
        return 57344.0
    return 127.0


# TRITON_INTERPRET decides at decoration, so this says how the kernels of this process were made.
INTERPRETED: bool = type(largest_of).__name__ == "InterpretedFunction"
BY_BITS = tl.constexpr(INTERPRETED)


@triton.jit
def _to_int8(wide):  # type: ignore[no-untyped-def]
    # Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the lowest bits.
    inside = tl.where(wide > 127.0, 127.0, tl.where(wide > -128.0, wide, -128.0))  # a NaN: -128
    return ((inside + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def _to_float8_by_bits(wide, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to the nearest code, ties to even; the caller has clamped."""
    SHIFT: tl.constexpr = 20 if dtype == tl.float8e4nv else 21  # float32's mantissa bits less ours
    SMALLEST: tl.constexpr = (
        121 if dtype == tl.float8e4nv else 113
    )  # float32's exponent of 2^-6, 2^-14
    # A float32 that large has its last bit where our subnormals have theirs: adding it rounds.
    UNIT: tl.constexpr = 16384.0 if dtype == tl.float8e4nv else 128.0
    UNIT_BITS: tl.constexpr = 0x46800000 if dtype == tl.float8e4nv else 0x43000000
    bits = wide.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)) >> SHIFT
    normal = normal - ((SMALLEST - 1) << (23 - SHIFT))
    tiny = (tl.abs(wide) + UNIT).to(tl.uint32, bitcast=True) - UNIT_BITS
    code = tl.where(magnitude < (SMALLEST << 23), tiny, normal)
    code = tl.where(wide == wide, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8).to(dtype, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def narrow(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """``values`` as ``dtype``, to nearest even; 8-bit dtypes saturate, a NaN stays one (int8: -128), and what is of ``dtype`` its bits."""
    if values.dtype == dtype:
        result = values
    elif dtype == tl.int8:
        result = _to_int8(widen(values, tl.float32))
    elif dtype == tl.float8e4nv or dtype == tl.float8e5:
        limit = largest_of(dtype)
        wide = widen(values, tl.float32)
        wide = tl.where(wide > limit, limit, tl.where(wide < -limit, -limit, wide))
        result = _to_float8_by_bits(wide, dtype) if BY_BITS else wide.to(dtype)
    elif BY_BITS and dtype == tl.bfloat16:
        wide = widen(values, tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(wide == wide, rounded, (bits >> 16) | 0x40)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = widen(values, dtype)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def widen(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """``values`` as ``dtype``, which holds them all exactly, as float16 and bfloat16 hold 8-bit numbers."""
    if BY_BITS and values.dtype == tl.float8e5:  # the upper half of a float16
        bits = values.to(tl.uint8, bitcast=True).to(tl.uint16) << 8
        result = bits.to(tl.float16, bitcast=True).to(dtype)
    elif BY_BITS and values.dtype == tl.float8e4nv:
        codes = values.to(tl.uint8, bitcast=True).to(tl.uint16)
        bits = ((codes & 0x80) << 8) | (
            (codes & 0x7F) << 7
        )  # a float16, but for its exponent's bias
        wide = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        result = tl.where((codes & 0x7F) == 0x7F, float("nan"), wide).to(dtype)
    else:
        result = values.to(dtype)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def as_operand(query, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A query in the dtype of the dot; what float16 has no number for becomes its largest."""
    if dtype == tl.float16 and query.dtype != tl.float16:
        wide = query.to(tl.float32)
        wide = tl.where(wide > 65504.0, 65504.0, tl.where(wide < -65504.0, -65504.0, wide))
        result = wide.to(tl.float16)
    else:
        result = query.to(dtype)
    return result


def operand_dtype(q: torch.Tensor, cache: torch.Tensor) -> tl.dtype:
    """In what dtype a query and a cache are multiplied: on tensor cores wherever both are of 16 bits or fewer.

    8-bit caches meet float16, which costs half of bfloat16's conversion and rounds weights 8 times finer; queries
    past its range are clamped. Two different 16-bit dtypes have no common one but float32.
    """
    eight = cache.element_size() == 1
    if q.dtype == torch.float32 or not (eight or q.dtype == cache.dtype):
        return tl.float32
    if eight or q.dtype == torch.float16:
        return tl.float16
    # The interpreter multiplies the bit patterns of bfloat16 as if they were integers.
    return tl.float32 if INTERPRETED else tl.bfloat16
