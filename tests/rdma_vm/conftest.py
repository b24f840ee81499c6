# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The virtual machine for tests, or the reason why there is none."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import vm_packages
from vm_guest import Guest, in_guest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All but the tests of the packages' cache need the machine."""
    for item in items:
        if item.path.parent == HERE and "guest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.timeout(3200))


@pytest.fixture(scope="session")
def guest() -> Guest:
    """Runs ``run OPTIONS COMMAND``, where its packages are in the cache: a test suite fetches nothing.

    All runs together take no longer than ``KVXFER_VM_BUDGET_S``: the last one then ends at its time limit and
    prints the guest's console.
    """
    if not vm_packages.is_prepared(vm_packages.cache_folder()):
        pytest.skip(
            f"no packages for the virtual machine in {vm_packages.cache_folder()}: "
            "`tests/rdma_vm/run --prepare` fetches them (90 MB), or says why it cannot"
        )
    end = time.monotonic() + float(os.environ.get("KVXFER_VM_BUDGET_S", "inf"))

    def within_the_budget(
        *arguments: str | Path, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        left = end - time.monotonic()
        if left < 1:
            pytest.fail(f"KVXFER_VM_BUDGET_S={os.environ['KVXFER_VM_BUDGET_S']} is spent")
        return in_guest(*arguments, timeout_s=min(timeout_s, left))

    return within_the_budget
