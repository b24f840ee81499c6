# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Layouts and plans: which bytes of which block belong to which rank. Arithmetic only, no I/O."""

from __future__ import annotations

from kvxfer.layout.cost import COST_MODELS, CostModel
from kvxfer.layout.kv_layout import KVLayout
from kvxfer.layout.pairs import check_compatible, transfer_pairs
from kvxfer.layout.parts import KVPart, KVScales
from kvxfer.layout.plan import TransferPlan, plan_transfer
from kvxfer.layout.spans import SpanGroup

__all__ = [
    "COST_MODELS",
    "CostModel",
    "KVLayout",
    "KVPart",
    "KVScales",
    "SpanGroup",
    "TransferPlan",
    "check_compatible",
    "plan_transfer",
    "transfer_pairs",
]
