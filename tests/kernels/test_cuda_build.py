# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the CUDA sources, read from the extension module itself: no spills, and each GPU's own fp8."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvxfer import kernels
from kvxfer.kernels import _cuda_base

triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SPILLS = """
__global__ void spills(const float* from, float* to, int at) {
  float all[64];
  for (int i = 0; i < 64; ++i) all[i] = from[i * at];
  for (int i = 0; i < 64; ++i) to[i] = all[i * at % 64];
}
"""

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
needs_tools = pytest.mark.skipif(
    not (TOOLS / "cuobjdump").is_file(), reason="this triton came without NVIDIA's tools"
)


@pytest.fixture
def module() -> Path:
    if _cuda_base.missing is not None:
        pytest.skip(f"not built: {kernels.build_info().get('cuda_reason') or _cuda_base.missing}")
    return Path(_cuda_base.native.__file__)


def resources(binary: Path) -> list[tuple[str, str, int]]:
    """Of each kernel: architecture, name, and bytes of local memory: a stack, or registers that were spilled."""
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(binary)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, arch = [], "?"  # which a file for one does not say
    for line in re.findall(
        r"arch = (\S+)|Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", text
    ):
        arch = line[0] or arch
        if line[1]:
            found.append((arch, line[1], int(line[2]) + int(line[3])))
    return found


@needs_nvcc
def test_where_there_is_nvcc_the_kernels_were_compiled() -> None:
    # KVXFER_CUDA is AUTO: nothing else would notice that nvcc was there and did not work.
    reason = str(kernels.build_info().get("cuda_reason", ""))
    if "KVXFER_CUDA=OFF" in reason:
        pytest.skip(reason)
    assert _cuda_base.missing is None, (
        f"nvcc is {shutil.which('nvcc')}, but the CUDA kernels are not in this build: {reason or _cuda_base.missing}; "
        "build again, and look for CUDA in build.log"
    )
    assert kernels.build_info()["cuda"] is True


@needs_tools
def test_no_kernel_spills_on_any_gpu(module: Path) -> None:
    found = resources(module)
    archs = {arch for arch, _, _ in found}
    if len(archs) == 1:
        pytest.skip(f"built for {archs} alone, as make gpu-check does")
    assert archs == {"sm_80", "sm_90a", "sm_100"}
    for kernel in ("decode", "append_bytes", "copy_converted", "merge_kernel", "checksum_kernel"):
        assert {arch for arch, name, _ in found if kernel in name} == archs, kernel
    assert [entry for entry in found if entry[2]] == []


@needs_nvcc
@needs_tools
def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "spills.cu").write_text(SPILLS)
    command = ["nvcc", "-arch=sm_90a", "-cubin", "-o", "spills.cubin", "spills.cu"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    ((_, _, nbytes),) = resources(tmp_path / "spills.cubin")
    assert nbytes >= 256


@needs_tools
def test_sm_80_converts_fp8_in_software_and_later_gpus_by_their_instruction(
    module: Path, tmp_path: Path
) -> None:
    command = [str(TOOLS / "cuobjdump"), "-xelf", "all", str(module)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    seen = {}
    for path in sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_size):
        arch = path.name.split(".")[-2]
        # One unit tells: the smallest that decodes an fp8 cache.
        if arch in seen or not re.search(rb"decode_kernel\w*E4m3", path.read_bytes()):
            continue
        command = [str(TOOLS / "nvdisasm"), "-c", str(path)]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seen[arch] = ("E4M3" in code, "HMMA.16816" in code, "LDGSTS" in code)
    assert seen, "no kernel that decodes an fp8 cache was found"
    for arch, (converts, multiplies, copies) in seen.items():
        assert converts == (arch != "sm_80"), arch
        assert multiplies, f"{arch}: no tensor cores"
        assert copies, f"{arch}: no asynchronous copies"
