# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""System calls that Python has no name for: their numbers, and the marks of tests that disturb cma by them."""

from __future__ import annotations

import platform

import pytest

from kvxfer.transfer import probe_transports

__all__ = ["NEEDS_CMA", "number_of"]

_NUMBERS = {
    "x86_64": {"process_vm_readv": 310, "seccomp": 317, "userfaultfd": 323},
    "aarch64": {"process_vm_readv": 270, "seccomp": 277, "userfaultfd": 282},
}

NEEDS_CMA = [
    pytest.mark.skipif(
        dict(probe_transports()).get("cma", "not there") is not None,
        reason="process_vm_readv does not work here to begin with",
    ),
    pytest.mark.skipif(
        platform.machine() not in _NUMBERS, reason="numbers of system calls are not known here"
    ),
]


def number_of(name: str) -> int:
    return _NUMBERS[platform.machine()][name]
