# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Errors cross processes: each class survives pickling and copying with its message and what it carries."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from kvxfer import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]
FIELDS: dict[str, Any] = {
    "transport": "tcp",
    "peer": "b",
    "errno": 104,
    "span": 3,
    "nbytes_done": 4096,
}


def made(cls: type[errors.KvxferError]) -> errors.KvxferError:
    if issubclass(cls, errors.LayoutError):
        error: errors.KvxferError = cls("head_dim", "source 6, destination 7")
    elif issubclass(cls, errors.UnavailableError):
        error = cls("no such device", reason="no driver")
    else:
        error = cls("what happened")
    for name, value in FIELDS.items():
        setattr(error, name, value)
    error.note = "set by a caller"  # type: ignore[attr-defined]
    return error


def pickled(error: Any) -> Any:
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("again", [pickled, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives(cls: type[errors.KvxferError], again: Callable[[Any], Any]) -> None:
    error = made(cls)
    other = again(error)
    assert type(other) is cls
    assert other is not error
    assert str(other) == str(error)
    assert other.args == error.args
    for name in (*FIELDS, "note", "field", "reason"):
        assert getattr(other, name, None) == getattr(error, name, None)


def test_what_native_code_throws_survives() -> None:
    kernels = pytest.importorskip("kvxfer._kernels_cpu")
    with pytest.raises(errors.InvalidArgumentError) as caught:
        kernels.set_num_threads(0)
    assert str(pickled(caught.value)) == str(caught.value)
