# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Ways between two engines, the ones on which things go wrong included."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from kvxfer.transfer import EngineConfig, TransferEngine, probe_transports

__all__ = ["HARMLESS", "Way", "ways"]

# Everything that a transport may do without anybody noticing: late, out of order, told twice,
# back-pressure out of the blue.
HARMLESS = "delay=0.2:3ms delay_end=0.2:3ms reorder=0.2 duplicate=0.2 again=0.2"


@dataclass(frozen=True)
class _FaultyConfig(EngineConfig):
    """``faults`` is for tests, so the public configuration does not have it."""

    faults: str = ""

    def native(self) -> Any:
        out = super().native()
        out.faults = self.faults
        return out


@dataclass(frozen=True)
class Way:
    """How an engine of a test reaches its peers; picklable.

    Args:
        name: of the case.
        transport: the one that carries requests.
        faults: the plan of the faulty transport: ``wrap=TRANSPORT seed=N`` and what goes wrong
            how often, see csrc/transport/faulty/plan.hpp.
        copy_threads: None: by the CPUs that there are.
        verbs_devices: of the engine that is called "driver", and of every other; None: by rule.
        reason: why it cannot be gone here.
    """

    name: str
    transport: str
    faults: str = ""
    copy_threads: int | None = None
    verbs_devices: tuple[str, str] | None = None
    reason: str | None = None

    def engine(self, name: str, secret: bytes, **options: Any) -> TransferEngine:
        """An engine that goes this way and no other."""
        device = None
        if self.verbs_devices is not None:
            device = self.verbs_devices[0 if name == "driver" else 1]
        config = _FaultyConfig(
            faults=self.faults, copy_threads=self.copy_threads, verbs_device=device
        )
        return TransferEngine(
            name, transports=(self.transport,), secret=secret, config=config, **options
        )

    @property
    def below(self) -> str:
        """The transport that moves the bytes."""
        wrapped = [word[5:] for word in self.faults.split() if word.startswith("wrap=")]
        return wrapped[0] if wrapped else self.transport

    def with_faults(self, plan: str) -> Way:
        """The same way with things going wrong on it."""
        return replace(
            self,
            name=f"faulty-{self.below}",
            transport="faulty",
            faults=f"wrap={self.below} {plan}",
        )


def ways() -> list[Way]:
    """Every transport that is compiled in, and each again with harmless faults.

    ``KVXFER_TEST_VERBS_DEVICES=rxe0,rxe1`` puts the two sides on devices that a cable joins.
    """
    named = os.environ.get("KVXFER_TEST_VERBS_DEVICES")
    ours, theirs = named.split(",") if named else ("", "")
    plain = [
        Way(name, name, verbs_devices=(ours, theirs) if named else None, reason=reason)
        for name, reason in probe_transports()
    ]
    pooled = [replace(way, name="shm-pool", copy_threads=2) for way in plain if way.name == "shm"]
    return plain + pooled + [way.with_faults(f"seed=1 {HARMLESS}") for way in plain]
