# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels to sm_90 without a GPU and print what came out, one JSON line a kernel.

A program of its own: one process either interprets Triton kernels or compiles them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvxfer.kernels.triton import append, attention_decode, attention_prefill, copy, merge

ATTENTION = {
    "q": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "block_table": "*i32", "seq_lens": "*i32",
    "sinks": "*fp32", "out": "*bf16", "lse": "*fp32", "cu_seqlens_q": "*i32",
    "partial": "*fp32", "partial_lse": "*fp32",
}  # fmt: skip
FLOATS = ("sm_scale", "v_scale", "k_scale", "cap")


def compiled(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> dict[str, Any]:
    """Pointers and strides are multiples of 16, as those of real caches are."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "fp32" if name in FLOATS else "i32")
        if name in pointers or name.startswith("stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, stack, local = resources(result.asm["cubin"])
    ptx = result.asm["ptx"]
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": result.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma_sync": ptx.count("mma.sync"),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.v(?:4\.b32|2\.b64)", ptx)),
    }


def resources(cubin: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]), int(found[3])


def prefill(head_dim: int, rows: int, block_size: int, extras: bool) -> dict[str, Any]:
    config = attention_prefill.prefill_config(head_dim, rows, wide=False)
    constants = {
        "GROUP": 4, "BLOCK_B": 8, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_SIZE": block_size, "WIDTH_K": head_dim, "WIDTH_V": head_dim,
        "BLOCK_DK": head_dim, "BLOCK_DV": head_dim, "CAUSAL": True, "WINDOW": extras,
        "SOFT_CAP": extras, "HAS_SINKS": extras, "HAS_LSE": True, "WIDEN": False,
        "SCALAR_BLOCK": block_size % config.block_n == 0,
    }  # fmt: skip
    kernel = attention_prefill.prefill_kernel
    pointers = {name: kind for name, kind in ATTENTION.items() if name in kernel.arg_names}
    return compiled(kernel, pointers, constants, config.num_warps, config.num_stages)


def decode(head_dim: int, block_size: int, extras: bool) -> dict[str, Any]:
    constants = {
        "GROUP": 4, "BLOCK_G": 16, "BLOCK_N": 64 if head_dim <= 128 else 32, "BLOCK_SIZE": block_size,
        "WIDTH_K": head_dim, "WIDTH_V": head_dim, "BLOCK_DK": head_dim, "BLOCK_DV": head_dim,
        "SOFT_CAP": extras, "WINDOW": extras, "WIDEN": False,
    }  # fmt: skip
    kernel = attention_decode.decode_kernel
    pointers = {name: kind for name, kind in ATTENTION.items() if name in kernel.arg_names}
    return compiled(kernel, pointers, constants, 4, 3)


def merge_splits() -> dict[str, Any]:
    kernel = attention_decode.merge_splits_kernel
    pointers = {name: kind for name, kind in ATTENTION.items() if name in kernel.arg_names}
    constants = {
        "WIDTH_V": 128,
        "BLOCK_DV": 128,
        "WINDOW": True,
        "HAS_SINKS": True,
        "HAS_LSE": True,
    }
    return compiled(kernel, pointers, constants, 4, 3)


def append_kv() -> dict[str, Any]:
    pointers = dict.fromkeys(("key", "value", "k_cache", "v_cache"), "*bf16") | {
        "slot_mapping": "*i64"
    }
    constants = {
        "BLOCK_SIZE": 16, "WIDTH_K": 128, "WIDTH_V": 128, "BLOCK_H": 8, "BLOCK_DK": 128, "BLOCK_DV": 128,
        "SCALE_K": False, "SCALE_V": True,
    }  # fmt: skip
    return compiled(append.append_kernel, pointers, constants, 4, 3)


def copy_blocks(*, converting: bool) -> dict[str, Any]:
    types = (tl.float32, tl.bfloat16, 128, 16) if converting else (tl.int64, tl.int64, 32, 64)
    constants = {
        "SRC": types[0], "DST": types[1], "WIDTH": types[2], "BLOCK_C": types[2], "BLOCK_R": types[3],
        "ALIGNED": True, "HEADS_INSIDE": converting,
    }  # fmt: skip
    return compiled(copy.copy_kernel, {"bases": "*i64", "segments": "*i64"}, constants, 8, 3)


def merge_states() -> dict[str, Any]:
    pointers = dict.fromkeys(("v_a", "v_b", "out"), "*bf16") | dict.fromkeys(
        ("lse_a", "lse_b", "lse"), "*fp32"
    )
    constants = {"WIDTH": 128, "BLOCK_R": 16, "BLOCK_D": 128}
    return compiled(merge.merge_kernel, pointers, constants, 4, 3)


def main(which: str) -> None:
    made: dict[str, dict[str, Any]] = {}
    if which == "usual":
        made["prefill 128"] = prefill(128, 1000, 16, False)
        made["decode 128"] = decode(128, 16, False)
        made["merge_splits"] = merge_splits()
        made["append"] = append_kv()
        made["copy"] = copy_blocks(converting=False)
        made["convert"] = copy_blocks(converting=True)
        made["merge"] = merge_states()
    else:
        for head_dim in (64, 128, 256):
            for extras in (False, True):
                for rows, block_size in ((1000, 16), (1000, 128), (10, 16)):
                    name = f"prefill {head_dim}, {rows} rows, block {block_size}, extras {extras}"
                    made[name] = prefill(head_dim, rows, block_size, extras)
                for block_size in (1, 16):
                    name = f"decode {head_dim}, block {block_size}, extras {extras}"
                    made[name] = decode(head_dim, block_size, extras)
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
