# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Debian's packages for the guest: fetched, checked and unpacked into a cache folder, nothing installed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import vm_kernel

# What the guest and its tests call by name; apt adds the libraries that this machine lacks.
PACKAGES = (
    "busybox-static",
    "ibverbs-providers",
    "ibverbs-utils",
    "iproute2",
    "libibverbs-dev",
    "libibverbs1",
    "perftest",
    "qemu-system-x86",
)
KERNEL = "linux-image-amd64"
# Raised whenever what lies in a prepared folder changes its form.
FORM = "1"
# apt neither locks nor changes user: it only reads the lists and writes here, and need not be root.
APT_OPTIONS = ("-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root")


class Unavailable(Exception):
    """The machine cannot be made here; the message says why. Not an error of what is tested."""


def cache_folder() -> Path:
    """``KVXFER_VM_CACHE``, or a folder in the user's real home: test suites point ``HOME`` elsewhere."""
    named = os.environ.get("KVXFER_VM_CACHE")
    return Path(named) if named else Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache/kvxfer-rdma-vm")


def _ready_folder(cache: Path) -> Path:
    key = hashlib.sha256(" ".join((FORM, KERNEL, *PACKAGES)).encode()).hexdigest()[:12]
    return cache / key


def is_prepared(cache: Path) -> bool:
    return (_ready_folder(cache) / "manifest.json").exists()


def prepared(cache: Path) -> Path:
    """The folder with ``root/``, ``modules/``, ``kernel`` and ``manifest.json``; made at the first call.

    It appears whole, by a rename, and never changes afterwards: runs that use it need no lock. Packages that
    were fetched before an interruption are kept and not fetched again.

    Raises:
        Unavailable: not Debian on amd64, or the packages can neither be found nor fetched.
    """
    ready = _ready_folder(cache)
    if is_prepared(cache):
        return ready
    for tool in ("apt-get", "apt-cache", "dpkg", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Unavailable(f"no {tool} here: the guest is made of Debian's packages")
    architecture = subprocess.run(
        ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if architecture != "amd64":
        raise Unavailable(f"packages of Debian amd64 are needed, this is {architecture}")
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_prepared(cache):  # another run may have made it meanwhile
            _prepare(cache, ready)
    return ready


def _prepare(cache: Path, ready: Path) -> None:
    print(f"rdma-vm: fetching a kernel, QEMU and RDMA tools (90 MB) into {cache}", file=sys.stderr)
    debs = cache / "debs"
    debs.mkdir(exist_ok=True)
    try:
        files = _fetch(debs, ())
    except Unavailable:  # lists that are missing, or too old for what the mirror still has
        files = _fetch(debs, _own_lists(cache))
    making = ready.with_suffix(".partial")
    shutil.rmtree(making, ignore_errors=True)
    (making / "root").mkdir(parents=True)
    kernel = ""
    for name, file in files.items():
        if release := re.fullmatch(r"linux-image-(\d.*)", name):
            kernel = release[1]
            with _contents(file) as tar:
                modules = vm_kernel.unpack(tar, kernel, making)
        else:
            with _contents(file) as tar:
                tar.extractall(making / "root", members=_wanted(tar))
    manifest = {
        "kernel": kernel,
        "modules": modules,
        "packages": {name: file.name for name, file in files.items()},
    }
    (making / "manifest.json").write_text(json.dumps(manifest, indent=2))
    shutil.rmtree(ready, ignore_errors=True)
    making.rename(ready)
    shutil.rmtree(debs)


def _apt(tool: str, *arguments: str, options: tuple[str, ...], cwd: Path | None = None) -> str:
    command = [tool, *APT_OPTIONS, *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise Unavailable(f"`{tool} {' '.join(arguments[:4])} ...` failed: {' | '.join(said)}")
    return done.stdout


def _own_lists(cache: Path) -> tuple[str, ...]:
    """Package lists of our own, up to date, where the machine's are missing or old and we may not be root."""
    (cache / "lists/partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives/partial").mkdir(parents=True, exist_ok=True)
    options = ("-o", f"Dir::State::Lists={cache}/lists", "-o", f"Dir::Cache={cache}")
    _apt("apt-get", "update", "-qq", options=options)
    return options


def _fetch(debs: Path, options: tuple[str, ...]) -> dict[str, Path]:
    """The files of every package that is needed, by name, their digests checked."""
    depends = _apt("apt-cache", "depends", KERNEL, options=options)
    kernel = re.search(r"Depends: (linux-image-\d\S+)", depends)
    if kernel is None:
        raise Unavailable(f"no package {KERNEL} in apt's lists, or none that names a kernel")
    plan = _apt("apt-get", "install", "-s", "--no-install-recommends", *PACKAGES, options=options)
    # "Inst name (version" is new here; "Inst name [old] (version" would upgrade what this machine has.
    new = re.findall(r"^Inst (\S+) \(", plan, re.MULTILINE)
    names = list(dict.fromkeys([*PACKAGES, *new, kernel[1]]))
    uris = _apt("apt-get", "download", "--print-uris", *names, options=options)
    files, wanted = {}, {}
    for line in uris.splitlines():
        _, file, nbytes, digest = shlex.split(line)
        name, path = file.split("_")[0], debs / file
        files[name] = path
        if not _is_whole(path, int(nbytes), digest):
            path.unlink(missing_ok=True)
            wanted[name] = (path, int(nbytes), digest)
    if missing := set(names) - set(files):
        raise Unavailable(f"apt knows no place to fetch {sorted(missing)} from")
    if wanted:  # in one call, since each reads all of apt's lists first
        _apt("apt-get", "download", "-qq", *wanted, options=options, cwd=debs)
    for path, nbytes, digest in wanted.values():
        if not _is_whole(path, nbytes, digest):
            raise Unavailable(f"{path.name} came with other contents than the {digest} of the list")
    return files


def _is_whole(path: Path, nbytes: int, digest: str) -> bool:
    kind, _, value = digest.partition(":")
    if not path.exists() or path.stat().st_size != nbytes:
        return False
    return hashlib.new(kind.lower(), path.read_bytes()).hexdigest() == value


@contextlib.contextmanager
def _contents(deb: Path) -> Iterator[tarfile.TarFile]:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as process:
        stream: IO[bytes] | None = process.stdout
        assert stream is not None
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            yield tar
        stream.read()  # the padding behind the archive, without which dpkg-deb ends by SIGPIPE
    if process.returncode != 0:
        raise Unavailable(f"dpkg-deb cannot read {deb} (exit code {process.returncode})")


def _wanted(tar: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    """Members without documentation, /bin, /sbin and /lib* under /usr, where every Debian since 12 has them."""
    for member in tar:
        name = member.name.removeprefix("./")
        if name.startswith(("usr/share/doc/", "usr/share/man/", "usr/share/locale/")):
            continue
        member.name = _merged(name)
        if member.islnk():
            member.linkname = _merged(member.linkname.removeprefix("./"))
        if member.isdir() or member.isfile() or member.issym() or member.islnk():
            member.mode |= 0o600  # what root may read whatever the mode, we must
            yield member


def _merged(name: str) -> str:
    return re.sub(r"^(bin|sbin|lib\w*)(?=/|$)", r"usr/\1", name)
