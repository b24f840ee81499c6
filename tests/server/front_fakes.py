# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What the front's tests share: small tokenizers built on the spot, a deterministic backend, a server on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn
from starlette.types import ASGIApp
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kvxfer.server.wire import Finish, Queued, Reserved, TokenEvent, TokenRequest, Tokens, Usage

Script = Callable[[TokenRequest], AsyncIterator[TokenEvent]]

CORPUS = [
    "def main(argv):\n    return argv  # the end\n",
    "class Café:\n    naïve = 'façade — 42 €'\n",
    "print('hello world'); print('hello, world!')\n",
    "日本語のテキスト и немного кириллицы 🙂🙃\n",
]
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE, as Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Words with a leading mark for the space and bytes for the rest, as Llama 2 and Mistral have it."""
    words = ["▁", "▁def", "▁main", "▁hello", "▁world", "h", "e", "l", "o", "▁x", "x", "=", "!"]
    entries = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


BYTE_LEVEL = byte_level_tokenizer()
LETTERS = [BYTE_LEVEL.token_to_id(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]


def answer_ids(request: TokenRequest, choice: int) -> list[int]:
    """What the fake backend answers, and what a test expects of it: letters, by prompt, seed and choice."""
    start = sum(request.prompt[: len(request.prompt) - request.position0]) + choice
    total = request.position0 + request.sampling.max_tokens
    letters = [LETTERS[(start + 7 * k) % len(LETTERS)] for k in range(total)]
    return letters[request.position0 :]


class FakeBackend:
    """A deterministic Backend. ``script`` replaces the events of its answers; ``closed`` counts its ends."""

    def __init__(self, script: Script | None = None, max_model_len: int = 64) -> None:
        self.script = script or self.plain
        self.max_model_len = max_model_len
        self.requests: list[TokenRequest] = []
        self.closed = threading.Semaphore(0)
        self.is_ready = (True, "")

    async def plain(self, request: TokenRequest) -> AsyncIterator[TokenEvent]:
        yield Queued()
        yield Reserved(cached_tokens=3)
        n, count = request.sampling.n, request.sampling.max_tokens
        for position in range(count):
            for i in range(n):
                yield Tokens(i=i, ids=(answer_ids(request, i)[position],), pos=position)
        for i in range(n):
            yield Finish(i=i, reason="length")
        yield Usage(prompt_tokens=len(request.prompt), completion_tokens=n * count, cached_tokens=2)

    async def generate(self, request: TokenRequest) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        try:
            async for event in self.script(request):
                yield event
        finally:
            self.closed.release()

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def metrics(self) -> bytes:
        return b"fake 1\n"


@contextlib.contextmanager
def serving(app: ASGIApp, *, sock: socket.socket | None = None) -> Iterator[str]:
    """The app on loopback, by uvicorn on a thread; yields its URL."""
    if sock is None:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def startup_then_tell(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = startup_then_tell  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    host, port = sock.getsockname()
    thread.start()
    assert started.wait(20), "the server did not start"
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive(), "the server did not stop"
