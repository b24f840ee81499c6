# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A layout as JSON: what two sides compare, and what one sends to the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvxfer.errors import LayoutError
from kvxfer.layout.parts import MAX_LAYERS, KVPart, KVScales

if TYPE_CHECKING:
    from kvxfer.layout.kv_layout import KVLayout

__all__ = ["VERSION", "from_wire", "signature", "to_wire"]

VERSION = 1


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def signature(layout: KVLayout) -> dict[str, Any]:
    """See :meth:`KVLayout.signature`."""
    scales = layout.scales
    result: dict[str, Any] = {
        "version": VERSION,
        "group": layout.group,
        "kind": layout.kind,
        "format": layout.format,
        "atom": layout.atom,
        "dtype": layout.dtype,
        "scale_granularity": scales.granularity if scales else "",
        "scale_dtype": scales.dtype if scales else "",
        "scale_order": scales.order if scales else "",
        "scale_values": _digest([scales.k, scales.v]) if scales and scales.is_fixed else "",
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "head_dim_v": layout.head_dim_v,
        "block_size": layout.block_size,
        "tp_size": layout.tp_size,
        "order": layout.order,
    }
    if not layout.order:
        for part in layout.parts:
            for name, stride, _ in layout.part_axes(part):
                result[f"{part.name}.stride_{name}"] = stride
    result["digest"] = _digest(result)
    return result


def to_wire(layout: KVLayout) -> dict[str, Any]:
    """See :meth:`KVLayout.to_wire`."""
    return {"version": VERSION, **asdict(layout)}


def from_wire(message: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The fields ``names`` out of a peer's message; their values are validated by the constructor."""
    if not isinstance(message, Mapping):
        raise LayoutError("wire", f"a mapping is needed, not {type(message).__name__}")
    version = message.get("version")
    if version != VERSION:
        raise LayoutError(
            "version", f"the peer speaks layout version {version!r}, this side {VERSION}"
        )
    values = {key: value for key, value in message.items() if key != "version"}
    if set(values) != names:
        raise LayoutError("wire", f"fields {sorted(set(values) ^ names)} are missing or unknown")
    for name in ("layers", "parts"):
        if not isinstance(values[name], (list, tuple)) or len(values[name]) > MAX_LAYERS:
            raise LayoutError(name, "a list of sane length is needed")
    for name in ("kind", "order", "dtype"):
        if not isinstance(values[name], str):
            raise LayoutError(name, f"a string is needed, not {values[name]!r}")
    try:
        values["layers"] = tuple(values["layers"])
        values["parts"] = tuple(
            KVPart(**{**part, "bases": tuple(part["bases"])}) for part in values["parts"]
        )
        if values["scales"] is not None:
            scales = dict(values["scales"])
            for name in ("k", "v"):
                scales[name] = None if scales[name] is None else tuple(scales[name])
            values["scales"] = KVScales(**scales)
    except (TypeError, KeyError, AttributeError) as error:
        raise LayoutError("wire", f"malformed: {error}") from error
    return values
