# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Finds a checkpoint's safetensors files and checks each one's header against its size before it is mapped.

A truncated download maps without complaint and then kills the process with SIGBUS at the first touch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvxfer.errors import InvalidArgumentError

__all__ = ["Header", "read_header", "update_digest", "weight_files"]

# The format's own limit; a length above it is a file of another kind.
_MAX_HEADER_NBYTES = 100_000_000
_NUM_SAMPLES = 64
_SAMPLE_NBYTES = 1024
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Digest(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Header:
    """What a file says it holds."""

    shapes: dict[str, tuple[int, ...]]
    raw: bytes
    data_begin: int
    data_nbytes: int
    file_nbytes: int


def weight_files(folder: Path) -> list[Path]:
    """The shards named by ``model.safetensors.index.json``, or the one file there is.

    Raises:
        InvalidArgumentError: a shard is missing (named), there is none, or only pickled weights.
    """
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgumentError(
                f"{index_path} has no readable weight_map: {error!r}"
            ) from error
        if not names:
            raise InvalidArgumentError(f"{index_path}: weight_map is empty")
        for name in names:
            # A file of the directory itself: an index from elsewhere must not point out of it.
            if Path(name).name != name:
                raise InvalidArgumentError(f"{index_path}: shard {name!r} is not a plain file name")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InvalidArgumentError(
                f"{folder} lacks shards named by its index: {', '.join(missing)}"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return [folder / found[0]]
    if found:
        raise InvalidArgumentError(
            f"{folder} has several safetensors files ({', '.join(found)}) and no "
            "model.safetensors.index.json to say which belong together"
        )
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise InvalidArgumentError(
            f"{folder} has only pickled weights ({', '.join(pickled)}), which could run code when loaded; "
            "convert them to safetensors"
        )
    raise InvalidArgumentError(f"{folder} has no model.safetensors")


def read_header(path: Path) -> Header:
    """Parse and check; raises InvalidArgumentError saying what is wrong with which file."""
    try:
        file_nbytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > _MAX_HEADER_NBYTES:
                raise InvalidArgumentError(
                    f"{path} is not a safetensors file: {file_nbytes} bytes, header length {length}"
                )
            raw = file.read(length)
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) < length:
        raise _truncated(path, file_nbytes, 8 + length)
    try:
        entries: dict[str, Any] = json.loads(raw)
        entries.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InvalidArgumentError(
            f"{path} has a malformed safetensors header: {error!r}"
        ) from error
    expected = 8 + length + end
    if file_nbytes < expected:
        raise _truncated(path, file_nbytes, expected)
    if file_nbytes > expected:
        raise InvalidArgumentError(
            f"{path} is {file_nbytes} bytes, but its header accounts for {expected} only"
        )
    return Header(shapes, raw, 8 + length, end, file_nbytes)


def update_digest(digest: Digest, folder: Path) -> None:
    """Feeds each weight file's name, size, header and a sample of its data."""
    for path in weight_files(folder):
        header = read_header(path)
        digest.update(f"\0{path.name}\0{header.file_nbytes}\0".encode())
        digest.update(header.raw)
        with path.open("rb") as file:
            for step in range(_NUM_SAMPLES):
                file.seek(header.data_begin + header.data_nbytes * step // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_NBYTES))


def _truncated(path: Path, given: int, expected: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{path} is truncated: {given} bytes, its header asks for {expected}; download it again"
    )
