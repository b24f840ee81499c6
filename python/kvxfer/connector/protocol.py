# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The handoff's messages, and a codec for them that raises ProtocolError and nothing else on bad bytes.

A message is one engine notification: magic, header length (u32, little-endian), a JSON header, then the
int32 arrays that the header counts, in its order. Each message may be lost, doubled or late.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, NoReturn, get_type_hints

import numpy as np
import numpy.typing as npt

from kvxfer.connector.events import ENDS, End
from kvxfer.errors import KvxferError

__all__ = [
    "MAX_BLOCKS",
    "MAX_LAYOUT_NBYTES",
    "MAX_MESSAGE_NBYTES",
    "MAX_RENEWED",
    "VERSION",
    "Abort",
    "Accept",
    "Commit",
    "Decline",
    "Grant",
    "Message",
    "Offer",
    "ProtocolError",
    "Renew",
    "clip_text",
    "decode",
    "encode",
    "expected_arrivals",
]

VERSION = 1
MAX_MESSAGE_NBYTES = 48 * 1024  # the engine's limit for one notification
MAX_RENEWED = (
    256  # handoffs in each list of one Renew: twice 256 ids of 64 characters fit a notification
)
_FAILURES = tuple(end for end in ENDS if end not in ("accepted", "declined"))
MAX_TOKENS = 1 << 30
# What one grant can carry: a layout of this many bytes as JSON and this many block ids leave 3 KB for the rest.
MAX_LAYOUT_NBYTES = 8192
MAX_BLOCKS = 9400
_MAGIC = b"kvh1"
_HEAD = struct.Struct("<4sI")

Int32Array = npt.NDArray[np.int32]


class ProtocolError(KvxferError):
    """Bytes from a peer that are no message of this protocol, or a message too big to be sent."""


def _bad(name: str, value: object, wanted: str) -> NoReturn:
    raise ProtocolError(f"field {name!r} must be {wanted}, not {str(value)[:80]!r}")


# Each message field is annotated with its check, which also converts from what JSON can hold.
_Check = Callable[[str, Any], Any]


def _text(limit: int, *, least: int = 0) -> _Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= limit:
            _bad(name, value, f"a string of {least} to {limit} characters")
        return value

    return check


def _count(limit: int = MAX_TOKENS, *, least: int = 0) -> _Check:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= limit:  # bool is an int too
            _bad(name, value, f"an integer from {least} to {limit}")
        return value

    return check


def _duration() -> _Check:
    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            _bad(name, value, "a positive, finite number of seconds")
        return float(value)

    return check


