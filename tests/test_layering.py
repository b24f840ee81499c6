# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Imports run downwards only: the allowed edges as two small tables, one for `import`, one for `#include`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "kvxfer"
CSRC = ROOT / "csrc"

# A part may import itself and these.
PYTHON_EDGES: dict[str, set[str]] = {
    "errors": set(),
    "layout": {"errors"},
    "transfer": {"errors", "_transfer"},
    "kernels": {"errors", "layout", "_kernels_cpu", "_kernels_cuda"},
    "connector": {"errors", "layout", "transfer", "kernels"},
    "server": {"errors", "layout", "transfer", "kernels", "connector"},
    "testing": {"errors", "layout", "transfer", "kernels", "connector", "server"},
    "doctor": {"errors", "layout", "transfer", "kernels", "_transfer", "_kernels_cpu"},
    "bench": set(),
    "cli": {"errors", "doctor", "server", "bench"},
    "__main__": {"cli"},
    "__init__": {"errors", "layout", "transfer", "kernels", "connector"},
}
# Torch costs a second of import and pins an ABI: only these may name it at module level.
MAY_IMPORT_TORCH = {"kernels/triton", "kernels/torch_ops", "server", "testing"}

INCLUDE_EDGES: dict[str, set[str]] = {
    "common": set(),
    "cuda_driver": {"common"},
    "transport": {"cuda_driver", "common"},
    "engine": {"transport", "cuda_driver", "common"},
    "kernels": {"common"},
    "bindings": {"engine", "transport", "cuda_driver", "kernels", "common"},
}
# Siblings do not know each other, but for one that is the other with a step done differently.
SIBLING_EDGES = {("cma", "shm")}


def python_part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, at module level) of every import in the file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write kvxfer.…"
            if node.module == "kvxfer":
                for alias in node.names:
                    yield node.lineno, f"kvxfer.{alias.name}", id(node) in top
            else:
                yield node.lineno, node.module or "", id(node) in top


def test_python_imports_run_downwards() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = python_part(path)
        assert part in PYTHON_EDGES, (
            f"{path}: '{part}' is not in the table of tests/test_layering.py"
        )
        for line, name, _ in imports_of(path):
            target = name.split(".")[1] if name.startswith("kvxfer.") else None
            if target in (None, part, "__version__"):
                continue
            if target not in PYTHON_EDGES[part]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_torch_is_imported_only_where_it_is_needed() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if any(place.startswith(allowed) for allowed in MAY_IMPORT_TORCH):
            continue
        wrong += [
            f"{path.relative_to(ROOT)}:{line}: imports {name}"
            for line, name, top in imports_of(path)
            if top and name.split(".")[0] in {"torch", "triton"}
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not CSRC.is_dir(), reason="no native sources in this tree")
def test_native_includes_run_downwards() -> None:
    wrong = []
    include = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in {".hpp", ".cpp", ".cu", ".cuh"}):
        place = path.relative_to(CSRC)
        part = place.parts[0]
        for number, text in enumerate(path.read_text().splitlines(), 1):
            found = include.match(text)
            if not found:
                continue
            target = Path(found[1])
            where = f"{path.relative_to(ROOT)}:{number}"
            if not (CSRC / target).is_file():
                wrong.append(f"{where}: includes {target}, which is not a path from csrc/")
            elif target.parts[0] != part and target.parts[0] not in INCLUDE_EDGES[part]:
                wrong.append(f"{where}: {part} may not include {target}")
            elif (
                part == target.parts[0] in {"transport", "kernels"}
                and len(place.parts) > 2
                and len(target.parts) > 2
                and place.parts[1] != target.parts[1]
                and (place.parts[1], target.parts[1]) not in SIBLING_EDGES
            ):
                wrong.append(
                    f"{where}: siblings {place.parts[1]} and {target.parts[1]} may not know each other"
                )
    assert not wrong, "\n".join(wrong)


def test_nothing_but_tests_imports_testing() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if python_part(path) != "testing"
        for line, name, _ in imports_of(path)
        if name.startswith("kvxfer.testing")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not CSRC.is_dir(), reason="no native sources in this tree")
def test_only_the_verbs_transport_needs_the_headers_of_libibverbs() -> None:
    """A build without them leaves that folder out, and registry.cpp does not include it then."""
    needs = re.compile(r'^\s*#\s*include\s+[<"](infiniband|transport/verbs)/', re.MULTILINE)
    files = {p for p in CSRC.rglob("*") if p.suffix in {".hpp", ".cpp", ".cu", ".cuh"}}
    found = {p.relative_to(CSRC).as_posix() for p in files if needs.search(p.read_text())}
    others = {place for place in found if not place.startswith("transport/verbs/")}
    assert others == {"transport/registry.cpp"}
