# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What ``pydoc`` and an editor show of the transfer engine: every public name says what it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S

from kvxfer import _transfer, transfer
from kvxfer.transfer import TransferEngine

INTERNAL = ("Engine", "TransportConfig")  # kvxfer.TransferEngine and EngineConfig are their faces
CLASSES = {
    f"{each.__module__}.{each.__name__}": each
    for module in (transfer, _transfer)
    for name, each in vars(module).items()
    if inspect.isclass(each) and not name.startswith("_") and name not in INTERNAL
}


def said(doc: str | None) -> str:
    """A docstring without the signature that pybind11 puts before it."""
    lines = (doc or "").splitlines()
    if lines and "->" in lines[0]:
        lines = lines[1:]
    return "\n".join(lines).strip()


def members(owner: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(owner).items():
        is_code = callable(member) or hasattr(type(member), "__get__")
        if is_code and (not name.startswith("_") or name == "__await__"):
            yield name, member


def test_the_list_of_classes_is_whole() -> None:
    names = {name.rsplit(".", 1)[1] for name in CLASSES}
    assert names >= {"Transfer", "Peer", "RemoteRegion", "BlockView", "Signal", "Region", "Lease"}
    assert names >= {each for each in transfer.__all__ if inspect.isclass(getattr(transfer, each))}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_and_all_that_it_offers_have_docstrings(name: str) -> None:
    owner = CLASSES[name]
    assert said(owner.__doc__), f"{name} has no docstring"
    silent = [each for each, member in members(owner) if not said(inspect.getdoc(member))]
    assert silent == [], f"of {name} these have no docstring: {silent}"


def test_functions_have_docstrings() -> None:
    for name in transfer.__all__:
        value = getattr(transfer, name)
        if callable(value):
            assert said(value.__doc__), f"{name} has no docstring"


def keys(node: object, names: tuple[str, ...] = ()) -> Iterator[str]:
    """All keys of ``stats()`` that are fixed words."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if names[-1:] in (("peers",), ("transport",), ("refused",)):
            yield from keys(value, (*names, "*"))  # incarnations, transports and reasons
        else:
            yield key
            yield from keys(value, (*names, key))


def test_every_key_of_stats_is_explained() -> None:
    with TransferEngine("a", secret=SECRET) as a, TransferEngine("b", secret=SECRET) as b:
        b.allocate(4096, "kv")
        region = a.register(np.zeros(4096, np.uint8))
        a.write(region, a.connect(b.address).regions["kv"], 0, 0, 4096).wait(TIMEOUT_S)
        found = set(keys(a.stats()))
    assert {"unquiesced", "bytes_sunk", "alive", "age_s"} <= found
    doc = TransferEngine.stats.__doc__ or ""
    assert [key for key in sorted(found) if f"``{key}``" not in doc and f'"{key}"' not in doc] == []
