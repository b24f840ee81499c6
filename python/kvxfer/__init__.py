# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""kvxfer moves the KV cache of large language models and attends over it where it lands.

The parts: ``TransferEngine`` (memory between processes), ``KVLayout`` and ``plan_transfer`` (which bytes),
``kvxfer.kernels`` (attention and block copies), ``kvxfer.connector`` (the handoff of a request).
Importing this needs NumPy alone; ``kvxfer doctor`` says what works on a machine.
"""

from __future__ import annotations

__version__ = "0.1.0"

from kvxfer import connector, kernels
from kvxfer.errors import (
    BackPressureError,
    InternalError,
    InvalidArgumentError,
    KvxferError,
    LayoutError,
    LeaseError,
    PeerDisconnectedError,
    RegistrationError,
    RemoteAccessError,
    TransferCancelledError,
    TransferTimeoutError,
    TransportError,
    UnavailableError,
)
from kvxfer.layout import KVLayout, plan_transfer, transfer_pairs
from kvxfer.transfer import BlockView, EngineConfig, Signal, TlsFiles, TransferEngine

__all__ = [
    "BackPressureError",
    "BlockView",
    "EngineConfig",
    "InternalError",
    "InvalidArgumentError",
    "KVLayout",
    "KvxferError",
    "LayoutError",
    "LeaseError",
    "PeerDisconnectedError",
    "RegistrationError",
    "RemoteAccessError",
    "Signal",
    "TlsFiles",
    "TransferCancelledError",
    "TransferEngine",
    "TransferTimeoutError",
    "TransportError",
    "UnavailableError",
    "__version__",
    "connector",
    "kernels",
    "plan_transfer",
    "transfer_pairs",
]
