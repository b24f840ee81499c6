# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What is said when native code does not take an argument: pybind11's own text prints every argument, secrets too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kvxfer._transfer import Peer
from kvxfer.errors import InvalidArgumentError

__all__ = ["checked", "peer_of", "refusal"]

_OURS = ("self", "error")
Method = TypeVar("Method", bound=Callable[..., Any])


def _shown(value: object) -> str:
    """Numbers and None by value, all else by type: it may be a secret, a token, or long."""
    return repr(value) if value is None or isinstance(value, int | float) else type(value).__name__


def refusal(what: str, error: TypeError, given: Mapping[str, object]) -> Exception:
    """What to raise instead of ``error``, which a native call has raised; itself where it is not pybind11's.

    ``given``: the caller's arguments; its ``locals()`` will do.
    """
    if "incompatible" not in str(error):
        return error
    shown = ", ".join(
        f"{name}={_shown(value)}" for name, value in given.items() if name not in _OURS
    )
    return InvalidArgumentError(
        f"{what}(): an argument is of another type, or out of its type's range: {shown}"
    )


def checked(method: Method) -> Method:
    """The method, with :func:`refusal` for what native code does not take. Not for calls that must be fast."""

    @functools.wraps(method)
    def call(self: object, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except TypeError as error:
            names = method.__code__.co_varnames[1:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            raise refusal(method.__name__, error, given) from None

    return call  # type: ignore[return-value]


def peer_of(value: object) -> Peer:
    """The peer, or a reason."""
    if isinstance(value, Peer):
        return value
    raise InvalidArgumentError(
        f"peer must be a Peer, as engine.connect() returns it, not {type(value).__name__}"
    )
