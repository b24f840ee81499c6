# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The training text: the Python standard library of the interpreter that runs the script."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Tests and tables: much text, little that reads like ordinary Python. Site-packages is not the library.
EXCLUDED_DIRECTORIES = frozenset(
    [
        "site-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "turtledemo",
    ]
)
# Written when the interpreter is built, so different on each machine though the release is the same.
BUILD_PREFIXES = ("_sysconfigdata", "config-")

HELD_OUT_FRACTION = 0.03


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, split by file so that no held-out text was ever trained on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str  # over names and raw bytes of all files, before any cleaning
    num_files: int
    num_bytes: int  # after cleaning, UTF-8


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files(root: Path) -> list[tuple[str, Path]]:
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_DIRECTORIES.isdisjoint(relative.parts[:-1]) and not relative.parts[
            0
        ].startswith(BUILD_PREFIXES):
            found.append((relative.as_posix(), path))
    return sorted(found)


def clean(source: str) -> str:
    """Drop comment-only lines and the blank runs they leave; a model this small has no room for prose.

    A line of a string literal that begins with ``#`` goes too: rare, and harmless to a language model.
    """
    lines = [line.rstrip() for line in source.splitlines() if not line.lstrip().startswith("#")]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"


def load(root: Path, *, seed: int, max_files: int | None = None) -> Corpus:
    """Read, hash, clean, shuffle and split the library below ``root``."""
    digest = hashlib.sha256()
    documents = []
    for name, path in _source_files(root)[:max_files]:
        raw = path.read_bytes()
        digest.update(f"{name}\0{len(raw)}\0".encode())
        digest.update(raw)
        text = clean(raw.decode("utf-8", errors="replace"))
        if text.strip():
            documents.append(text)
    if len(documents) < 2:
        raise SystemExit(f"{root}: {len(documents)} usable .py files; a split needs two or more")
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    num_held_out = max(1, round(HELD_OUT_FRACTION * len(shuffled)))
    return Corpus(
        train=tuple(shuffled[num_held_out:]),
        held_out=tuple(shuffled[:num_held_out]),
        sha256=digest.hexdigest(),
        num_files=len(documents),
        num_bytes=sum(len(text.encode()) for text in documents),
    )
