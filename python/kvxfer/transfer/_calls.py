# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What is said when native code does not take an argument: pybind11's own text prints every argument, secrets too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from kvxfer._transfer import BlockView, Peer
from kvxfer.errors import InvalidArgumentError

__all__ = ["checked", "peer_of", "refusal"]

_OURS = ("self", "error")
Method = TypeVar("Method", bound=Callable[..., Any])
Rule = tuple[str, Callable[[Any], bool]]  # what the argument must be, and whether it is


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _whole(value) and 0 <= value < 1 << 64


def _seconds(value: object) -> bool:
    return (_whole(value) or isinstance(value, float | np.floating)) and not isinstance(value, bool)


def _optional(rule: Rule) -> Rule:
    return f"{rule[0]}, or None", lambda value: value is None or rule[1](value)


_COUNT: Rule = ("an int from 0 to 2^64 - 1", _count)
_TEXT: Rule = ("text", lambda value: isinstance(value, str))
_SECONDS: Rule = ("a number of seconds", _seconds)
_BOOL: Rule = ("True or False", lambda value: isinstance(value, bool))
_VIEW: Rule = ("a kvxfer.BlockView", lambda value: isinstance(value, BlockView))
# By the arguments' names, which mean the same everywhere; those that native code explains itself are not here.
_RULES: dict[str, Rule] = {
    "address": _TEXT,
    "arrival": _optional(_COUNT),
    "deadline_s": _optional(_SECONDS),
    "listen": _TEXT,
    "local_view": _VIEW,
    "n": _COUNT,
    "name": _TEXT,
    "num_arrivals": _COUNT,
    "remote_view": _VIEW,
    "require_lease": _BOOL,
    "tag": _COUNT,
    "timeout_s": _optional(_SECONDS),
    "ttl_s": _SECONDS,
}
# What only one method takes so.
_RULES_OF: dict[str, dict[str, Rule]] = {
    "allocate": {"nbytes": _COUNT, "name": _optional(_TEXT)},
    "register": {"name": _optional(_TEXT)},
    "connect": {"timeout_s": _SECONDS},
    "TransferEngine": {
        "transports": (
            "names of transports",
            lambda value: value is None or all(isinstance(each, str) for each in value),
        )
    },
}


def _shown(value: object) -> str:
    """Numbers and None by value, all else by type: it may be a secret, a token, or long."""
    return repr(value) if value is None or isinstance(value, int | float) else type(value).__name__


def refusal(what: str, error: TypeError, given: Mapping[str, object]) -> Exception:
    """What to raise instead of ``error``, which a native call has raised; itself where it is not pybind11's.

    ``given``: the caller's arguments; its ``locals()`` will do.
    """
    if "incompatible" not in str(error):
        return error
    rules = _RULES | _RULES_OF.get(what, {})
    for name, value in given.items():
        if name in rules and not rules[name][1](value):
            return InvalidArgumentError(
                f"{what}(): {name} must be {rules[name][0]}, not {name}={_shown(value)}"
            )
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
