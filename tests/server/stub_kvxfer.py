# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer` with workers that have no model, for the launcher's tests. Faults come from the environment.

STUB_FAIL and STUB_HANG name a role that fails, or never becomes ready, at its start. STUB_GATE names a
file: answers stop after two tokens until it is there.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
import threading
from pathlib import Path

from fake_workers import FakeWorker

from kvxfer.errors import KvxferError
from kvxfer.server.child import bind, serve_app

MODULES = {"serve": "kvxfer.server.launch", "router": "kvxfer.server.router"}


class FileGate(asyncio.Event):
    """Open when a file is there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    async def wait(self) -> bool:  # type: ignore[override]
        while not self.path.exists():
            await asyncio.sleep(0.01)
        return True


def worker(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--role")
    parser.add_argument("--threads", type=int)
    for name in ("--announce-fd", "--lifeline-fd"):
        parser.add_argument(name, type=int)
    args, _ = parser.parse_known_args(argv)
    print(f"loading with {args.threads} threads")
    if os.environ.get("STUB_FAIL") == args.role:
        print("the weights are nowhere to be found")
        return 3
    if os.environ.get("STUB_HANG") == args.role:
        threading.Event().wait()
    fake = FakeWorker(args.role)
    fake.incarnation = f"{os.getpid():032x}"
    if "STUB_GATE" in os.environ:
        fake.gate = FileGate(Path(os.environ["STUB_GATE"]))
    sock = bind("127.0.0.1", 0)
    fake.url = "http://{}:{}".format(*sock.getsockname())
    return serve_app(
        fake._app(),
        sock,
        shutdown_timeout_s=5,
        on_drain=lambda: None,
        announcement={"url": fake.url, "role": args.role, "pid": os.getpid()},
        announce_fd=args.announce_fd,
        lifeline_fd=args.lifeline_fd,
    )


def main(argv: list[str]) -> int:
    command, *rest = argv
    if command == "worker":
        return worker(rest)
    parser = argparse.ArgumentParser()
    module = importlib.import_module(MODULES[command])  # workers need neither, and start sooner
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    try:
        if command == "serve":
            return int(module.run(args, program=(sys.executable, __file__)))
        return int(module.run(args))
    except KvxferError as error:
        print(f"kvxfer {command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
