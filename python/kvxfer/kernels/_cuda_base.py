# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the parts of the CUDA backend share: the extension module, dtypes as it numbers them, strides, device-side ids."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from kvxfer.errors import InvalidArgumentError
from kvxfer.kernels._arrays import Array

native: Any
missing: str | None
try:
    from kvxfer import _kernels_cuda
except ImportError as error:
    native, missing = ModuleType("absent"), f"the extension module is not there: {error}"
else:
    native, missing = _kernels_cuda, None

__all__ = ["DTYPE_TAG", "byte_strides", "check_ids", "ids_are_checked", "missing", "native"]

DTYPE_TAG = {"float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3": 3}


def byte_strides(tensor: Array) -> list[int]:
    """Strides in bytes; of an axis of extent 1 a 0, because what torch reports there means nothing."""
    size = int(tensor.element_size())
    return [
        int(s) * size if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    ]


def check_ids(name: str, ids: Array, wrong: Array, expected: str) -> None:
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise InvalidArgumentError(f"{name}{at}: expected {expected}, given {int(ids[tuple(at)])}")


def ids_are_checked() -> bool:
    return os.environ.get("KVXFER_CHECK_DEVICE_IDS") == "1"
