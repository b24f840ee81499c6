# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The packages' cache, with an apt of our own that serves small packages from a folder."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import vm_kernel
import vm_packages
from vm_guest import RUN

_KERNEL = "linux-image-9.9-amd64"
# Answers as apt-get, apt-cache, dpkg and dpkg-deb do; a package is a tar file, a download a line in the log.
_TOOL = f"""#!{sys.executable}
import pathlib, shutil, sys
name, words = pathlib.Path(sys.argv[0]).name, [w for w in sys.argv[1:] if not w.startswith("-")]
mirror = pathlib.Path(sys.argv[0]).parent / "mirror"
if name == "dpkg":
    print("amd64")
elif name == "apt-cache":
    print("linux-image-amd64\\n  Depends: {_KERNEL}")
elif name == "dpkg-deb":
    sys.stdout.buffer.write(pathlib.Path(sys.argv[-1]).read_bytes())
elif "install" in words:
    print("Inst libnew (1.0 Debian)\\nInst libold [0.9] (1.0 Debian)")
elif "--print-uris" in sys.argv:
    print((mirror / "uris").read_text(), end="")
elif "update" in words:
    sys.exit("no network")
else:
    for word in words[words.index("download") + 1:]:
        with open(mirror / "log", "a") as log:
            log.write(word + "\\n")
        if not (mirror / f"{{word}}_1_amd64.deb").exists():
            sys.exit("404 " + word)
        shutil.copy(mirror / f"{{word}}_1_amd64.deb", ".")
"""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tools first on the path, and the folder they serve from."""
    tools = tmp_path / "tools"
    (tools / "mirror").mkdir(parents=True)
    for name in ("apt-get", "apt-cache", "dpkg", "dpkg-deb"):
        (tools / name).write_text(_TOOL)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    modules = {name for names in vm_kernel.MODULES.values() for name in names}
    files = {f"./lib/modules/9.9/kernel/{name}.ko": b"\0depends=\0" for name in modules}
    files |= {"./lib/modules/9.9/kernel/rdma-rxe.ko": b"\0depends=udp-tunnel,built_in\0"}
    files |= {"./lib/modules/9.9/kernel/udp-tunnel.ko": b"\0depends=\0"}
    files |= {"./lib/modules/9.9/modules.builtin": b"kernel/built-in.ko\n"}
    del files["./lib/modules/9.9/kernel/rdma_rxe.ko"]
    files |= {"./boot/vmlinuz-9.9-amd64": b"a kernel"}
    for name in (*vm_packages.PACKAGES, "libnew"):
        _package(
            tools / "mirror", name, {f"./bin/{name}": name.encode(), f"./usr/share/doc/{name}": b""}
        )
    _package(tools / "mirror", _KERNEL, files)
    return tools / "mirror"


def _package(mirror: Path, name: str, files: dict[str, bytes]) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for path, contents in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    file = f"{name}_1_amd64.deb"
    (mirror / file).write_bytes(data.getvalue())
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    with open(mirror / "uris", "a") as uris:
        uris.write(f"'http://nowhere/{file}' {file} {len(data.getvalue())} SHA256:{digest}\n")


def downloads(mirror: Path) -> list[str]:
    return (mirror / "log").read_text().split()


def test_packages_are_unpacked_and_modules_come_in_load_order(mirror: Path, tmp_path: Path) -> None:
    ready = vm_packages.prepared(tmp_path / "cache")
    assert (ready / "root/usr/bin/busybox-static").read_text() == "busybox-static"
    assert (ready / "root/usr/bin/libnew").exists()
    assert not (ready / "root/usr/share/doc").exists()
    assert (ready / "kernel").read_text() == "a kernel"
    assert (ready / "modules/udp_tunnel.ko").exists()
    manifest = (ready / "manifest.json").read_text()
    assert manifest.index("udp_tunnel") < manifest.index("rdma_rxe")
    assert "libold" not in downloads(mirror)


def test_a_second_call_fetches_nothing(mirror: Path, tmp_path: Path) -> None:
    first = vm_packages.prepared(tmp_path / "cache")
    fetched = downloads(mirror)
    assert vm_packages.prepared(tmp_path / "cache") == first
    assert downloads(mirror) == fetched


def test_what_was_fetched_whole_is_not_fetched_again(mirror: Path, tmp_path: Path) -> None:
    away = mirror / f"{_KERNEL}_1_amd64.deb"
    kept = away.rename(mirror / "away")
    with pytest.raises(vm_packages.Unavailable, match="no network"):
        vm_packages.prepared(tmp_path / "cache")
    kept.rename(away)
    half = tmp_path / "cache/debs/perftest_1_amd64.deb"
    half.write_bytes(half.read_bytes()[:100])
    (mirror / "log").unlink()
    vm_packages.prepared(tmp_path / "cache")
    assert sorted(downloads(mirror)) == sorted([_KERNEL, "perftest"])


def test_a_package_with_other_contents_is_refused(mirror: Path, tmp_path: Path) -> None:
    damaged = mirror / "perftest_1_amd64.deb"
    damaged.write_bytes(damaged.read_bytes().replace(b"perftest", b"perfTest"))
    with pytest.raises(vm_packages.Unavailable):
        vm_packages.prepared(tmp_path / "cache")
    assert not vm_packages.is_prepared(tmp_path / "cache")


def test_two_runs_at_once_fetch_once(mirror: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "KVXFER_VM_CACHE": str(tmp_path / "cache")}
    runs = [
        subprocess.Popen([RUN, "--print-root"], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    roots = {run.communicate(timeout=100)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(roots) == 1
    assert len(downloads(mirror)) == len(set(downloads(mirror)))


def test_without_apt_it_is_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    environment = {"PATH": str(tmp_path), "KVXFER_VM_CACHE": str(tmp_path / "cache")}
    command = [str(tmp_path / "python3"), RUN, "true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 77, done.stderr
    assert (
        done.stderr == "rdma-vm: skipped: no apt-get here: the guest is made of Debian's packages\n"
    )


def test_without_network_it_is_skipped_with_the_reason(mirror: Path, tmp_path: Path) -> None:
    for file in mirror.glob("*.deb"):
        file.unlink()
    environment = {**os.environ, "KVXFER_VM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [RUN, "true"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 77, done.stderr
    assert "no network" in done.stderr.splitlines()[-1]
