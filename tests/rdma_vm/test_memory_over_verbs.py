# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Registered memory where a kernel pins it: in the background, and up to the limit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from vm_guest import Guest

from kvxfer.transfer import probe_transports

SCRIPT = Path(__file__).with_name("memory_over_verbs.py")
NBYTES, LIMIT = 32 << 20, 8 << 20  # as in the script


@pytest.mark.slow
def test_memory_is_pinned_in_the_background_and_the_limit_is_explained(guest: Guest) -> None:
    reason = dict(probe_transports()).get("verbs", "there is no verbs transport in this build")
    if reason is not None and "built" in reason:
        pytest.skip(f"verbs: {reason}")
    done = guest("--", sys.executable, SCRIPT)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    print(seen)
    assert seen["at_once"] in ("running", "done")
    assert seen["done"] == NBYTES
    assert seen["same"]
    # The kernel's own ENOMEM, and its own count of what is pinned.
    assert "ibv_reg_mr(region 'too much', 33554432 bytes" in seen["refusal"]
    limit = re.search(r"is (\d+) bytes, of which (\d+) are pinned", seen["refusal"])
    assert limit, seen["refusal"]
    assert int(limit[1]) == LIMIT
    assert 2 * NBYTES <= int(limit[2]) < 3 * NBYTES  # both regions, and `again` shares one
    assert "LimitMEMLOCK=infinity" in seen["refusal"]
