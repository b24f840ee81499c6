# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the extension sees of an array without asking Python: address, bytes and dtype, or nothing at all."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

native = pytest.importorskip("kvxfer._kernels_cpu")
host_arrays, tensor_facts = native.host_arrays, native.tensor_facts

BYTES = np.zeros(64, np.uint8)


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.setflags(write=False)
    return array


class Mine(np.ndarray[Any, Any]):
    pass


class Foreign:
    """Not a tensor, whose bytes it lends; whether they may be written nobody can tell from that."""

    __dlpack_c_exchange_api__ = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


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
        torch.zeros(8, requires_grad=True),
        Foreign(),
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


def test_tensors_are_alike_in_all_but_their_addresses() -> None:
    def facts(*tensors: Any) -> bytes:
        known, addresses = tensor_facts(tensors)
        assert addresses == tuple(tensor.data_ptr() for tensor in tensors)
        found: bytes = known
        return found

    first = torch.zeros(4, 6), torch.zeros(5, dtype=torch.int64)
    assert facts(*first) == facts(torch.ones(4, 6), torch.ones(5, dtype=torch.int64))
    others = [
        (torch.zeros(4, 6),),
        first[::-1],
        (torch.zeros(6, 4), first[1]),
        (torch.zeros(4, 12)[:, :6], first[1]),
        (torch.zeros(6, 4).t(), first[1]),
        (torch.zeros(4, 6, dtype=torch.int32), first[1]),
        (torch.zeros(4, 6, 1), first[1]),
    ]
    assert len({facts(*first), *(facts(*other) for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "tensor",
    [
        [0.0],
        np.zeros(4),
        torch.zeros(4, device="meta"),
        torch.zeros(4, requires_grad=True),
        torch.nn.Parameter(torch.zeros(4)),
        Foreign(),
    ],
    ids=lambda tensor: type(tensor).__name__,
)
def test_nothing_is_known_where_one_of_them_is_another_thing(tensor: Any) -> None:
    assert tensor_facts((torch.zeros(4), tensor)) is None


def test_a_torch_without_dlpacks_c_functions_is_asked_in_python() -> None:
    program = """
import numpy as np, torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
from kvxfer._kernels_cpu import host_arrays, tensor_facts
half, other, words = torch.zeros(2, 8, dtype=torch.float16), torch.zeros(4), np.zeros(4, np.int32)
found = host_arrays(half, other)
assert found[:4] == (half.data_ptr(), 32, other.data_ptr(), 16), found
assert len({host_arrays(x, other)[4] for x in (half, other, words)}) == 3
assert host_arrays(half.t(), other) is None
assert host_arrays(torch.zeros(8, device="meta"), other) is None
assert tensor_facts((half, other)) is NotImplemented
from kvxfer import kernels
slots = torch.tensor([5, 0])
for _ in range(2):
    cache = [torch.zeros(3, 4, 1, 8) for _ in "kv"]
    rows = [torch.randn(2, 1, 8) for _ in "kv"]
    kernels.append_kv(*rows, *cache, slots)
    assert torch.equal(cache[1].view(12, 1, 8)[slots], rows[1])
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
