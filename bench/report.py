# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A result of bench_transfer as markdown: the ratios that were reached, and in brackets those asked for.

python bench/report.py bench/results/transfer-2cpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import kib
from targets import ROUND_TRIPS, TARGETS


def line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def cell(each: Mapping[str, Any] | None) -> str:
    """`**0.91** (0.85)`: bold where it is reached; `~`, and never bold, where nearly all was disturbed."""
    if each is None:
        return ""
    number = f"{each['ratio']:.2f}" + ("~" if each["noisy"] else "")
    floor = each["floor"]
    if floor is None:
        return number
    reached = each["ratio"] >= floor and not each["noisy"]
    return f"{f'**{number}**' if reached else number} ({floor:.2f})"


def ratio_table(found: Mapping[str, Any]) -> list[str]:
    ratios = {(each["ours"], each["to"], each["block_nbytes"]): each for each in found["ratios"]}
    blocks = sorted({block for _, _, block in ratios})
    out = [line(["", *map(kib, blocks)]), line(["---"] * (len(blocks) + 1))]
    for target in TARGETS:
        cells = [ratios.get((target.ours, target.to, block)) for block in blocks]
        if any(cells):
            name = f"`{target.ours}` / {target.to}"
            out.append(line([name, *(cell(each) for each in cells)]))
    return out


def rate_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    blocks = sorted({row["block_nbytes"] for row in rows})
    out = [line(["GB/s (CPU s/GB)", *map(kib, blocks)]), line(["---"] * (len(blocks) + 1))]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = {row["block_nbytes"]: row for row in rows if row["name"] == name}
        cells = (
            f"{row['gb_per_s']:.2f} ({row['cpu_s_per_gb']:.2f})" if row else ""
            for row in map(found.get, blocks)
        )
        out.append(line([name, *cells]))
    return out


def small_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    out = [line(["", "median", "to its bound"]), line(["---"] * 3)]
    for row in rows:
        bound = ""
        if row["case"] == "round_trip" and "bound" in row:
            bound = f"{row['times_bound']:.2f} x {row['bound']}, {row['us_over_bound']:+.2f} us"
            if row["name"] in ROUND_TRIPS:
                key, most = ROUND_TRIPS[row["name"]]
                bound += f" (asked: {most} {'us over it' if key == 'us_over_bound' else 'times'})"
        elif row["case"] == "connect" and "bound" in row:
            bound = f"{row['times_bound']:.1f} x {row['bound']}"
        elif row["case"] in ("submit", "death"):
            texts = []
            if "asked_us" in row:
                texts.append(f"asked: {row['asked_us']:.2f} us")
            if "asleep_us" in row:
                texts.append(f"the first of a burst: {row['asleep_us']:.0f} us")
            bound = "; ".join(texts)
        if row["case"] == "idle":
            out.append(line(["idle, CPU", f"{row['cpu_share'] * 100:.4f} %", ""]))
            continue
        name = f"{row['case'].replace('_', ' ')}, {row['name']}"
        if "num_blocks" in row:
            name += f", {row['num_blocks']} blocks"
        noisy = "~" if row.get("noisy") else ""
        out.append(line([name, f"{row['p50_us']:.2f} us{noisy}", bound]))
    return out


def markdown(found: Mapping[str, Any]) -> str:
    facts = found["facts"]
    blocks = [row for row in found["rows"] if row["case"] == "blocks"]
    small = [row for row in found["rows"] if row["case"] != "blocks"]
    head = (
        f"{facts['cpu']}, {facts['cpus_usable']} CPUs, {facts['platform']}, "
        f"kvxfer {facts['kvxfer']}. `~`: nearly all samples were disturbed."
    )
    if found.get("stopped"):
        head += f" **Not a whole run: {found['stopped']}.**"
    parts = [[head], ratio_table(found), rate_table(blocks)]
    if small:
        parts.append(small_table(small))
    if found["skipped"]:
        parts.append([f"Not measured: {name}: {why}" for name, why in found["skipped"].items()])
    return "\n\n".join("\n".join(part) for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    print(markdown(json.loads(parser.parse_args().result.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
