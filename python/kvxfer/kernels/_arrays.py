# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What an array is (library, device, dtype), and the checks every kernel shares.

A message names the argument, what was expected and what was given: silent corruption from a wrong
shape or stride is the fault this package exists to prevent. A server calls these checks for every layer
of every step, so they look at each array once: on the host through its NumPy view.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._host import tensor_facts
from kvxfer.layout.dtypes import SHORT_NAMES

__all__ = [
    "CACHE_DTYPES",
    "FLOAT8_DTYPES",
    "FLOAT_DTYPES",
    "Array",
    "Operands",
    "as_numpy",
    "device_of",
    "dtype_of",
    "facts_of",
    "is_torch",
    "reach_of",
    "same_memory",
    "share_elements",
]

Array = Any  # numpy.ndarray or torch.Tensor; torch stays out of the type too

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
FLOAT8_DTYPES = ("float8_e4m3", "float8_e5m2")
CACHE_DTYPES = (*FLOAT_DTYPES, *FLOAT8_DTYPES, "int8")

# A NumPy uint16 is bfloat16, for which NumPy has no type of its own.
_NUMPY_NAMES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(np.uint16): "bfloat16",
    np.dtype(np.int32): "int32",
    np.dtype(np.int64): "int64",
    np.dtype(np.int8): "int8",
    np.dtype(np.uint8): "uint8",
}


# A decode step makes some ten calls of five arrays each, so what is asked of an array here is asked
# hundreds of times a step: names of dtypes are remembered, and the common case comes first.
_torch_names: dict[object, str] = {}


def is_torch(array: object) -> bool:
    if type(array) is np.ndarray:
        return False
    torch = sys.modules.get("torch")
    return torch is not None and (type(array) is torch.Tensor or isinstance(array, torch.Tensor))


def device_of(array: Array) -> str:
    """``"cpu"``, ``"cuda:0"``, ...; NumPy arrays are in host memory."""
    return "cpu" if not is_torch(array) or array.is_cpu else str(array.device)


def dtype_of(array: Array) -> str:
    """The dtype's name, ``"bfloat16"`` for a NumPy ``uint16``."""
    if isinstance(array, np.ndarray):
        name = _NUMPY_NAMES.get(array.dtype)
        if name is None:
            name = str(array.dtype.name)
            if not array.dtype.isnative:  # its name is the native one's, its numbers are not
                return f"{name} of the other byte order ({array.dtype.str}; astype converts it)"
        return SHORT_NAMES.get(name, name)
    known = _torch_names.get(array.dtype)
    if known is None:
        name = str(array.dtype).removeprefix("torch.")
        known = _torch_names[array.dtype] = SHORT_NAMES.get(name, name)
    return known


def as_numpy(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy view of host memory, no copy; bfloat16 becomes ``uint16``, float8 ``uint8``."""
    if isinstance(array, np.ndarray):
        if array.dtype.name.startswith(("bfloat16", "float8")):
            return array.view(np.uint16 if array.itemsize == 2 else np.uint8)  # ml_dtypes
        return array
    torch = sys.modules["torch"]
    if array.requires_grad:
        array = array.detach()
    if array.dtype is torch.bfloat16:
        array = array.view(torch.uint16)
    elif array.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        array = array.view(torch.uint8)
    return array.numpy()  # type: ignore[no-any-return]


def same_memory(a: Array, b: Array) -> bool:
    """May the two share bytes? Compares address ranges, so never falsely negative."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.may_share_memory(a, b)
    if device_of(a) != device_of(b):
        return False
    if device_of(a) == "cpu":
        return np.may_share_memory(as_numpy(a), as_numpy(b))
    (low_a, high_a), (low_b, high_b) = _device_range(a), _device_range(b)
    return low_a < high_b and low_b < high_a


def share_elements(a: Array, b: Array) -> bool:
    """Do two arrays of one library and device hold some element both? Interleaved ones, as of a fused cache, do not.

    What NumPy cannot settle soon counts as apart; on a device only the same beginning is seen.
    """
    if not same_memory(a, b):
        return False
    if device_of(a) != "cpu":
        return int(a.data_ptr()) == int(b.data_ptr())
    try:
        return np.shares_memory(as_numpy(a), as_numpy(b), max_work=100_000)  # type: ignore[arg-type]
    except RuntimeError:  # TooHardError, whose place in NumPy depends on its version
        return False


def reach_of(view: np.ndarray[Any, Any]) -> int:
    """Bytes from the beginning of the first element to the end of the last, of strides >= 0."""
    last = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    return last + view.itemsize if view.size else 0


def _device_range(tensor: Array) -> tuple[int, int]:
    if 0 in tensor.shape:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.data_ptr())
    return start, start + (int(last) + 1) * int(tensor.element_size())


def facts_of(tensors: tuple[Array, ...]) -> tuple[Any, Sequence[int]] | None:
    """All that the checks look at in host tensors, to know a call again that has passed them, and their addresses.

    None: of another kind.
    """
    native = tensor_facts(tensors)
    if native is not NotImplemented:
        return native
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    kind = torch.Tensor
    facts: list[Any] = []
    for tensor in tensors:
        if type(tensor) is not kind or not tensor.is_cpu or tensor.requires_grad:
            return None
        facts += tensor.shape, tensor.stride(), tensor.dtype
    return tuple(facts), [tensor.data_ptr() for tensor in tensors]


