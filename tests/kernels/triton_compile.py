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

from kvxfer.kernels.triton import (
    append,
    attention_decode,
    attention_prefill,
    checksum,
    copy,
    merge,
    mla,
)
from kvxfer.kernels.triton._tiles import EDGE_N, PrefillShape, PrefillTile, prefill_candidates

ATTENTION = {
    "q": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "block_table": "*i32", "seq_lens": "*i32",
    "sinks": "*fp32", "out": "*bf16", "lse": "*fp32", "cu_seqlens_q": "*i32",
    "partial": "*fp32", "partial_lse": "*fp32", "k_scales": "*fp32", "v_scales": "*fp32",
    "q_latent": "*bf16", "q_rope": "*bf16", "latent_cache": "*bf16",
}  # fmt: skip
CACHES = {"bf16": "*bf16", "e4m3": "*fp8e4nv", "e5m2": "*fp8e5", "int8": "*i8"}
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


def pointers_of(kernel: Any, cache: str) -> dict[str, str]:
    found = {name: kind for name, kind in ATTENTION.items() if name in kernel.arg_names}
    return found | {name: CACHES[cache] for name in found if name.endswith("_cache")}


def operand(cache: str) -> tl.dtype:
    return tl.bfloat16 if cache == "bf16" else tl.float16


def prefill(
    tile: PrefillTile,
    head_dim: int,
    block_size: int,
    *,
    extras: bool = False,
    cache: str = "bf16",
    scaled: bool = False,
    offset: tl.dtype = tl.int32,
) -> dict[str, Any]:
    constants = {
        "GROUP": 4, "PACK": 4 if tile.packs_heads else 1, "BLOCK_B": 8,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "EDGE_N": min(tile.block_n, EDGE_N),
        "BLOCK_SIZE": block_size, "WIDTH_K": head_dim, "WIDTH_V": head_dim,
        "BLOCK_DK": head_dim, "BLOCK_DV": head_dim, "CAUSAL": True, "WINDOW": extras,
        "SOFT_CAP": extras, "FOLD": not extras, "SCALED": scaled, "HAS_SINKS": extras, "HAS_LSE": True,
        "OPERAND": operand(cache), "OFFSET": offset, "SAME_STRIDES": True,
    }  # fmt: skip
    kernel = attention_prefill.prefill_kernel
    return compiled(kernel, pointers_of(kernel, cache), constants, tile.num_warps, tile.num_stages)


def candidates(
    head_dim: int, rows: int, block_size: int, bits: int, *, plain: bool = True
) -> tuple[PrefillTile, ...]:
    shape = PrefillShape(head_dim, rows, 4, block_size, bits, wide=False, plain=plain)
    return prefill_candidates(shape)


def decode(
    head_dim: int,
    block_size: int,
    *,
    extras: bool = False,
    cache: str = "bf16",
    scaled: bool = False,
) -> dict[str, Any]:
    constants = {
        "GROUP": 4, "BLOCK_G": 16, "BLOCK_N": 64 if head_dim <= 128 else 32, "BLOCK_SIZE": block_size,
        "WIDTH_K": head_dim, "WIDTH_V": head_dim, "BLOCK_DK": head_dim, "BLOCK_DV": head_dim,
        "SOFT_CAP": extras, "FOLD": not extras, "SCALED": scaled, "WINDOW": extras,
        "OPERAND": operand(cache),
    }  # fmt: skip
    kernel = attention_decode.decode_kernel
    return compiled(kernel, pointers_of(kernel, cache), constants, 4, 3)


def mla_decode(
    block_size: int, cache: str = "bf16", how: tuple[int, int, int, int] = (64, 32, 8, 3)
) -> dict[str, Any]:
    block_h, block_n, num_warps, num_stages = how
    constants = {
        "BLOCK_H": block_h, "BLOCK_N": block_n, "BLOCK_SIZE": block_size, "LATENT": 512, "ROPE": 64,
        "BLOCK_L": 256, "BLOCK_R": 64, "FOLD": True, "OPERAND": operand(cache),
    }  # fmt: skip
    kernel = mla.mla_kernel
    return compiled(kernel, pointers_of(kernel, cache), constants, num_warps, num_stages)


def checksum_blocks() -> dict[str, Any]:
    pointers = dict.fromkeys(("bases", "layers", "block_ids", "keys", "sums"), "*i64")
    constants = {
        "PART": 1, "ROW_BYTES": 256, "BLOCK_SIZE": 16, "UNIT": 8, "LOADED": tl.uint64,
        "BLOCK_R": 64, "BLOCK_P": 32,
    }  # fmt: skip
    return compiled(checksum.checksum_kernel, pointers, constants, 4, 3)


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


