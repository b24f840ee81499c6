# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What crosses between the server's processes: requests in token ids, events out (JSON, one per line).

Text never crosses: tokenizing, stop strings and UTF-8 live in the front. Times are durations, because
no absolute clock is shared. Unknown fields are ignored, so that either side may be the newer one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

__all__ = [
    "Backend",
    "Beat",
    "ErrorEvent",
    "Finish",
    "KVTransferParams",
    "PeerRef",
    "PrefillReply",
    "Queued",
    "RequestRefusedError",
    "Reserved",
    "SamplingParams",
    "TokenEvent",
    "TokenRequest",
    "Tokens",
    "Usage",
    "WorkerState",
    "decode_event",
    "encode_event",
]

WIRE_VERSION = 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. Stateless: token at position p of choice i depends on (seed, p, i) alone."""

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own eos ids


class PeerRef(msgspec.Struct, frozen=True, kw_only=True):
    """The other leg's worker: its engine, as /internal/state showed it."""

    engine: str  # "host:port"
    incarnation: str
    signature: str  # digest of its KVLayout
    model: str  # model identity


class KVTransferParams(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["prefill", "decode"]
    peer: PeerRef
    mode: Literal["push"] = "push"


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One leg of one attempt at a request."""

    request_id: str
    handoff: str  # 32 hex digits, fresh for each attempt
    deadline_s: float
    prompt: tuple[int, ...]
    sampling: SamplingParams
    v: int = WIRE_VERSION
    attempt: int = 1
    # Of ``prompt``, how many trailing ids are answers of an earlier attempt, already sent to the client:
    # they count as output for penalties and for the sampler's position, not as prompt for usage.
    position0: int = 0
    cache_salt: str = ""
    kv_transfer_params: KVTransferParams | None = None  # None: this worker does both phases
    traceparent: str | None = None


class Queued(msgspec.Struct, frozen=True, tag_field="e", tag="queued"):
    pass


class Beat(msgspec.Struct, frozen=True, tag_field="e", tag="beat"):
    """Each second until the first token; three missed ones mean that the worker is lost."""


class Reserved(msgspec.Struct, frozen=True, tag_field="e", tag="reserved"):
    cached_tokens: int = 0


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag_field="e", tag="tokens"):
    i: int  # choice
    ids: tuple[int, ...]
    pos: int  # index of the first id among this choice's answers of this leg


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag_field="e", tag="finish"):
    i: int
    reason: Literal["stop", "length", "abort"]


class Usage(msgspec.Struct, frozen=True, kw_only=True, tag_field="e", tag="usage"):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    timeline: dict[str, float] = {}  # stage -> seconds since this leg was received


class ErrorEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="e", tag="error"):
    """Ends the stream. ``code``: peer_lost, expired, write_failed, refused, internal, deadline, draining."""

    code: str
    message: str
    retryable: bool


TokenEvent = Queued | Beat | Reserved | Tokens | Finish | Usage | ErrorEvent


class PrefillReply(msgspec.Struct, frozen=True, kw_only=True):
    """The prefill leg's one answer, at its end."""

    status: Literal["handed_off", "declined", "aborted", "failed"]
    code: str = ""
    message: str = ""
    retryable: bool = False
    cached_tokens: int = 0
    timeline: dict[str, float] = {}


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /internal/state``, polled by the router."""

    role: Literal["prefill", "decode", "both"]
    incarnation: str
    engine: str  # address of the transfer engine
    signature: str
    model: str  # identity of weights and config: equal or no handoff
    served_model_name: str
    max_model_len: int
    free: int
    cached: int
    active: int
    leased: int
    total: int
    running: int
    waiting: int
    waiting_tokens: int = 0
    draining: bool = False
    ready: bool = True


class RequestRefusedError(Exception):
    """A backend refuses before the first event: an HTTP status with OpenAI's error fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class Backend(Protocol):
    """What the OpenAI front stands on: the router's pool of workers, or one worker's own engine."""

    @property
    def max_model_len(self) -> int: ...

    def generate(self, request: TokenRequest) -> AsyncIterator[TokenEvent]:
        """Yields events until Usage (good end) or ErrorEvent. Raises RequestRefusedError before the first.

        Closing the iterator cancels the request everywhere.
        """
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether a request could be served now, and why not."""
        ...

    def metrics(self) -> bytes: ...


_ENCODER = msgspec.json.Encoder()
_EVENT = msgspec.json.Decoder(TokenEvent)


def encode_event(event: TokenEvent) -> bytes:
    """One NDJSON line, newline included."""
    return _ENCODER.encode(event) + b"\n"


def decode_event(line: bytes) -> TokenEvent:
    """Raises ``msgspec.ValidationError`` for anything that is not an event."""
    event: TokenEvent = _EVENT.decode(line)
    return event