def _flag() -> _Check:
    def check(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            _bad(name, value, "true or false")
        return value

    return check


def _bytes(limit: int) -> _Check:
    def check(name: str, value: Any) -> bytes:
        if isinstance(value, str) and len(value) <= 2 * limit:
            try:
                return bytes.fromhex(value)
            except ValueError:
                pass
        _bad(name, value, f"at most {limit} bytes in hex digits")

    return check


def _one_of(names: tuple[str, ...]) -> _Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            _bad(name, value, f"one of {', '.join(names)}")
        return value

    return check


def _object() -> _Check:
    def check(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            _bad(name, value, "an object")
        return value

    return check


def _ids() -> _Check:
    def check(name: str, value: Any) -> tuple[str, ...]:
        if (
            not isinstance(value, list)
            or len(value) > MAX_RENEWED
            or not all(isinstance(item, str) and 0 < len(item) <= 64 for item in value)
        ):
            _bad(name, value, f"a list of at most {MAX_RENEWED} handoff ids")
        return tuple(value)

    return check


_IN_ARRAYS = object()  # marks a field that travels behind the header


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """Fields common to all. ``source`` and ``target`` are incarnations: a restarted process is another one."""

    kind: ClassVar[str] = ""
    handoff: Annotated[str, _text(64)]
    source: Annotated[str, _text(64, least=1)]
    target: Annotated[str, _text(64, least=1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Offer(Message):
    """P to D: I can start soon; reserve blocks. Repeated each beat until answered."""

    kind = "offer"
    num_tokens: Annotated[int, _count(least=1)]
    max_chunks: Annotated[int, _count(least=1)]
    layout: Annotated[dict[str, Any], _object()]
    model: Annotated[str, _text(256)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Grant(Message):
    """D to P: write tokens [token_begin, token_end) into these blocks (listed from token 0) under this lease."""

    kind = "grant"
    token_begin: Annotated[int, _count()]
    token_end: Annotated[int, _count(least=1)]
    max_chunks: Annotated[int, _count(least=1)]
    ttl_s: Annotated[float, _duration()]
    region: Annotated[str, _text(256)]
    lease: Annotated[bytes, _bytes(128)]
    layout: Annotated[dict[str, Any], _object()]
    block_ids: Annotated[Int32Array, _IN_ARRAYS]


@dataclass(frozen=True, kw_only=True, eq=False)
class Decline(Message):
    """D to P: no. ``refused``: the two can never hand off (layout, model); else D computes this one alone."""

    kind = "decline"
    reason: Annotated[str, _text(1024)]
    refused: Annotated[bool, _flag()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Commit(Message):
    """P to D: all layers are posted. May overtake the data; D looks at its set. Repeated until answered."""

    kind = "commit"
    num_tokens: Annotated[int, _count(least=1)]
    cached_tokens: Annotated[int, _count()]
    transport: Annotated[str, _text(64)]
    # Chunk c holds tokens [chunk_ends[c - 1], chunk_ends[c]).
    chunk_ends: Annotated[Int32Array, _IN_ARRAYS]
    first_tokens: Annotated[Int32Array, _IN_ARRAYS]


@dataclass(frozen=True, kw_only=True, eq=False)
class Accept(Message):
    """D to P: ends the repeats of commit. P's blocks do not wait for it."""

    kind = "accept"


@dataclass(frozen=True, kw_only=True, eq=False)
class Abort(Message):
    """Both ways. ``to`` says which machine of the target is meant: a worker may be both."""

    kind = "abort"
    to: Annotated[str, _one_of(("sender", "receiver"))]
    end: Annotated[End, _one_of(_FAILURES)]
    cause: Annotated[str, _text(1024)]
    retryable: Annotated[bool, _flag()]


@dataclass(frozen=True, kw_only=True, eq=False)
class Renew(Message):
    """Both ways, one per peer and beat: the handoffs that the source still works on, by its own role in each."""

    kind = "renew"
    sending: Annotated[tuple[str, ...], _ids()]
    receiving: Annotated[tuple[str, ...], _ids()]


_KINDS: dict[str, type[Message]] = {
    cls.kind: cls for cls in (Offer, Grant, Decline, Commit, Accept, Abort, Renew)
}
# Of each field by name: its check, or None when it travels in the arrays.
_FIELDS: dict[type[Message], dict[str, _Check | None]] = {}
for _cls in _KINDS.values():
    _hints = get_type_hints(_cls, include_extras=True)
    _notes = {item.name: _hints[item.name].__metadata__[0] for item in fields(_cls)}
    _FIELDS[_cls] = {name: None if note is _IN_ARRAYS else note for name, note in _notes.items()}


def clip_text(text: str, limit: int = 1000) -> str:
    """Free text that surely passes the check of its field."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def encode(message: Message) -> bytes:
    """Raises ProtocolError when the message is too big for a notification."""
    header: dict[str, Any] = {"v": VERSION, "kind": message.kind}
    arrays: list[bytes] = []
    for name, check in _FIELDS[type(message)].items():
        value = getattr(message, name)
        if check is None:
            array = np.ascontiguousarray(value, dtype="<i4")
            header[name] = array.size
            arrays.append(array.tobytes())
        else:
            header[name] = value.hex() if isinstance(value, bytes) else value
    # ASCII, so that lone surrogates in a text survive and a character's size is known.
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    payload = b"".join([_HEAD.pack(_MAGIC, len(text)), text, *arrays])
    if len(payload) > MAX_MESSAGE_NBYTES:
        raise ProtocolError(
            f"a {message.kind} of {len(payload)} bytes exceeds the {MAX_MESSAGE_NBYTES} of one notification"
        )
    return payload


def _no_constant(name: str) -> NoReturn:
    raise ProtocolError(f"{name} is no JSON number")


def _header(payload: bytes) -> tuple[dict[str, Any], memoryview]:
    if not _HEAD.size <= len(payload) <= MAX_MESSAGE_NBYTES:
        raise ProtocolError(f"{len(payload)} bytes are no message")
    magic, nbytes = _HEAD.unpack_from(payload)
    if magic != _MAGIC:
        raise ProtocolError(f"magic {magic!r} instead of {_MAGIC!r}")
    end = _HEAD.size + nbytes
    if end > len(payload):
        raise ProtocolError(f"a header of {nbytes} bytes in a message of {len(payload)}")
    try:
        header = json.loads(payload[_HEAD.size : end], parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError("the header is no object")
    return header, memoryview(payload)[end:]


def decode(payload: bytes) -> Message:
    """Raises ProtocolError for everything that ``encode`` cannot have produced; ignores unknown fields."""
    header, rest = _header(payload)
    if header.get("v") != VERSION:
        raise ProtocolError(f"version {str(header.get('v'))[:20]!r}, this side speaks {VERSION}")
    kind = header.get("kind")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown kind {str(kind)[:40]!r}")
    values: dict[str, Any] = {}
    for name, check in _FIELDS[cls].items():
        if name not in header:
            raise ProtocolError(f"a {cls.kind} without {name!r}")
        value = header[name]
        if check is None:
            if type(value) is not int or not 0 <= value <= len(rest) // 4:
                _bad(name, value, f"a count of int32 within {len(rest)} bytes")
            array = np.frombuffer(rest[: 4 * value], dtype="<i4").astype(np.int32)
            array.flags.writeable = False
            values[name] = array
            rest = rest[4 * value :]
        else:
            values[name] = check(name, value)
    if len(rest):
        raise ProtocolError(f"{len(rest)} bytes follow a {cls.kind}")
    return cls(**values)


def expected_arrivals(
    chunk_ends: Int32Array, token_begin: int, token_end: int, num_layers: int
) -> npt.NDArray[np.int64]:
    """The arrival indices (chunk x num_layers + layer) of a handoff: a pure function, so both sides agree.

    A chunk that lies wholly outside the granted tokens sends nothing and is not expected.
    """
    ends = chunk_ends.astype(np.int64)
    begins = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    sends = np.flatnonzero(np.maximum(begins, token_begin) < np.minimum(ends, token_end))
    return (sends[:, None] * num_layers + np.arange(num_layers)).reshape(-1)
