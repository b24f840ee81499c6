# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""`kvxfer router`: the OpenAI front over a pool of workers. Holds no KV cache and imports no torch.

A request is one attempt, or two: any retryable failure, at any time, starts another on other workers where
possible, from the ids already sent (progress.py), and the client sees one answer. What fails before the
first token is an HTTP status.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

import httpx
from fastapi import FastAPI

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.aggregate import RouterMetrics
from kvxfer.server.child import bind, serve_app
from kvxfer.server.config import load_config
from kvxfer.server.failures import AttemptFailedError
from kvxfer.server.http import create_app
from kvxfer.server.legs import Attempt
from kvxfer.server.membership import add_worker_routes
from kvxfer.server.pool import POLICIES, Pool
from kvxfer.server.progress import Progress
from kvxfer.server.tasks import Background
from kvxfer.server.text import Text
from kvxfer.server.wire import (
    ErrorEvent,
    RequestRefusedError,
    TokenEvent,
    TokenRequest,
    Tokens,
    Usage,
)

__all__ = ["PoolBackend", "add_arguments", "build_app", "make_client", "run"]

log = logging.getLogger(__name__)
_KEEP_IDLE_S = (
    2.0  # less than any server keeps an idle connection, so that none is reused as it closes
)


class PoolBackend:
    """`wire.Backend` over a pool of workers."""

    def __init__(
        self,
        pool: Pool,
        client: httpx.AsyncClient,
        *,
        max_model_len: int,
        eos_token_ids: Sequence[int] = (),
        max_retries: int = 1,
        retry_wait_s: float = 4.0,
        beat_timeout_s: float = 3.0,
    ) -> None:
        """``retry_wait_s``: how long a retry waits for a worker to come up, if none is left."""
        self.pool = pool
        self.metrics_of = RouterMetrics(pool, client)
        self.background = Background()
        self._client = client
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_retries = max_retries
        self._retry_wait_s = retry_wait_s
        self._beat_timeout_s = beat_timeout_s

    @property
    def max_model_len(self) -> int:
        return self.pool.max_model_len or self._max_model_len

    def ready(self) -> tuple[bool, str]:
        if self.pool.draining:
            return False, "the router is draining"
        usable = self.pool.pick() is not None
        return usable, "" if usable else self.pool.why_none()

    def metrics(self) -> bytes:
        return self.metrics_of.render()

    async def close(self) -> None:
        await self.background.close()
        await self.pool.close()
        await self._client.aclose()

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenEvent, None]:
        begin = time.monotonic()
        last: dict[int, float] = {}  # choice -> when its last token passed here
        async with contextlib.aclosing(self._answer(request)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    now = time.monotonic()
                    if not last:
                        self.metrics_of.first_token.observe(now - begin)
                    if event.i in last:
                        self.metrics_of.between_tokens.observe(now - last[event.i])
                    last[event.i] = now
                elif isinstance(event, Usage):
                    self.metrics_of.whole.observe(time.monotonic() - begin)
                yield event

    async def _answer(self, request: TokenRequest) -> AsyncGenerator[TokenEvent, None]:
        if self.pool.draining:
            raise RequestRefusedError(
                503, "the router is draining", code="draining", retry_after_s=5.0
            )
        end = time.monotonic() + request.deadline_s
        progress = Progress(request, self._eos_token_ids)
        failed: dict[str, AttemptFailedError] = {}
        retries_left = self._max_retries
        while True:
            wait_s = min(self._retry_wait_s, end - time.monotonic()) if failed else 0.0
            pair = await self.pool.pick_within(failed, wait_s)
            if pair is None:
                failure = AttemptFailedError("no_worker", self.pool.why_none(), retryable=False)
                break
            attempt = Attempt(
                self._client,
                self.pool,
                self.background,
                progress.next_attempt(end - time.monotonic()),
                pair,
                beat_timeout_s=self._beat_timeout_s,
            )
            try:
                async with contextlib.aclosing(attempt.events()) as events:
                    async for event in events:
                        passed = progress.take(event)
                        if passed is not None:
                            yield passed
                        if isinstance(event, Usage):
                            return
                raise AssertionError("an attempt ends with usage or an error")
            except AttemptFailedError as error:
                failure = error
            ending = list(progress.complete())
            if ending:  # the last id was sent, only the word that it was the last got lost
                for event in ending:
                    yield event
                return
            failed |= {view.id: failure for view in failure.culprits}
            may_retry = failure.retryable and retries_left > 0 and time.monotonic() < end
            if not may_retry or self._is_full(failure, failed):
                break
            retries_left -= 1
            self.metrics_of.retries.inc()
            log.warning(
                "request %s: %s; retrying after %d tokens",
                request.request_id,
                failure.message,
                progress.num_sent,
            )
        if progress.num_sent == 0 and failure.refusal is not None:
            raise failure.refusal
        if progress.num_sent == 0 and failure.code == "no_worker" and not failed:
            raise RequestRefusedError(503, failure.message, code="no_worker", retry_after_s=2.0)
        first = next(iter(failed.values()), failure)
        why = "" if first is failure else f"; after: {first.message}"
        yield ErrorEvent(code=failure.code, message=failure.message + why, retryable=False)

    def _is_full(self, failure: AttemptFailedError, failed: dict[str, AttemptFailedError]) -> bool:
        """A worker refused and nobody could take its place: the client should come back, not pile on."""
        if failure.refusal is None or failure.refusal.status != 503:
            return False
        roles = {view.role for view in failure.culprits}
        others = (v for v in self.pool.views if v.usable and v.role in roles and v.id not in failed)
        draining = any(not view.usable for view in failure.culprits)
        return next(others, None) is None and not draining


def make_client(secret: str) -> httpx.AsyncClient:
    """The client for workers: as many connections as there are legs, none through a proxy."""
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {secret}"},
        limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_IDLE_S),
        trust_env=False,
    )


