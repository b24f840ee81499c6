# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Builds and runs `facts/` in the guest; as a script, records what was seen: `vm_facts.py OUT.json`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from vm_guest import RUN

HERE = Path(__file__).resolve().parent


def build(name: str, sources: list[Path], into: Path) -> Path:
    """Compiles a program against the unpacked packages' verbs headers.

    Raises:
        subprocess.CalledProcessError: no compiler, or it refuses (its messages are on stderr).
    """
    packages = _prepared() / "root/usr"
    program = into / name
    command = ["c++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror"]
    # The header mixes two of its own enumerations, which C++20 deprecates, in an inline function.
    command += ["-Wno-deprecated-enum-enum-conversion", "-isystem", str(packages / "include")]
    command += [*map(str, sources), "-o", str(program)]
    # Its own libraries are found in the guest, where the packages lie over this machine's files.
    command += ["-L", str(packages / "lib/x86_64-linux-gnu"), "-libverbs"]
    subprocess.run([*command, "-Wl,--allow-shlib-undefined"], check=True)
    return program


def build_facts(into: Path) -> Path:
    return build("facts", sorted(HERE.glob("facts/*.cpp")), into)


def ask(program: Path, *, linked: bool) -> dict[str, str]:
    """What one device, or the first of two linked ones, does: by fact."""
    options = ["--linked"] if linked else []
    names = ["rxe0", "rdma0", *(["rxe1"] if linked else [])]
    command = [RUN, "-t", "280", *options, program, *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts = map(json.loads, done.stdout.splitlines())
    return {fact["fact"]: fact["seen"] for fact in facts}


def _prepared() -> Path:
    root = subprocess.run([RUN, "--print-root"], capture_output=True, text=True, check=True)
    return Path(root.stdout.strip()).parent


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = build_facts(Path(folder))
        manifest = json.loads((_prepared() / "manifest.json").read_text())
        record = {
            "command": "tests/rdma_vm/vm_facts.py " + str(out),
            "kernel": manifest["packages"][f"linux-image-{manifest['kernel']}"],
            "rdma_core": manifest["packages"]["libibverbs1"],
            "qemu": manifest["packages"]["qemu-system-x86"],
            "one_device": ask(program, linked=False),
            "two_linked_devices": ask(program, linked=True),
        }
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
