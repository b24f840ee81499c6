# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Moves spans of registered memory between processes: engines, regions, transfers, leases."""

from __future__ import annotations

from kvxfer._transfer import (
    MAX_NOTIFICATION_NBYTES,
    BlockView,
    Peer,
    RemoteRegion,
    Signal,
    Transfer,
    probe_transports,
    tls_unavailable,
    transport_details,
)
from kvxfer.transfer.config import EngineConfig, TlsFiles
from kvxfer.transfer.engine import Notification, PeerEvent, TransferEngine
from kvxfer.transfer.region import Lease, Region, Registration

__all__ = [
    "MAX_NOTIFICATION_NBYTES",
    "BlockView",
    "EngineConfig",
    "Lease",
    "Notification",
    "Peer",
    "PeerEvent",
    "Region",
    "Registration",
    "RemoteRegion",
    "Signal",
    "TlsFiles",
    "Transfer",
    "TransferEngine",
    "probe_transports",
    "tls_unavailable",
    "transport_details",
]
