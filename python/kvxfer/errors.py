# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Every exception that kvxfer raises, each also of the built-in kind a caller would expect.

Native code throws these through one translator (csrc/bindings/errors). Each carries what is known of
``transport``, ``peer`` (its name), ``errno``, ``span`` (an index in the caller's arrays) and
``nbytes_done`` (known to have landed); the message says what happened, with which values, and what to do.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BackPressureError",
    "InternalError",
    "InvalidArgumentError",
    "KvxferError",
    "LayoutError",
    "LeaseError",
    "PeerDisconnectedError",
    "RegistrationError",
    "RemoteAccessError",
    "TransferCancelledError",
    "TransferTimeoutError",
    "TransportError",
    "UnavailableError",
]


class KvxferError(Exception):
    """Base of all errors of this package."""

    def __init__(
        self,
        message: str = "",
        *,
        transport: str | None = None,
        peer: str | None = None,
        errno: int | None = None,
        span: int | None = None,
        nbytes_done: int | None = None,
    ) -> None:
        super().__init__(message)
        self.transport = transport
        self.peer = peer
        self.span = span
        self.nbytes_done = nbytes_done
        # OSError descendants define ``errno`` themselves as a writable slot, so this is safe for all.
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors differ, and Exception's own way calls them with ``args``, which is the finished message.
        return _restored, (type(self), self.args, {**self.__dict__, "errno": self.errno})


def _restored(cls: type[KvxferError], args: tuple[Any, ...], fields: dict[str, Any]) -> KvxferError:
    """The error that was pickled or copied."""
    error = cls.__new__(cls)
    error.args = args
    for name, value in fields.items():
        setattr(error, name, value)
    return error


class InvalidArgumentError(KvxferError, ValueError):
    """The caller's mistake: a shape, an offset, a dtype, a closed engine."""


class LayoutError(InvalidArgumentError):
    """Two KV layouts cannot be mapped onto each other, or one contradicts itself; ``field`` names where."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class UnavailableError(KvxferError, RuntimeError):
    """Not built, or no such device or transport here; ``reason`` says why."""

    def __init__(self, message: str = "", *, reason: str | None = None, **fields: object) -> None:
        super().__init__(message, **fields)  # type: ignore[arg-type]
        self.reason = reason if reason is not None else message


class RegistrationError(KvxferError, OSError):
    """Memory could not be allocated, mapped, pinned or registered."""


class TransportError(KvxferError, ConnectionError):
    """A path to a peer failed."""


class PeerDisconnectedError(TransportError):
    """The peer's process or connection ended; every transfer to it has ended with this."""


class RemoteAccessError(TransportError):
    """The peer refused: unknown region, out of bounds, read-only."""


class LeaseError(RemoteAccessError):
    """The transfer's lease is unknown, foreign, expired or revoked; nothing of it was taken."""


class BackPressureError(KvxferError, BlockingIOError):
    """So many transfers to the peer have not ended that no more are taken; nothing of this one was sent."""


class TransferTimeoutError(KvxferError, TimeoutError):
    """The deadline passed first."""


class TransferCancelledError(KvxferError):
    """Ended by ``cancel()`` or by closing the engine."""


class InternalError(KvxferError):
    """A bug of ours: please report it with the message."""
