# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Hands one request's KV blocks from a prefill worker to a decode worker; docs/handoff.md tells how."""

from __future__ import annotations

from kvxfer.connector.endpoint import Endpoint
from kvxfer.connector.events import (
    Accepted,
    Declined,
    DuplicateHandoffError,
    Event,
    Failed,
    Granted,
    HandoffConfig,
    Offered,
    Quiet,
)
from kvxfer.connector.protocol import ProtocolError
from kvxfer.connector.receiver import Receiver
from kvxfer.connector.sender import Sender

__all__ = [
    "Accepted",
    "Declined",
    "DuplicateHandoffError",
    "Endpoint",
    "Event",
    "Failed",
    "Granted",
    "HandoffConfig",
    "Offered",
    "ProtocolError",
    "Quiet",
    "Receiver",
    "Sender",
]
