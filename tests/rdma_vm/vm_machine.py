# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""One run of the virtual machine: its initial file system, QEMU's command line, its output, its end."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMED_OUT = 124
FAILED = 125
# tsc=reliable: else the guest turns to a clock that costs an emulated device access a reading.
_KERNEL_COMMAND_LINE = "console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on tsc=reliable"
_LAST_LINES = 60  # of the console, where the command did not end


@dataclass(frozen=True)
class Run:
    """What is to be run, and the machine it is to be run in."""

    command: list[str]
    timeout_s: float = 300.0
    memory_mib: int = 1536
    cpus: int = 2
    rails: int = 1
    linked: bool = False
    netem: str = ""
    mtu: int = 4200  # the largest RDMA path MTU, 4096, with its headers
    kernel_log: bool = False
    writable: list[Path] = field(default_factory=list)

    @property
    def devices(self) -> list[str]:
        return [f"rxe{i}" for i in range(self.rails)]


def start(run: Run, ready: Path) -> int:
    """Boots, runs, and returns the command's exit code, ``TIMED_OUT`` or ``FAILED`` (with the reason on stderr)."""
    with tempfile.TemporaryDirectory(prefix="rdma-vm-") as folder:
        files = Path(folder)
        (files / "initrd").write_bytes(_initial_files(run, ready))
        return _boot(run, ready, files)


def _boot(run: Run, ready: Path, files: Path) -> int:
    ports = {name: os.pipe() for name in ("out", "err", "code")}
    command = _qemu(run, ready, files, {name: write for name, (_, write) in ports.items()})
    libraries = ready / "root/usr/lib/x86_64-linux-gnu"
    with open(files / "qemu", "wb") as log:
        qemu = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "LD_LIBRARY_PATH": str(libraries),
                "QEMU_MODULE_DIR": f"{libraries}/qemu",
            },
            pass_fds=[write for _, write in ports.values()],
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=_end_with_parent,
        )
    for _, write in ports.values():
        os.close(write)
    said = bytearray()
    relays = [
        threading.Thread(target=_relay, args=(ports["out"][0], sys.stdout.fileno())),
        threading.Thread(target=_relay, args=(ports["err"][0], sys.stderr.fileno())),
        threading.Thread(target=_collect, args=(ports["code"][0], said)),
    ]
    for relay in relays:
        relay.start()
    timed_out = False
    try:
        qemu.wait(timeout=run.timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        if qemu.poll() is None:
            qemu.kill()
            qemu.wait()
        for relay in relays:
            relay.join()
    console = (files / "console").read_bytes().decode(errors="replace")
    if run.kernel_log:
        sys.stderr.write(console)
    if said.strip().isdigit():
        return int(said)
    sys.stderr.write((files / "qemu").read_text(errors="replace"))
    if not run.kernel_log:
        sys.stderr.write("".join(console.splitlines(keepends=True)[-_LAST_LINES:]))
    if timed_out:
        print(
            f"rdma-vm: stopped at its time limit of {run.timeout_s:g} s; "
            "its last console lines are above",
            file=sys.stderr,
        )
        return TIMED_OUT
    print(
        f"rdma-vm: the guest ended before the command did (QEMU's exit code {qemu.returncode}); "
        "its last console lines are above",
        file=sys.stderr,
    )
    return FAILED


def _end_with_parent() -> None:
    """QEMU ends when we do, also when we are killed and can end nothing."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _relay(source: int, sink: int) -> None:
    """Copies until the guest ends; past a reader that has gone, to nowhere, or the guest would stop for it."""
    gone = False
    while data := os.read(source, 1 << 16):
        while data and not gone:
            try:
                data = data[os.write(sink, data) :]
            except BrokenPipeError:
                gone = True
    os.close(source)


def _collect(source: int, into: bytearray) -> None:
    while data := os.read(source, 1 << 16):
        into += data
    os.close(source)


def _qemu(run: Run, ready: Path, files: Path, ports: dict[str, int]) -> list[str]:
    root = ready / "root"
    shares = {"host": (Path("/"), True), "packages": (root, True)}
    shares |= {f"write{i}": (path, False) for i, path in enumerate(run.writable)}
    command = [
        *(f"{root}/usr/bin/qemu-system-x86_64", "-L", f"{root}/usr/share/qemu"),
        *("-L", f"{root}/usr/share/seabios", "-nodefaults", "-no-user-config"),
        *("-display", "none", "-no-reboot", "-machine", "q35", "-smp", str(run.cpus)),
        *("-m", str(run.memory_mib), "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-kernel", str(ready / "kernel"), "-initrd", str(files / "initrd")),
        *("-append", f"{_KERNEL_COMMAND_LINE} loglevel={7 if run.kernel_log else 5}"),
        *("-serial", f"file:{files / 'console'}", "-device", "virtio-serial-pci"),
    ]
    for name, fd in ports.items():
        command += ["-chardev", f"file,id={name},path=/dev/fd/{fd},append=on"]
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    for name, (path, read_only) in shares.items():
        place = f"local,id={name},path={str(path).replace(',', ',,')},security_model=none,multidevs=remap"
        command += ["-fsdev", place + (",readonly=on" if read_only else "")]
        command += ["-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]
    return command


def _initial_files(run: Run, ready: Path) -> bytes:
    """The initramfs: busybox, the init script, the modules of this run in load order, and the job."""
    lists = json.loads((ready / "manifest.json").read_text())["modules"]
    kinds = ["base", *(["linked"] if run.linked else []), *(["netem"] if run.netem else [])]
    modules = list(dict.fromkeys(name for kind in kinds for name in lists[kind]))
    settings = {
        "rails": str(run.rails),
        "linked": "yes" if run.linked else "",
        "netem": run.netem,
        "mtu": str(run.mtu),
        "modules": " ".join(modules),
        # The guest's clock begins when it boots, a second or two late, and its last words take as long.
        "speak_after": f"{run.timeout_s - 10:.0f}" if run.timeout_s >= 30 else "",
    }
    environment = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '/usr/bin')}:/usr/sbin:/sbin",
        "KVXFER_RDMA_DEVICES": ",".join(
            run.devices
        ),  # for tests to know that they are in the guest
    }
    job = [
        f"export {key}={shlex.quote(value)}"
        for key, value in environment.items()
        if key.isidentifier()
    ]
    job += [f"cd {shlex.quote(os.getcwd())} || exit {FAILED}", f"exec {shlex.join(run.command)}"]
    archive = _Archive()
    for folder in ("bin", "dev", "job", "modules", "proc", "sys", "lib"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, (ready / "root/usr/bin/busybox").read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, (HERE / "guest_init.sh").read_bytes())
    for module in modules:
        archive.add(
            f"modules/{module}.ko",
            stat.S_IFREG | 0o644,
            (ready / f"modules/{module}.ko").read_bytes(),
        )
    for name, lines in {
        "settings": [f"{key}={shlex.quote(value)}" for key, value in settings.items()],
        "writable": [f"write{i} {path}" for i, path in enumerate(run.writable)],
        "command": job,
    }.items():
        archive.add(f"job/{name}", stat.S_IFREG | 0o644, "".join(f"{x}\n" for x in lines).encode())
    return archive.finished()


class _Archive:
    """A cpio archive as the kernel unpacks it ("newc"): its documentation is buffer-format.rst of the kernel."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        numbers = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        self._bytes += b"070701" + b"".join(b"%08x" % number for number in numbers) + path
        self._pad()
        self._bytes += data
        self._pad()

    def finished(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._bytes)

    def _pad(self) -> None:
        self._bytes += bytes(-len(self._bytes) % 4)
