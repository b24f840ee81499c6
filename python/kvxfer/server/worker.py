# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer worker`: one process with a model, a paged cache and a transfer engine, in one of three roles.

``prefill`` computes prompts for others, ``decode`` takes them over and answers, ``both`` does all by
itself. One class of worker: the role only says which legs it takes. Alone it is an OpenAI server too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from kvxfer.connector import Endpoint
from kvxfer.errors import InvalidArgumentError
from kvxfer.layout import KVLayout
from kvxfer.server.admission import Identity
from kvxfer.server.backend import EngineBackend, Outlet
from kvxfer.server.child import bind, serve_app
from kvxfer.server.config import ModelConfig, load_config, model_identity
from kvxfer.server.engine.blocks import BlockPool
from kvxfer.server.engine.loop import EngineLoop
from kvxfer.server.engine.runner import Runner, torch_views
from kvxfer.server.engine.scheduler import Scheduler
from kvxfer.server.engine.sequence import Limits
from kvxfer.server.http import create_app
from kvxfer.server.internal import add_internal_routes
from kvxfer.server.metrics import Metrics
from kvxfer.server.model import CausalLM
from kvxfer.server.text import Text
from kvxfer.server.weights import load_weights, parse_dtype
from kvxfer.transfer import TransferEngine
from kvxfer.transfer.secret import user_secret

__all__ = ["Worker", "add_arguments", "run"]

log = logging.getLogger(__name__)
_LAST_WORDS_S = 2.0  # for errors to reach their clients after the drain was cut short
_MIN_CACHE_TOKENS = 32768
_MAX_CACHE_NBYTES = 4 << 30  # unless --num-blocks says otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--role", choices=("prefill", "decode", "both"), default="both")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--engine-listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--transports", help="comma-separated, best first; default: all viable")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "auto"), default="float32"
    )
    parser.add_argument("--num-blocks", type=int, help="of the cache; default: twice the context")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="of one step")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, help="default: what model and cache allow")
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests, then 503")
    parser.add_argument("--threads", type=int, help="of the model; default: all cores")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the directory's name")
    parser.add_argument("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS")
    for name in ("--announce-fd", "--lifeline-fd"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)


