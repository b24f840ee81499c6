# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The command line of `tests/rdma_vm/run`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import vm_machine
import vm_packages

SKIPPED = 77  # as automake's test drivers read it

_EPILOG = """\
exit codes: the command's own; 77 the machine cannot be made here (the reason is on stderr), 124 time limit,
125 the machine failed, 130 Ctrl-C. The packages lie in $KVXFER_VM_CACHE (default ~/.cache/kvxfer-rdma-vm)."""


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not (command or options.prepare or options.print_root):
        parser.error("no command to run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        ready = vm_packages.prepared(vm_packages.cache_folder())
        if options.print_root:
            print(ready / "root")
            return 0
        if options.prepare:
            return 0
        linked = options.linked or bool(options.netem)
        run = vm_machine.Run(
            command=command,
            timeout_s=options.timeout,
            memory_mib=options.memory,
            cpus=options.cpus,
            rails=2 if linked else options.rails,
            linked=linked,
            netem=options.netem,
            kernel_log=options.kernel_log,
            writable=[path.resolve(strict=True) for path in options.write],
        )
        return vm_machine.start(run, ready)
    except vm_packages.Unavailable as missing:
        print(f"rdma-vm: skipped: {missing}", file=sys.stderr)
        return SKIPPED
    except (OSError, LookupError) as error:
        print(f"rdma-vm: {error}", file=sys.stderr)
        return vm_machine.FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run",
        description="Runs COMMAND in a virtual machine with Soft-RoCE devices, over this machine's files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "-t",
        "--timeout",
        type=float,
        default=300,
        metavar="S",
        help="limit, boot included (%(default)s)",
    )
    add("-w", "--write", type=Path, action="append", default=[], metavar="DIR", help="folder that the "
        "command may change (repeatable); what it writes elsewhere is lost")  # fmt: skip
    add("-r", "--rails", type=int, choices=range(1, 9), default=1, metavar="N", help="devices, each on a "
        "network of its own, where it reaches only itself (%(default)s)")  # fmt: skip
    add("-l", "--linked", action="store_true", help="two devices on one network, joined by a cable")
    add("--netem", default="", metavar="FAULTS", help="--linked, with these faults of tc-netem in both "
        "directions: 'loss 1%%', 'delay 2ms'")  # fmt: skip
    add("-m", "--memory", type=int, default=1536, metavar="MIB", help="of the guest (%(default)s)")
    add("-c", "--cpus", type=int, default=2, metavar="N", help="of the guest (%(default)s)")
    add("-k", "--kernel-log", action="store_true", help="the guest's console on stderr, at the end")
    add("--prepare", action="store_true", help="only fetch and unpack what is needed")
    add(
        "--print-root",
        action="store_true",
        help="print the folder of unpacked packages (verbs headers)",
    )
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    return parser
