# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The guest's kernel and the modules it loads, out of Debian's kernel package."""

from __future__ import annotations

import lzma
import re
import shutil
import tarfile
from pathlib import Path

# What each kind of run loads; `depends=` in the modules adds the rest.
MODULES = {
    "base": (
        "virtio_pci",
        "9pnet_virtio",
        "9p",
        "overlay",
        "virtio_console",
        "dummy",
        "crc32_generic",  # Soft-RoCE asks the crypto API for "crc32" by name: no module depends on it
        "ib_uverbs",
        "rdma_rxe",
    ),
    "linked": ("veth",),
    "netem": ("sch_netem",),
}


def unpack(tar: tarfile.TarFile, release: str, folder: Path) -> dict[str, list[str]]:
    """Writes ``folder/kernel`` and the needed ``folder/modules/*.ko``; returns their names in load order.

    Args:
        tar: the kernel package's files, read once from front to back.
        release: the kernel's name for itself, such as ``6.1.0-49-amd64``.
    Raises:
        LookupError: the package has no such kernel, or lacks a module that is not built in either.
    """
    everything = folder / "modules.all"
    everything.mkdir()
    builtin: set[str] = set()
    for member in tar:
        name = Path(member.name).name
        if name == f"vmlinuz-{release}":
            (folder / "kernel").write_bytes(_bare(_read(tar, member)))
        elif name == "modules.builtin":
            builtin = {_key(line) for line in _read(tar, member).decode().split()}
        elif re.search(r"\.ko(\.xz)?$", name):
            contents = _read(tar, member)
            if name.endswith(".xz"):
                contents = lzma.decompress(contents)
            (everything / f"{_key(name)}.ko").write_bytes(contents)
    if not (folder / "kernel").exists():
        raise LookupError(f"the kernel package has no vmlinuz-{release}")
    (folder / "modules").mkdir()
    lists: dict[str, list[str]] = {}
    for kind, names in MODULES.items():
        lists[kind] = []
        for module in names:
            _add(module, everything, builtin, lists[kind])
    for module in {name for names in lists.values() for name in names}:
        shutil.move(everything / f"{module}.ko", folder / "modules")
    shutil.rmtree(everything)
    return lists


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _key(name: str) -> str:
    """A module's name: files write `-` where modules say `_`."""
    return Path(name).name.split(".ko")[0].replace("-", "_")


def _add(name: str, folder: Path, builtin: set[str], order: list[str]) -> None:
    if name in order or name in builtin:
        return
    file = folder / f"{name}.ko"
    if not file.exists():
        raise LookupError(
            f"this kernel has no module {name}: is it one of Debian's -cloud kernels?"
        )
    found = re.search(rb"\0depends=([^\0]*)\0", file.read_bytes())
    for needed in found[1].decode().split(",") if found and found[1] else ():
        _add(_key(needed), folder, builtin, order)
    order.append(name)


def _bare(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage, which spares each boot seconds of emulated decompression."""
    start = image.find(b"\xfd7zXZ\0")
    if start >= 0:
        try:
            kernel = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(image[start:])
        except lzma.LZMAError:
            return image
        if kernel.startswith(b"\x7fELF"):
            return kernel
    return image