def build_app(
    backend: PoolBackend,
    text: Text,
    served_model_names: Sequence[str],
    *,
    secret: str,
    workers: Sequence[str] = (),
    request_timeout_s: float = 600.0,
) -> FastAPI:
    """The front over the pool, with the routes that change its members (guarded by the secret)."""
    pool = backend.pool

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for url in workers:
            await pool.add(url)
        yield
        await backend.close()

    app = create_app(
        backend,
        text,
        served_model_names,
        metrics=backend.metrics_of.render_all,
        request_timeout_s=request_timeout_s,
        lifespan=lifespan,
    )
    add_worker_routes(app, pool, secret)
    return app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_dir", type=Path, metavar="MODEL_DIR", help="tokenizer and config are read"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--worker", action="append", default=[], metavar="URL", help="repeatable")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="least_loaded")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the directory's name")
    parser.add_argument("--request-timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS")
    # From the launcher: the socket it listens on already, and how to tell one another's state.
    for name in ("--listen-fd", "--announce-fd", "--lifeline-fd"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every poll
    secret = os.environ.get("KVXFER_SECRET", "")
    if not secret:
        raise InvalidArgumentError(
            "KVXFER_SECRET is not set; the router and its workers share it: "
            "export KVXFER_SECRET=$(openssl rand -hex 32) for all of them"
        )
    config = load_config(args.model_dir)
    text = Text.load(args.model_dir, vocab_size=config.vocab_size)
    name = args.served_model_name or args.model_dir.resolve().name
    if args.listen_fd is None:
        sock = bind(args.host, args.port)
    else:
        sock = socket.socket(fileno=args.listen_fd)
    client = make_client(secret)
    pool = Pool(client, POLICIES[args.policy])
    backend = PoolBackend(
        pool, client, max_model_len=config.max_model_len, eos_token_ids=config.eos_token_ids
    )
    app = build_app(
        backend,
        text,
        [name],
        secret=secret,
        workers=args.worker,
        request_timeout_s=args.request_timeout,
    )

    def drain() -> None:
        pool.draining = True

    return serve_app(
        app,
        sock,
        shutdown_timeout_s=args.shutdown_timeout,
        on_drain=drain,
        announcement={"pid": os.getpid(), "role": "router"},
        announce_fd=args.announce_fd,
        lifeline_fd=args.lifeline_fd,
    )
