# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the kernels for sm_90, compiled here without a GPU by the ptxas in its wheel."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
triton = pytest.importorskip("triton")

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
pytestmark = pytest.mark.skipif(
    not TOOL.is_file(), reason=f"triton for {platform.machine()} came without NVIDIA's tools"
)


def compile_for_sm90(which: str, cache: Path) -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    program = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, str(program), which],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return made


# Triton 3.9 rebuilds the descriptors of wgmma in registers, for which a latent of 512 channels leaves no room: 80 bytes
# spill (bf16), 224 (fp8). 3.6 spilled nothing. Other tiles spill too, or halve the keys of a product.
LATENT_MAY_SPILL = 256 if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6) else 0


def check_attention(name: str, made: dict[str, Any]) -> None:
    assert made["spilled"] <= (LATENT_MAY_SPILL if name.startswith("mla") else 0), name
    # 255 is what there is: without a spill it is enough, but only the widest may need it.
    widest = name.startswith("mla") or "block_m=128, block_n=128" in name
    assert made["registers"] < 255 or widest, name
    assert made["cp_async"] > 0, f"{name}: keys do not arrive asynchronously"
    assert made["shared"] <= 227 * 1024, name
    if name.startswith(("prefill", "mla")):
        assert made["wgmma"] > 0, name
        assert made["mma_sync"] == 0, name
    else:  # 16 rows are too few for wgmma
        assert made["mma_sync"] > 0, name


@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    made = compile_for_sm90("usual", tmp_path)
    attention = [name for name in made if name.startswith(("prefill", "decode", "mla"))]
    assert len(attention) == 7
    for name in attention:
        check_attention(name, made[name])
    for name in made.keys() - set(attention):
        assert made[name]["spilled"] == 0, name
        assert made[name]["registers"] <= (255 if name == "checksum" else 80), name
    assert made["append"]["wide_stores"] > 0
    assert made["copy"]["wide_stores"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_configuration_of_attention_spills(tmp_path: Path) -> None:
    for name, result in compile_for_sm90("all", tmp_path).items():
        if name.startswith("append"):
            assert result["spilled"] == 0, name
        else:
            check_attention(name, result)