def append_kv(cache: str = "bf16", *, scale_rows: bool = False) -> dict[str, Any]:
    kernel = append.append_kernel
    pointers = {"key": "*bf16", "value": "*bf16", "slot_mapping": "*i64"}
    pointers |= pointers_of(kernel, cache)
    constants = {
        "BLOCK_SIZE": 16, "WIDTH_K": 128, "WIDTH_V": 128, "BLOCK_H": 8, "BLOCK_DK": 128, "BLOCK_DV": 128,
        "DIVIDE_K": False, "DIVIDE_V": not scale_rows, "SCALE_ROWS": scale_rows,
    }  # fmt: skip
    return compiled(kernel, pointers, constants, 4, 3)


def copy_blocks(
    types: tuple[tl.dtype, tl.dtype] = (tl.int64, tl.int64), *, scaled: bool = False
) -> dict[str, Any]:
    whole = types == (tl.int64, tl.int64)
    width = 32 if whole else 128
    constants = {
        "SRC": types[0], "DST": types[1], "WIDTH": width, "BLOCK_C": width, "BLOCK_R": 2048 // width,
        "ALIGNED": True, "SCALED": scaled, "HEADS_INSIDE": not whole,
    }  # fmt: skip
    pointers = {"bases": "*i64", "segments": "*i64", "factors": "*fp32"}
    return compiled(copy.copy_kernel, pointers, constants, 8, 3)


def merge_states() -> dict[str, Any]:
    pointers = dict.fromkeys(("v_a", "v_b", "out"), "*bf16") | dict.fromkeys(
        ("lse_a", "lse_b", "lse"), "*fp32"
    )
    constants = {"WIDTH": 128, "BLOCK_R": 16, "BLOCK_D": 128}
    return compiled(merge.merge_kernel, pointers, constants, 4, 3)


def main(which: str) -> None:
    made: dict[str, dict[str, Any]] = {}
    if which == "usual":
        made["prefill 128"] = prefill(candidates(128, 1000, 16, 16)[0], 128, 16)
        made["prefill 128, long"] = prefill(candidates(128, 4000, 16, 16)[0], 128, 16)
        made["prefill 128, e4m3"] = prefill(candidates(128, 1000, 16, 8)[0], 128, 16, cache="e4m3")
        made["decode 128"] = decode(128, 16)
        made["decode 128, e4m3"] = decode(128, 16, cache="e4m3")
        made["mla"] = mla_decode(64)
        made["mla, e4m3"] = mla_decode(64, "e4m3")
        made["merge_splits"] = merge_splits()
        made["append"] = append_kv()
        made["append e4m3"] = append_kv("e4m3")
        made["copy"] = copy_blocks()
        made["convert"] = copy_blocks((tl.float32, tl.bfloat16))
        made["quantise"] = copy_blocks((tl.bfloat16, tl.float8e4nv), scaled=True)
        made["checksum"] = checksum_blocks()
        made["merge"] = merge_states()
    else:
        for head_dim in (64, 128, 256):
            for extras in (False, True):
                for rows, block_size in ((1000, 16), (1000, 128), (10, 16)):
                    for tile in candidates(head_dim, rows, block_size, 16, plain=not extras):
                        name = f"prefill {head_dim}, {tile}, block {block_size}, extras {extras}"
                        made[name] = prefill(tile, head_dim, block_size, extras=extras)
                for block_size in (1, 16):
                    name = f"decode {head_dim}, block {block_size}, extras {extras}"
                    made[name] = decode(head_dim, block_size, extras=extras)
            for cache, scaled in (("e4m3", False), ("e5m2", False), ("int8", True)):
                for tile in candidates(head_dim, 1000, 16, 8, plain=not scaled):
                    name = f"prefill {head_dim}, {tile}, {cache}, scaled {scaled}"
                    made[name] = prefill(tile, head_dim, 16, cache=cache, scaled=scaled)
                name = f"decode {head_dim}, {cache}, scaled {scaled}"
                made[name] = decode(head_dim, 16, cache=cache, scaled=scaled)
        for cache in CACHES:
            for block_size in (1, 64):
                made[f"mla {cache}, block {block_size}"] = mla_decode(block_size, cache)
            made[f"append {cache}, rows scaled"] = append_kv(cache, scale_rows=cache != "bf16")
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