def cache_size(args: argparse.Namespace, cfg: ModelConfig, token_nbytes: int) -> tuple[int, int]:
    """Number of blocks, and the longest sequence served."""
    size = args.block_size
    if size < 1:
        raise InvalidArgumentError(f"--block-size must be at least 1, not {size}")
    num_blocks = args.num_blocks
    if num_blocks is None:
        wanted = max(2 * (args.max_model_len or cfg.max_model_len), _MIN_CACHE_TOKENS)
        num_blocks = max(1, min(wanted, _MAX_CACHE_NBYTES // token_nbytes) // size)
    fits = min(cfg.max_model_len, num_blocks * size)
    max_model_len = fits if args.max_model_len is None else args.max_model_len
    if not 1 <= max_model_len <= fits:
        raise InvalidArgumentError(
            f"--max-model-len {max_model_len} must be from 1 to {fits}: the model's positions end at "
            f"{cfg.max_model_len}, and {num_blocks} blocks of {size} hold {num_blocks * size} tokens"
        )
    if max_model_len < cfg.max_model_len and args.max_model_len is None:
        log.warning(
            "the context is %d tokens, not the model's %d: %d blocks hold no more; see --num-blocks",
            max_model_len,
            cfg.max_model_len,
            num_blocks,
        )
    return num_blocks, max_model_len


def check_secret(host: str, secret: str | None) -> None:
    """Whoever can reach the engine or /internal needs more than this user's cookie, off this machine."""
    if secret:
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost":
        raise InvalidArgumentError(
            f"--host {host} is not a loopback address and KVXFER_SECRET is not set: "
            "export KVXFER_SECRET=$(openssl rand -hex 32) for this worker and its router"
        )


@dataclass
class Worker:
    """The assembled parts of one process. ``close`` ends them in the order of their dependence."""

    engine: TransferEngine
    loop: EngineLoop
    backend: EngineBackend
    outlet: Outlet
    app: FastAPI
    failed: bool = False

    @classmethod
    def build(cls, args: argparse.Namespace, secret: str | None) -> Worker:
        cfg = load_config(args.model_dir)
        dtype = parse_dtype(args.dtype, cfg)
        dtype_name = str(dtype).removeprefix("torch.")
        token_nbytes = cfg.num_layers * 2 * cfg.num_kv_heads * cfg.head_dim * dtype.itemsize
        num_blocks, max_model_len = cache_size(args, cfg, token_nbytes)
        limits = Limits(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        text = Text.load(args.model_dir, vocab_size=cfg.vocab_size)
        model = CausalLM(cfg, load_weights(args.model_dir, cfg, dtype), dtype)
        layout = KVLayout.hnd(
            num_layers=cfg.num_layers,
            num_blocks=num_blocks,
            block_size=args.block_size,
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            dtype=dtype_name,
        )
        transports = tuple(args.transports.split(",")) if args.transports else None
        name = f"{args.role}-{os.getpid()}"
        engine = TransferEngine(
            name, listen=args.engine_listen, transports=transports, secret=secret
        )
        try:
            region = engine.allocate(layout.nbytes, name="kv", require_lease=True)
            region.wait_registered()  # a pool that cannot be reached is no worker
            model_id = model_identity(args.model_dir, cfg, dtype)
            endpoint = Endpoint(engine, region, layout, model_id=model_id)
            views = torch_views(layout.views(region.array), dtype)
            num_threads = args.threads or os.cpu_count() or 1
            runner = Runner(model, views, args.block_size, num_threads=num_threads)
            scheduler = Scheduler(
                BlockPool(num_blocks, args.block_size),
                limits,
                eos_ids=cfg.eos_token_ids,
                copy_block=runner.copy_block,
            )
            outlet, metrics = Outlet(), Metrics()
            loop = EngineLoop(
                scheduler,
                runner,
                endpoint,
                engine.fileno(),
                metrics,
                eos_ids=cfg.eos_token_ids,
                deliver=outlet.deliver,
                on_idle=outlet.on_idle,
                on_death=lambda: os.kill(os.getpid(), signal.SIGTERM),
            )
            metrics.read_from(lambda: loop.snapshot, engine.stats)
            identity = Identity(
                role=args.role,
                incarnation=engine.incarnation,
                engine=engine.address,
                signature=str(layout.signature()["digest"]),
                model=model_id,
                served_model_name=args.served_model_name or args.model_dir.resolve().name,
                max_model_len=max_model_len,
                max_num_seqs=limits.max_num_seqs,
                max_waiting=args.max_waiting,
                max_waiting_tokens=limits.max_waiting_tokens,
                vocab_size=cfg.vocab_size,
                num_blocks=num_blocks,
                block_size=args.block_size,
            )
            backend = EngineBackend(loop, outlet, identity, metrics)
        except BaseException:
            engine.close()
            raise
        worker = cls(engine, loop, backend, outlet, FastAPI())
        worker.app = create_app(
            backend, text, [identity.served_model_name], lifespan=worker.lifespan
        )
        # Without a secret the engines share the user's cookie, and so do the routes: other users of this
        # machine reach a loopback port too.
        add_internal_routes(worker.app, backend, secret or user_secret().hex())
        return worker

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.outlet.attach()
        self.loop.start()
        try:
            yield
        finally:
            self.failed = not self.loop.alive
            await asyncio.to_thread(self.loop.close)
            await asyncio.to_thread(self.engine.close)

    def drain(self) -> None:
        self.backend.draining = True

    async def drained(self, timeout_s: float) -> None:
        """Running work finishes; what does not in time ends with an error that the router may retry."""
        try:
            await asyncio.wait_for(self.backend.until_idle(), timeout_s)
        except asyncio.TimeoutError:
            self.loop.fail_all("draining", f"the worker shut down and waited {timeout_s:g} s")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.backend.until_idle(), _LAST_WORDS_S)


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    secret = os.environ.get("KVXFER_SECRET") or None
    check_secret(args.host, secret)
    sock = bind(args.host, args.port)
    worker = Worker.build(args, secret)
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    log.info("%s worker at %s, engine at %s", args.role, url, worker.engine.address)
    status = serve_app(
        worker.app,
        sock,
        shutdown_timeout_s=args.shutdown_timeout + 2 * _LAST_WORDS_S,
        on_drain=worker.drain,
        drained=lambda: worker.drained(args.shutdown_timeout),
        announcement={
            "url": url,
            "role": args.role,
            "pid": os.getpid(),
            "incarnation": worker.engine.incarnation,
        },
        announce_fd=args.announce_fd,
        lifeline_fd=args.lifeline_fd,
    )
    return status or int(worker.failed)
