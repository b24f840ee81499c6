# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the extension sees of an array without asking Python: address, bytes and dtype, or nothing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

host_arrays = pytest.importorskip("kvxfer._kernels_cpu").host_arrays

BYTES = np.zeros(64, np.uint8)


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.setflags(write=False)
    return array


class Mine(np.ndarray[Any, Any]):
    pass


SEEN: dict[str, Any] = {
    "numpy": np.zeros((3, 5), np.float32),
    "numpy, empty": np.zeros((0, 5), np.float32),
    "numpy, one row of many": np.zeros((4, 5), np.int8)[2:3],
    "torch": torch.zeros(3, 5, dtype=torch.float16),
    "torch, a part": torch.zeros(30, dtype=torch.bfloat16)[10:20],
    "torch, length one": torch.zeros(2, 1, 5).transpose(0, 1),
    "torch, float8": torch.zeros(16, dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", SEEN)
def test_address_and_size_are_the_arrays(name: str) -> None:
    array = SEEN[name]
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
    found = host_arrays(array, BYTES)
    if array.nbytes:
        assert found[:2] == (address, array.nbytes)
    assert found[1] == array.nbytes
    assert host_arrays(BYTES, array)[2:4] == (found[0], array.nbytes)


@pytest.mark.parametrize(
    "array",
    [
        [0, 1],
        None,
        memoryview(b"12345678"),
        np.zeros((4, 4)).T,
        np.zeros(8)[::2],
        np.zeros(8, ">f4"),
        np.zeros(8, object),
        np.zeros(8, [("a", "i4")]),
        np.zeros(8).view(Mine),
        torch.zeros(4, 4).t(),
        torch.zeros(8)[::2],
        torch.zeros(8, device="meta"),
        torch.nn.Parameter(torch.zeros(8)),
    ],
    ids=lambda array: type(array).__name__,
)
def test_anything_else_is_left_to_those_who_ask_in_detail(array: Any) -> None:
    assert host_arrays(array, BYTES) is None
    assert host_arrays(BYTES, array) is None


def test_what_may_not_be_written_may_be_read() -> None:
    array = frozen(np.zeros(8, np.uint8))
    assert host_arrays(array, BYTES)[1] == 8
    assert host_arrays(BYTES, array) is None


def test_each_dtype_of_each_library_has_its_number() -> None:
    arrays: list[Any] = [np.zeros(8, kind) for kind in "bBhHiIlLefd"]
    arrays += [torch.zeros(8, dtype=kind) for kind in (torch.int8, torch.uint8, torch.int16)]
    arrays += [
        torch.zeros(8, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.float32)
    ]
    arrays += [torch.zeros(8, dtype=kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2)]
    numbers = [host_arrays(array, BYTES)[4] for array in arrays]
    assert len(set(numbers)) == len(numbers)
    assert len({host_arrays(BYTES, array)[4] for array in arrays}) == len(numbers)
