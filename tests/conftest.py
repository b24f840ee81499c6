# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Settings for every test: quiet libraries, a home of its own, bounded hypothesis runs."""

from __future__ import annotations

import os

import hypothesis
import pytest

# Two test processes with as many OpenMP threads as cores each would spin against each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Decided when triton is first imported, whoever does it; 0 on a machine with a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Machines that run tests are shared and slow at times: bounded by the number of examples, never by the clock.
hypothesis.settings.register_profile(
    "kvxfer",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("kvxfer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process opens libcuda once, whichever test is the first to: the software one, where any test needs that."""
    if any(item.path.name == "test_gpu_memory.py" for item in items):
        from kvxfer.testing import fake_cuda

        path, _ = fake_cuda.library()
        if path is not None:
            os.environ["KVXFER_LIBCUDA"] = str(path)


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The per-user cookie and caches go to a throw-away home, in this process and in its children."""
    home = tmp_path_factory.mktemp("home")
    os.environ["HOME"] = str(home)
    os.environ["XDG_CACHE_HOME"] = str(home / ".cache")
    os.environ.pop("XDG_RUNTIME_DIR", None)
