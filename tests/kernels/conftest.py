# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures: random numbers by test, and each instruction set of the C++ backend in turn."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from kvxfer import kernels


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def _backends() -> list[str]:
    if importlib.util.find_spec("kvxfer._kernels_cpu") is not None:
        importlib.import_module(
            "kvxfer._kernels_cpu"
        )  # built, so it must load: else nothing here would test it
    info = kernels.build_info()
    return ["reference", *(f"cpu-{isa}" for isa in info.get("isas", []))]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as ``backend=``: the reference, and the C++ one on every instruction set it has here."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    from kvxfer import _kernels_cpu

    _kernels_cpu.set_isa(isa)
    yield name
    _kernels_cpu.set_isa(kernels.build_info()["isas"][0])
