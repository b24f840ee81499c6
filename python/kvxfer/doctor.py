# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer doctor`: what works on this machine, what does not, and why. Changes nothing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

import numpy as np

from kvxfer import __version__, _transfer, kernels
from kvxfer.errors import KvxferError
from kvxfer.transfer import (
    TransferEngine,
    probe_transports,
    tls_unavailable,
    transport_details,
)

__all__ = ["Check", "add_arguments", "examine", "run"]

EXTRAS = {
    "torch": ("torch", "kernels on torch tensors, the server"),
    "triton": ("torch", "Triton kernels"),
    "fastapi": ("server", "the reference server"),
    "tokenizers": ("server", "text prompts"),
}


@dataclass(frozen=True)
class Check:
    """One line: ``ok`` None means neither good nor bad, only said."""

    group: str
    name: str
    ok: bool | None
    detail: str


def examine() -> list[Check]:
    """Everything that can be found out without touching the network beyond loopback."""
    return [*_platform(), *_transports(), *_loopback(), *_kernels(), *_extras()]


def _platform() -> list[Check]:
    cpus = len(os.sched_getaffinity(0))
    build = kernels.build_info()
    return [
        Check("kvxfer", "version", None, f"{__version__}, Python {platform.python_version()}"),
        Check("kvxfer", "machine", None, f"{platform.platform()}, {cpus} CPUs"),
        Check(
            "kvxfer",
            "build",
            None,
            ", ".join(f"{k} {v}" for k, v in sorted(build.items()) if v != ""),
        ),
    ]


def _transports() -> list[Check]:
    details = transport_details()
    works = {name: f"works here: {detail}" for name, detail in details.items()}
    checks = [
        Check("transports", name, reason is None, reason or works.get(name, "works here"))
        for name, reason in probe_transports()
    ]
    checks.append(_locked_memory())
    checks.append(_gpu_memory())
    reason = tls_unavailable()
    # An extra: nothing but EngineConfig(tls=...) needs it.
    checks.append(Check("transports", "tcp under TLS", reason is None or None, reason or "1.3"))
    return checks


def _locked_memory() -> Check:
    """What verbs may pin: regions beyond it go without RDMA, or are refused."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Check("transports", "locked memory", None, "no limit")
    return Check(
        "transports",
        "locked memory",
        None,
        f"{limit} bytes a process, unless it has CAP_IPC_LOCK: verbs pins every region once for each "
        "rail; ulimit -l, LimitMEMLOCK=infinity (systemd), --ulimit memlock=-1 (containers)",
    )


def _gpu_memory() -> Check:
    """By which ways verbs could register the memory of a GPU: dma-buf first, else peermem."""
    gpus, reason = _transfer.gpus()
    if not gpus:
        return Check("transports", "GPU memory", None, reason)
    module = _transfer.peermem_module()
    said = []
    for i, (name, bus_id, has_dmabuf, orders_writes) in enumerate(gpus):
        exports = "exports dma-bufs" if has_dmabuf else "exports no dma-buf"
        order = "" if orders_writes else ", kernels find what a NIC has written only after a flush"
        said.append(f"cuda:{i} {name} ({bus_id or 'PCI address unknown'}) {exports}{order}")
    said.append(f"{module} is loaded" if module else "no peermem module is loaded")
    works = bool(module) or any(has_dmabuf for _, _, has_dmabuf, _ in gpus)
    hint = "" if works else ": verbs cannot reach it; modprobe nvidia_peermem"
    return Check("transports", "GPU memory", None, "; ".join(said) + hint)


def _loopback() -> list[Check]:
    """Moves 64 KiB between two engines of this process and says over what."""
    try:
        with TransferEngine("doctor-a") as a, TransferEngine("doctor-b") as b:
            target = b.allocate(1 << 16, name="doctor")
            source = a.allocate(1 << 16, name="doctor")
            source.array[:] = 7
            peer = a.connect(b.address)
            transfer = a.write(source, peer.regions["doctor"], 0, 0, 1 << 16)
            transfer.wait(5)
            good = bool(np.all(target.array == 7))
            return [
                Check("transports", "loopback", good, f"64 KiB moved over {transfer.transport}")
            ]
    except KvxferError as error:
        return [Check("transports", "loopback", False, str(error))]


def _kernels() -> list[Check]:
    """What each backend could do with a KV append, on the device that it is for."""
    checks = []
    for backend in ("cuda", "triton", "cpu", "reference"):
        device = "cuda" if backend in ("cuda", "triton") else "cpu"
        reason = kernels.backend_reasons("append_kv", device)[backend]
        checks.append(
            Check("kernels", backend, reason is None, reason or f"works here, on {device}")
        )
    return checks


def _extras() -> list[Check]:
    checks = []
    for package, (extra, purpose) in EXTRAS.items():
        try:
            checks.append(
                Check("extras", package, True, f"{metadata.version(package)} ({purpose})")
            )
        except metadata.PackageNotFoundError:
            checks.append(
                Check(
                    "extras",
                    package,
                    None,
                    f"absent: pip install {package} ({purpose}; one of the extra [{extra}])",
                )
            )
    return checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when what the base install promises works here, else 1."""
    checks = examine()
    if args.json:
        json.dump([asdict(check) for check in checks], sys.stdout, indent=1)
        print()
    else:
        group = ""
        for check in checks:
            if check.group != group:
                group = check.group
                print(group)
            mark = {True: "yes", False: "no", None: "-"}[check.ok]
            print(f"  {mark:4}{check.name:14}{check.detail}")
    needed = {"tcp", "loopback", "reference"}
    return 0 if all(check.ok for check in checks if check.name in needed) else 1
