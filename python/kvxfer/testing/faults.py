# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Ways between two engines, the ones on which things go wrong included."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from kvxfer.testing import fake_verbs
from kvxfer.transfer import EngineConfig, TransferEngine, probe_transports

__all__ = ["HARMLESS", "Way", "ways"]

# Everything that a transport may do without anybody noticing: late, out of order, told twice,
# back-pressure out of the blue.
HARMLESS = "delay=0.2:3ms delay_end=0.2:3ms reorder=0.2 duplicate=0.2 again=0.2"

# Likewise of NICs: packets late, twice and out of order between queue pairs, completions late and
# a few at a time.
HARMLESS_NIC = "delay=0.05:2ms duplicate=0.1:5ms hold_cqe=0.05:2ms short_poll=0.5"


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
        nic: what goes wrong on the software NICs, see tests/fake_verbs/plan.hpp; in the whole
            process, from the moment an engine is made.
        copy_threads: None: by the CPUs that there are.
        verbs_devices: of the engine that is called "driver", and of every other; None: by rule.
        verbs_push: writes under leases are pushed.
        deadline_s: of requests that name none, and so of retries of a NIC; None: the usual one.
        reason: why it cannot be gone here.
    """

    name: str
    transport: str
    faults: str = ""
    nic: str = ""
    copy_threads: int | None = None
    verbs_devices: tuple[str, str] | None = None
    verbs_push: bool = False
    deadline_s: float | None = None
    reason: str | None = None

    def engine(
        self,
        name: str,
        secret: bytes,
        *,
        max_pending: int = EngineConfig.max_pending,
        **options: Any,
    ) -> TransferEngine:
        """An engine that goes this way and no other."""
        device = None
        if self.verbs_devices is not None:
            device = self.verbs_devices[0 if name == "driver" else 1]
        config = _FaultyConfig(
            faults=self.faults,
            copy_threads=self.copy_threads,
            verbs_device=device,
            verbs_push=self.verbs_push,
            max_pending=max_pending,
            deadline_s=EngineConfig.deadline_s if self.deadline_s is None else self.deadline_s,
        )
        on_fake = self.below == "verbs"
        with fake_verbs.in_use() if on_fake else nullcontext():
            if on_fake and not fake_verbs.real_devices():
                fake_verbs.set_plan(self.nic)
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


def _placed(way: Way, word: str) -> Way:
    """The way on devices that a word of ``KVXFER_TEST_VERBS_DEVICES`` names.

    ``[NAME=]OURS/THEIRS[@DEADLINE_S]``: the name is that of the way's end.
    """
    name, _, rest = word.rpartition("=")
    devices, _, deadline_s = rest.partition("@")
    ours, theirs = devices.split("/")
    return replace(
        way,
        name=f"{way.name}-{name}" if name else way.name,
        verbs_devices=(ours, theirs),
        deadline_s=float(deadline_s) if deadline_s else None,
    )


def ways() -> list[Way]:
    """Every transport that is compiled in, and each again with harmless faults.

    Verbs goes over real NICs where there are some, else over software ones, of which there are two
    in some of the ways; it pulls, and in other ways it pushes what may be pushed.
    ``KVXFER_TEST_VERBS_DEVICES="rxe0/rxe0 cable=rxe0/rxe1@12"`` puts verbs on one device, and a
    cable between two into ways of their own, ``verbs-cable`` and ``verbs-push-cable``.
    """
    places = os.environ.get("KVXFER_TEST_VERBS_DEVICES", "").split()
    usual = [word for word in places if "=" not in word]
    with fake_verbs.in_use():
        plain = [Way(name, name, reason=reason) for name, reason in probe_transports()]
    if usual:
        plain = [_placed(way, usual[0]) for way in plain]
    pooled = [replace(way, name="shm-pool", copy_threads=2) for way in plain if way.name == "shm"]
    verbs = [way for way in plain if way.name == "verbs"]
    pushing = [replace(way, name="verbs-push", verbs_push=True) for way in verbs]
    rough = f"seed=1 {HARMLESS_NIC}"
    nics = [("rough", rough, verbs), ("two-rails", "devices=2", verbs)]
    nics += [("two-rough-rails", f"devices=2 {rough}", pushing)]
    more = [
        replace(way, name=f"{way.name}-{name}", nic=nic)
        for name, nic, among in nics
        for way in among
        if not fake_verbs.real_devices()
    ]
    more += [_placed(way, word) for word in places if "=" in word for way in verbs + pushing]
    return (
        plain + pooled + pushing + more + [way.with_faults(f"seed=1 {HARMLESS}") for way in plain]
    )