class Operands:
    """The arrays of one call: all of one library, on one device.

    ``views`` holds what is looked at and what NumPy backends get; ``given`` what the caller passed.
    """

    def __init__(self) -> None:
        self.views: dict[str, Array] = {}
        self.given: dict[str, Array] = {}
        self.dtypes: dict[str, str] = {}
        self.torch = False
        self.device = ""
        self._swapped: tuple[str, ...] = ()  # whose `given` form is still to be swapped

    def add(
        self,
        name: str,
        array: Array,
        shape: Sequence[int | str],
        dtypes: Sequence[str],
        *,
        dense: bool = False,
        any_strides: bool = False,
    ) -> tuple[int, ...]:
        """Check one argument and return its shape.

        Args:
            shape: per axis the expected extent, or a word where any extent will do.
            dense: expect a C-contiguous array; else only the last axis' elements need be adjacent,
                and with ``any_strides`` not even those.
        """
        view = self._place(name, array)
        given: tuple[int, ...] = tuple(view.shape)
        matches = len(given) == len(shape)
        if matches:
            for want, have in zip(shape, given, strict=True):
                if want != have and not isinstance(want, str):
                    matches = False
        if not matches:
            text = ", ".join(str(n) for n in shape)
            raise InvalidArgumentError(f"{name}: expected shape [{text}], given {list(given)}")
        dtype = dtype_of(array)
        if dtype not in dtypes:
            raise InvalidArgumentError(
                f"{name}: expected dtype {' or '.join(dtypes)}, given {dtype}"
            )
        if not any_strides:
            _check_strides(name, view, given, dense)
        self.views[name], self.given[name], self.dtypes[name] = view, array, dtype
        return given

    def _place(self, name: str, array: Array) -> Array:
        torch = not isinstance(array, np.ndarray)
        if torch and not is_torch(array):
            raise InvalidArgumentError(
                f"{name}: expected a NumPy array or a torch tensor, given {type(array).__name__}"
            )
        device = str(array.device) if torch and not array.is_cpu else "cpu"
        if not self.device:
            self.torch, self.device = torch, device
        elif torch != self.torch or device != self.device:
            kinds = ("a NumPy array", "a torch tensor")
            raise InvalidArgumentError(
                f"{name}: expected {kinds[self.torch]} on {self.device} like {next(iter(self.views))}, "
                f"given {kinds[torch]} on {device}"
            )
        return as_numpy(array) if device == "cpu" else array

    def check_written(self, name: str) -> None:
        """Refuse what cannot be written, or holds one element at several places."""
        view = self.views[name]
        if isinstance(view, np.ndarray):
            if not view.flags.writeable:
                raise InvalidArgumentError(
                    f"{name}: expected a writable array, given a read-only one"
                )
            strides = view.strides
        else:
            strides = tuple(view.stride())
        if 0 in strides and any(n > 1 and s == 0 for n, s in zip(view.shape, strides, strict=True)):
            raise InvalidArgumentError(
                f"{name}: expected each element at a place of its own, given strides {list(strides)} "
                f"for shape {list(view.shape)} (an expanded array)"
            )

    def swap_middle(self, *names: str) -> None:
        """Exchange axes 1 and 2 of these arrays: a head-major cache seen as a token-major one."""
        for name in names:
            self.views[name] = self.views[name].swapaxes(1, 2)
        self._swapped += names

    def source(self, numpy: bool) -> dict[str, Array]:
        """The arrays by name, as a backend wants them."""
        if numpy:
            return self.views
        for name in self._swapped:
            self.given[name] = self.given[name].swapaxes(1, 2)
        self._swapped = ()
        return self.given

    def allocate(self, shape: Sequence[int], dtype: str) -> tuple[Array, Array]:
        """An uninitialised array of the call's library and device, and its view."""
        if not self.torch:
            array: Array = np.empty(shape, np.uint16 if dtype == "bfloat16" else dtype)
            like = next(iter(self.given.values()))
            if dtype == "bfloat16" and like.dtype.name == "bfloat16":
                return array.view(like.dtype), array
            return array, array
        torch = sys.modules["torch"]
        array = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=self.device)
        return array, as_numpy(array) if self.device == "cpu" else array


def _check_strides(name: str, view: Array, shape: tuple[int, ...], dense: bool) -> None:
    # Strides of axes of extent 1 mean nothing, and libraries report arbitrary ones.
    if isinstance(view, np.ndarray):
        strides, unit = view.strides, view.itemsize
        contiguous = view.flags.c_contiguous
    else:
        strides, unit = tuple(view.stride()), 1
        contiguous = view.is_contiguous()
    if contiguous:
        return
    if dense:
        raise InvalidArgumentError(
            f"{name}: expected a C-contiguous array, given strides {list(strides)} "
            f"for shape {list(shape)}"
        )
    if shape[-1] > 1 and strides[-1] != unit:
        raise InvalidArgumentError(
            f"{name}: expected adjacent elements along the last axis (stride 1), "
            f"given stride {strides[-1] / unit:g}"
        )
    if min(strides) < 0:
        raise InvalidArgumentError(f"{name}: expected strides >= 0, given {list(strides)}")
