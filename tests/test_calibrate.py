# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What `kvxfer bench transfer --calibrate` prints is Python that plan_transfer takes as its cost."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kvxfer.layout import CostModel, KVLayout, plan_transfer
from kvxfer.transfer import probe_transports

HERE = {name for name, reason in probe_transports() if reason is None} & {"shm", "cma", "tcp"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("calibrate") / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "kvxfer", "bench", "transfer", "--calibrate", "--quick", "--json", path],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(Path(path).read_text())


def costs(text: str) -> dict[str, CostModel]:
    names: dict[str, Any] = {}
    exec(text[text.index("from kvxfer.layout") :], names)
    found: dict[str, CostModel] = names["COSTS"]
    return found


def test_every_path_here_has_plausible_constants(printed: tuple[str, dict[str, Any]]) -> None:
    found = costs(printed[0])
    assert set(found) == HERE
    for name, model in found.items():
        assert model.path == name
        # Slower than a floppy or faster than any memory: then the wrong thing was measured.
        assert 1e6 < model.bytes_per_s < 1e12
        assert 1e-9 < model.span_s < 1e-2
        assert 1e-12 < model.pack_s_per_byte < 1e-6
        assert 1e-7 < model.fixed_s < 1.0


def test_the_constants_decide_what_a_plan_costs(printed: tuple[str, dict[str, Any]]) -> None:
    shape: dict[str, Any] = {"num_blocks": 64, "block_size": 16, "num_kv_heads": 8, "head_dim": 128}
    nhd, hnd = (
        make(num_layers=2, dtype="bfloat16", **shape) for make in (KVLayout.nhd, KVLayout.hnd)
    )
    for name, model in costs(printed[0]).items():
        plan = plan_transfer(nhd, hnd, range(64), range(64), cost=model, kind="direct")
        assert plan.cost_path == name
        expected = plan.num_spans * max(model.span_s, 256 / model.bytes_per_s)
        assert math.isclose(plan.cost_s["direct"], expected, rel_tol=1e-9)
        whole = plan_transfer(nhd, nhd, range(64), range(64), cost=model)
        # Whichever is cheapest by what was measured: a busy machine may find that spans are dear.
        assert whole.kind == min(whole.cost_s, key=whole.cost_s.__getitem__)


def test_the_report_holds_the_same_constants(printed: tuple[str, dict[str, Any]]) -> None:
    text, report = printed
    (row,) = [each for each in report["rows"] if each["case"] == "calibrate"]
    assert row["models"] == {name: asdict(model) for name, model in costs(text).items()}
    assert report["facts"]["cpu"] is not None
