# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Servers that several end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvxfer.testing.cluster import Cluster
from kvxfer.testing.models import make_random_checkpoint


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint without a tokenizer: prompts and answers are ids."""
    model_dir = tmp_path_factory.mktemp("models") / "llama"
    make_random_checkpoint(model_dir, "llama", seed=3, num_heads=4, num_kv_heads=2, head_dim=32)
    return model_dir


@pytest.fixture(scope="module")
def bundled() -> Iterator[Cluster]:
    """What `make serve` starts: the bundled model, one prefill and one decode worker."""
    with Cluster(None) as cluster:
        yield cluster
