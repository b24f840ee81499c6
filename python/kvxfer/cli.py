# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The `kvxfer` command. Each subcommand lives in its own module and is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from kvxfer import __version__
from kvxfer.errors import KvxferError

__all__ = ["main"]


@dataclass(frozen=True)
class Command:
    """A module with ``add_arguments(parser)`` and ``run(args) -> int``."""

    module: str
    help: str
    extra: str | None = None  # the optional dependency that brings what the module imports


COMMANDS = {
    "doctor": Command("kvxfer.doctor", "what works on this machine, what does not, and why"),
    "serve": Command("kvxfer.server.launch", "router and workers in one command", "server"),
    "router": Command("kvxfer.server.router", "the front and the router over workers", "server"),
    "worker": Command(
        "kvxfer.server.worker", "one worker: prefill, decode or both phases", "server"
    ),
    "bench": Command("kvxfer.bench", "measures this machine, each number beside a bound"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status. Errors meant for the user are one line, not a trace."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="kvxfer",
        description="Move the KV cache, and attend over it where it lands.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvxfer {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False
        )
        if name == chosen:
            try:
                module = importlib.import_module(command.module)
            except ModuleNotFoundError as error:
                if command.extra is None or (error.name or "").startswith("kvxfer"):
                    raise
                print(
                    f"kvxfer {name}: the Python package '{error.name}' is not installed. "
                    f"Install it from the checkout with: pip install '.[{command.extra}]'",
                    file=sys.stderr,
                )
                return 2
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except KvxferError as error:
        print(f"kvxfer {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
