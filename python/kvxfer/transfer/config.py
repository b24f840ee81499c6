# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""``EngineConfig``: what rarely needs to be said to an engine, checked where it is said."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvxfer import _transfer
from kvxfer.errors import InvalidArgumentError

__all__ = ["EngineConfig", "TlsFiles"]

DEFAULT_DEADLINE_S = 30.0
_MAX_LANES = 8
_MAX_RAILS = 8
_MAX_PORT = 255
_MAX_COPY_THREADS = 64
_VERBS_DEVICE = re.compile(r"[^\s:,]+(:\d{1,3})?(,[^\s:,]+(:\d{1,3})?)*")
_MAX_SPIN_US = 1e6  # a second: more is a mistake in the unit


@dataclass(frozen=True)
class TlsFiles:
    """PEM files that make tcp speak TLS 1.3, with both sides authenticated.

    Args:
        certificate: this engine's, with its chain.
        key: the private key of ``certificate``.
        authority: certificates that a peer's must be signed by.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    authority: str | os.PathLike[str]

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "authority"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike) or not str(value):
                raise InvalidArgumentError(f"tls.{name} must be a path, not {value!r}")
            if not Path(value).is_file():
                what = "it is no file:" if Path(value).exists() else "there is no file"
                raise InvalidArgumentError(f"tls.{name}: {what} {os.fspath(value)!r}")


@dataclass(frozen=True)
class EngineConfig:
    """What rarely needs to be said.

    Args:
        deadline_s: of transfers that name none.
        num_lanes: sockets for bulk per tcp peer, beside the one for control and small messages.
        copy_threads: that copy on same-host transports; 0: the progress thread does it; None: by
            the CPUs that this process may use (0 on up to 2).
        spin_us: how long a waiter, or the progress thread, polls before it sleeps; never on one CPU.
        allow_ptrace: cma may open this process to every program of the user
            (``PR_SET_PTRACER_ANY``) where the system's policy would forbid it otherwise.
        max_pending: transfers to one peer that may be under way or waiting at once; one more raises
            ``BackPressureError`` at the call. What was cancelled counts until it is ``quiesced``.
        max_pending_spans: the spans of all of them together, of 24 bytes each; one transfer alone may
            have more.
        tls: makes tcp speak TLS; both sides must.
        verbs_device: the RDMA devices whose ports are rails: ``"mlx5_0"``, with one port ``"mlx5_0:2"``,
            or several, ``"mlx5_0,mlx5_1:2"``. Each must have an active port; they are used alike, and
            one carries the messages. None: every active port (eight at most), of which chains
            go to those that are nearest to the memory (docs/verbs.md).
        verbs_gid_index: which of each port's GIDs to use; None: by rule (docs/verbs.md).
        verbs_queue_pairs: for READs between two ports that are joined; a device allows some 16 READs
            in flight on each, so more of them help small blocks over a long round trip. Each counts
            as a rail, of which a connection has eight at most; the connecting side's value counts.
        verbs_background_nbytes: a region with more bytes to register (its size times the rails) is
            registered in the background (``region.registration``, ``region.wait_registered()``), a
            smaller one before ``register()`` or ``allocate()`` returns. 0: all in the background.
        verbs_push: where both engines say so, writes under a lease go by RDMA WRITE, through a memory
            window that is bound for the lease and invalidated when it ends; else their bytes are
            pulled by whoever owns the destination, so that no memory is remotely writable at all
            (docs/verbs.md). ``explain()`` says what is pushed, or why not.
    """

    deadline_s: float = DEFAULT_DEADLINE_S
    num_lanes: int = 2
    copy_threads: int | None = None
    spin_us: float = 20.0
    allow_ptrace: bool = False
    max_pending: int = 65536
    max_pending_spans: int = 1 << 26
    tls: TlsFiles | None = None
    verbs_device: str | None = None
    verbs_gid_index: int | None = None
    verbs_queue_pairs: int = 1
    verbs_background_nbytes: int = 256 << 20
    verbs_push: bool = False

    def __post_init__(self) -> None:
        _check_number("deadline_s", self.deadline_s, 0, math.inf)
        _check_int("num_lanes", self.num_lanes, 1, _MAX_LANES)
        if self.copy_threads is not None:
            _check_int("copy_threads", self.copy_threads, 0, _MAX_COPY_THREADS)
        _check_number("spin_us", self.spin_us, 0, _MAX_SPIN_US)
        _check_int("max_pending", self.max_pending, 1, 2**31 - 1)
        _check_int("max_pending_spans", self.max_pending_spans, 1, 2**63 - 1)
        for name in ("allow_ptrace", "verbs_push"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(
                    f"{name} must be True or False, not {getattr(self, name)!r}"
                )
        if self.tls is not None and not isinstance(self.tls, TlsFiles):
            raise InvalidArgumentError(f"tls must be a TlsFiles, not {self.tls!r}")
        if self.verbs_device is not None and not (
            isinstance(self.verbs_device, str) and _VERBS_DEVICE.fullmatch(self.verbs_device)
        ):
            raise InvalidArgumentError(
                f"verbs_device must be devices' names, each with :PORT or without, separated by "
                f"commas, not {self.verbs_device!r}"
            )
        if self.verbs_device is not None:
            _check_devices(self.verbs_device.split(","))
        if self.verbs_gid_index is not None:
            _check_int("verbs_gid_index", self.verbs_gid_index, 0, 255)
        _check_int("verbs_queue_pairs", self.verbs_queue_pairs, 1, _MAX_RAILS)
        _check_int("verbs_background_nbytes", self.verbs_background_nbytes, 0, 2**63 - 1)

    def native(self) -> _transfer.TransportConfig:
        """The same for the C++ side."""
        out = _transfer.TransportConfig()
        out.num_lanes = self.num_lanes
        out.copy_threads = -1 if self.copy_threads is None else self.copy_threads
        out.spin_ns = round(self.spin_us * 1e3)
        out.allow_ptrace = self.allow_ptrace
        out.max_pending = self.max_pending
        out.max_pending_spans = self.max_pending_spans
        if self.deadline_s < 1e9:  # else it means never, as it does natively
            out.deadline_ns = round(self.deadline_s * 1e9)
        else:
            out.deadline_ns = 2**63 - 1
        out.verbs_device = self.verbs_device or ""
        out.verbs_gid_index = -1 if self.verbs_gid_index is None else self.verbs_gid_index
        out.verbs_queue_pairs = self.verbs_queue_pairs
        out.verbs_background_nbytes = self.verbs_background_nbytes
        out.verbs_push = self.verbs_push
        if self.tls is not None:
            out.tls_certificate = os.fspath(self.tls.certificate)
            out.tls_key = os.fspath(self.tls.key)
            out.tls_authority = os.fspath(self.tls.authority)
        return out


def _check_devices(names: list[str]) -> None:
    for name in names:
        _, _, port = name.partition(":")
        if port and not 1 <= int(port) <= _MAX_PORT:
            raise InvalidArgumentError(
                f"verbs_device: {name!r} names port {int(port)}; ports are 1 to {_MAX_PORT}, and a "
                "device without a port is all of its ports"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidArgumentError(
            f"verbs_device names {', '.join(twice)} more than once; for several queue pairs between "
            "two ports there is verbs_queue_pairs"
        )


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgumentError(f"{name} must be an int, {low} to {high}, not {value!r}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= value <= high:  # type: ignore[operator]
        raise InvalidArgumentError(f"{name} must be a number, {low} to {high}, not {value!r}")
