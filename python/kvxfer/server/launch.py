# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer serve`: router and workers in one command. Shows progress, respawns who dies, stops all in order.

The launcher holds the listening socket, so a port in use is known before anything is spawned, and clients
that connect while a dead router is being replaced wait instead of being refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.child import bind
from kvxfer.server.config import load_config
from kvxfer.server.pool import POLICIES
from kvxfer.server.safetensors_header import read_header, weight_files
from kvxfer.server.supervisor import Plan, Supervisor
from kvxfer.server.text import Text

__all__ = ["add_arguments", "run"]

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-python-llama"
# Passed on to each worker when given.
_WORKER_OPTIONS = (
    "dtype",
    "transports",
    "num_blocks",
    "block_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_model_len",
)
KVXFER = (sys.executable, "-m", "kvxfer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_dir",
        type=Path,
        nargs="?",
        default=BUNDLED_MODEL,
        metavar="MODEL_DIR",
        help="a Hugging Face model directory; default: the bundled model",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode workers")
    parser.add_argument(
        "--role",
        choices=["both"],
        help="workers that do both phases, without handoff: the baseline",
    )
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="with --role both")
    parser.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        default="least_loaded",
        help="how the router picks workers; default: least_loaded",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the directory's name")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="of weights and KV cache; auto: as the checkpoint says; default: float32",
    )
    parser.add_argument(
        "--transports", metavar="LIST", help="e.g. shm,tcp; default: the best viable"
    )
    parser.add_argument("--num-blocks", type=int, metavar="N", help="KV blocks per worker")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens per block")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="computed per step; default: 512"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="running at once per worker; default: 64"
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer; default: what model and cache allow",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="per worker; default: a fair share"
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="of one request, default: 600",
    )
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="of one part, default: 300",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for running answers to end, default: 30",
    )


def run(args: argparse.Namespace, *, program: Sequence[str] = KVXFER) -> int:
    """``program`` starts `kvxfer` itself; tests put a stand-in there."""
    roles = _roles(args)
    model_dir: Path = args.model_dir
    _check_model(model_dir)
    sock = bind(args.host, args.port)
    cores = len(os.sched_getaffinity(0))
    # Two processes with as many threads as cores each would spin against each other.
    threads = args.threads or max(1, cores // len(roles))
    name = args.served_model_name or model_dir.resolve().name
    common = ["--served-model-name", name, "--shutdown-timeout", f"{args.shutdown_timeout:g}"]
    worker = [*program, "worker", str(model_dir), *common, "--threads", str(threads)]
    worker += ["--host", "127.0.0.1", "--port", "0", "--engine-listen", "127.0.0.1:0"]
    for option in _WORKER_OPTIONS:
        if getattr(args, option) is not None:
            worker += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    router = [*program, "router", str(model_dir), *common, "--listen-fd", str(sock.fileno())]
    router += ["--policy", args.policy, "--request-timeout", f"{args.request_timeout:g}"]
    env = {
        **os.environ,
        "KVXFER_SECRET": os.environ.get("KVXFER_SECRET") or secrets.token_hex(32),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",  # a dying child's last words are needed
    }
    plan = Plan(
        sock=sock,
        workers=tuple((label, (*worker, "--role", role)) for label, role in roles),
        router=tuple(router),
        env=env,
        start_timeout_s=args.start_timeout,
        shutdown_timeout_s=args.shutdown_timeout,
        greeting=_greeting(model_dir, name, _url(sock.getsockname())),
    )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return asyncio.run(Supervisor(plan, console, url=_url(sock.getsockname())).run())


def _roles(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(label, role) of each worker, prefill first: the order in which they are stopped."""
    if args.role == "both":
        counts = {"both": args.num_workers}
    else:
        counts = {"prefill": args.prefill, "decode": args.decode}
    if min(counts.values()) < 0 or counts.get("both", counts.get("decode", 0)) < 1:
        asked = ", ".join(f"{count} {role}" for role, count in counts.items())
        raise InvalidArgumentError(
            f"at least one worker must decode: got {asked}; see --decode, or --role both --num-workers"
        )
    return [(f"{role}-{i}", role) for role, count in counts.items() for i in range(count)]


def _check_model(model_dir: Path) -> None:
    """Whatever can be seen wrong in a second is said before anything is spawned."""
    config = load_config(model_dir)
    for path in weight_files(model_dir):
        read_header(path)
    Text.load(model_dir, vocab_size=config.vocab_size)


def _url(address: tuple[str, int]) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    return f"http://[{host}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"


def _greeting(model_dir: Path, name: str, url: str) -> str:
    prompt: object = "def " if model_dir == BUNDLED_MODEL else "Once upon a time"
    if not (model_dir / "tokenizer.json").is_file():
        prompt = [1, 2, 3]
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 64, "temperature": 0.7})
    return f"Try it:\n\n  curl {url}/v1/completions -H 'Content-Type: application/json' \\\n    -d '{body}'; echo\n"
