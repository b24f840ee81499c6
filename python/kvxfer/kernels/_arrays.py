# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What an array is (library, device, dtype), and the checks every kernel shares.

A message names the argument, what was expected and what was given: silent corruption from a wrong
shape or stride is the fault this package exists to prevent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvxfer.errors import InvalidArgumentError

__all__ = [
    "FLOAT_DTYPES",
    "Array",
    "as_numpy",
    "check_array",
    "check_same_place",
    "device_of",
    "dtype_of",
    "empty_like_library",
    "is_torch",
    "same_memory",
]

Array = Any  # numpy.ndarray or torch.Tensor; torch stays out of the type too

FLOAT_DTYPES = ("float32", "float16", "bfloat16")


# A decode step makes some ten calls of five arrays each, so what is asked of an array here is asked
# hundreds of times a step: names of dtypes are remembered, and the common case comes first.
_torch_dtype_names: dict[object, str] = {}


def is_torch(array: object) -> bool:
    if type(array) is np.ndarray:
        return False
    torch = sys.modules.get("torch")
    return torch is not None and (type(array) is torch.Tensor or isinstance(array, torch.Tensor))


def device_of(array: Array) -> str:
    """``"cpu"``, ``"cuda:0"``, ...; NumPy arrays are in host memory."""
    return "cpu" if not is_torch(array) or array.is_cpu else str(array.device)


def dtype_of(array: Array) -> str:
    """The dtype's name; a NumPy ``uint16`` is bfloat16, for which NumPy has no type of its own."""
    if is_torch(array):
        known = _torch_dtype_names.get(array.dtype)
        if known is None:
            known = _torch_dtype_names[array.dtype] = str(array.dtype).removeprefix("torch.")
        return known
    name = str(array.dtype.name)
    return "bfloat16" if name == "uint16" else name


def as_numpy(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy view of host memory, no copy; bfloat16 becomes ``uint16``."""
    if is_torch(array):
        if array.requires_grad:
            array = array.detach()
        if dtype_of(array) == "bfloat16":
            array = array.view(sys.modules["torch"].uint16)
        return array.numpy()  # type: ignore[no-any-return]
    if array.dtype.name == "bfloat16":  # the ml_dtypes extension type
        return array.view(np.uint16)  # type: ignore[no-any-return]
    return array  # type: ignore[no-any-return]


def empty_like_library(like: Array, shape: Sequence[int], dtype: str) -> Array:
    """An uninitialised array of the library and device of ``like``."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=like.device)
    if like.dtype.name == "bfloat16" and dtype == "bfloat16":
        return np.empty(shape, like.dtype)
    return np.empty(shape, np.uint16 if dtype == "bfloat16" else dtype)


def check_array(
    name: str,
    array: Array,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[str],
    contiguous: str = "last",
) -> tuple[int, ...]:
    """Check one argument and return its shape.

    Args:
        shape: per axis the expected extent, or a letter where any extent will do.
        contiguous: ``"last"``: elements of the last axis are adjacent; ``"all"``: C-contiguous.
    """
    torch_array = is_torch(array)
    if not torch_array and not isinstance(array, np.ndarray):
        raise InvalidArgumentError(
            f"{name}: expected a NumPy array or a torch tensor, given {type(array).__name__}"
        )
    given: tuple[int, ...] = tuple(array.shape)
    matches = len(given) == len(shape)
    if matches:
        for want, have in zip(shape, given, strict=True):
            if want != have and not isinstance(want, str):
                matches = False
    if not matches:
        want_text = "[" + ", ".join(str(n) for n in shape) + "]"
        raise InvalidArgumentError(f"{name}: expected shape {want_text}, given {list(given)}")
    dtype = dtype_of(array)
    if dtype not in dtypes:
        raise InvalidArgumentError(f"{name}: expected dtype {' or '.join(dtypes)}, given {dtype}")
    # torch has no negative strides, so its last one says all that "last" asks for.
    if not (torch_array and contiguous == "last" and given and array.stride(-1) == 1):
        _check_strides(name, array, given, contiguous)
    return given


def _check_strides(name: str, array: Array, shape: tuple[int, ...], contiguous: str) -> None:
    if is_torch(array):
        strides, unit = tuple(array.stride()), 1
    else:
        strides, unit = array.strides, array.itemsize
    if contiguous == "last":
        # Strides of axes of extent 1 mean nothing, and libraries report arbitrary ones.
        if shape and shape[-1] > 1 and strides[-1] != unit:
            raise InvalidArgumentError(
                f"{name}: expected adjacent elements along the last axis (stride 1), "
                f"given stride {strides[-1] / unit:g}"
            )
        if any(n > 1 and s < 0 for n, s in zip(shape, strides, strict=True)):
            raise InvalidArgumentError(f"{name}: expected strides >= 0, given {list(strides)}")
        return
    dense = unit
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and s != dense:
            raise InvalidArgumentError(
                f"{name}: expected a C-contiguous array, given strides {list(strides)} "
                f"for shape {list(shape)}"
            )
        dense *= n


def check_same_place(arrays: dict[str, Array]) -> str:
    """All arrays are of one library and on one device; returns that device."""
    items = iter(arrays.items())
    first_name, first = next(items)
    library, device = is_torch(first), device_of(first)
    for name, array in items:
        if is_torch(array) != library:
            kinds = ("a NumPy array", "a torch tensor")
            raise InvalidArgumentError(
                f"{name}: expected {kinds[library]} like {first_name}, given {kinds[not library]}"
            )
        given = device_of(array)
        if given != device:
            raise InvalidArgumentError(
                f"{name}: expected device {device} like {first_name}, given {given}"
            )
    return device


def same_memory(a: Array, b: Array) -> bool:
    """May the two share bytes? Compares address ranges, so never falsely negative."""
    if device_of(a) != device_of(b):
        return False
    if device_of(a) == "cpu":
        return bool(np.may_share_memory(as_numpy(a), as_numpy(b)))
    (low_a, high_a), (low_b, high_b) = _device_range(a), _device_range(b)
    return low_a < high_b and low_b < high_a


def _device_range(tensor: Array) -> tuple[int, int]:
    if 0 in tensor.shape:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.data_ptr())
    return start, start + (int(last) + 1) * int(tensor.element_size())
