# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What only verbs has, between two processes: the network beneath, limits, addresses, reasons."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, run_with_fake_verbs

from kvxfer.errors import KvxferError, UnavailableError
from kvxfer.testing import fake_verbs
from kvxfer.testing.faults import Way, ways
from kvxfer.transfer import TransferEngine

_VERBS = next((way for way in ways() if way.name == "verbs"), None)
pytestmark = pytest.mark.skipif(
    _VERBS is None or _VERBS.reason is not None or bool(fake_verbs.real_devices()),
    reason=f"needs software NICs: {_VERBS.reason if _VERBS else 'verbs is not compiled in'}",
)
NBYTES = 1 << 20


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Way:
    """Verbs on NICs with the plan that the test is parametrised with; both processes have it."""
    assert _VERBS is not None
    return replace(_VERBS, nic=getattr(request, "param", ""))


@pytest.fixture
def pair(way: Way) -> Iterator[tuple[TransferEngine, PeerProcess]]:
    peer = PeerProcess("target", way)
    with way.engine("driver", SECRET) as engine:
        yield engine, peer
    peer.close()
    fake_verbs.set_plan("")


PROBE = """
from kvxfer.transfer import probe_transports
print(dict(probe_transports())["verbs"])
"""


@pytest.mark.parametrize(
    "way",
    ["seed=3 drop=0.002 lose_ack=0.002 delay=0.1:1ms duplicate=0.1:3ms hold_cqe=0.05:1ms"],
    indirect=True,
)
def test_loss_delay_and_repetition_cost_time_alone(
    pair: tuple[TransferEngine, PeerProcess],
) -> None:
    engine, target = pair
    target.call("add_region", "kv", NBYTES, "registered")
    local = engine.allocate(NBYTES, "kv")
    peer = engine.connect(target.address)
    rng = np.random.default_rng(5)
    before = fake_verbs.counts("delayed", "duplicated")
    for _ in range(4):
        data = rng.integers(0, 256, NBYTES, np.uint8)
        local.array[:] = data
        offsets = rng.permutation(NBYTES // 4096) * 4096
        engine.write(local, peer.regions["kv"], offsets, offsets, 4096).wait(TIMEOUT_S)
        assert target.call("bytes_of", "kv") == data.tobytes()
        local.array[:] = 0
        engine.read(local, peer.regions["kv"], offsets, offsets, 4096).wait(TIMEOUT_S)
        assert local.array.tobytes() == data.tobytes()
    after = fake_verbs.counts("delayed", "duplicated")
    assert all(new > old for new, old in zip(after, before, strict=True)), "nothing went wrong"


@pytest.mark.parametrize("way", ["seed=3 lose_ack=0.02 soft_roce=1"], indirect=True)
def test_reads_do_not_wait_for_a_fence_that_waits_for_itself(
    pair: tuple[TransferEngine, PeerProcess],
) -> None:
    """On Soft-RoCE a fenced READ whose answer is lost was never sent again: all that followed stood still."""
    engine, target = pair
    size, count = 512, 500
    target.call("add_region", "kv", NBYTES, "registered")
    data = np.random.default_rng(6).integers(0, 256, NBYTES, np.uint8)
    target.call("fill", "kv", data.tobytes())
    local = engine.allocate(NBYTES, "kv")
    remote = engine.connect(target.address).regions["kv"]
    before = fake_verbs.counts("timeouts", "retransmissions")
    reads = [engine.read(local, remote, at, at, size) for at in range(0, size * count, size)]
    for each in reads:
        each.wait(TIMEOUT_S)
    assert np.array_equal(local.array[: size * count], data[: size * count])
    assert fake_verbs.counts("timeouts", "retransmissions") != before, "nothing was lost"


@pytest.mark.parametrize("way", ["seed=9 error=0.05:any"], indirect=True)
def test_failed_completions_end_transfers_once_with_a_typed_error(
    pair: tuple[TransferEngine, PeerProcess], way: Way
) -> None:
    engine, target = pair
    target.call("add_region", "kv", NBYTES, "registered")
    local = engine.allocate(NBYTES, "kv")
    ends: list[str] = []
    while len(ends) < 60:
        try:
            peer = engine.connect(target.address)
            remote = peer.regions["kv"]
            while len(ends) < 60 and peer.alive:
                xfer = engine.write(local, remote, 0, 0, NBYTES, deadline_s=TIMEOUT_S)
                try:
                    xfer.wait(TIMEOUT_S)
                    ends.append("done")
                except KvxferError as error:
                    ends.append(type(error).__name__)
        except KvxferError as error:  # the connection itself met one
            ends.append(f"connect {type(error).__name__}")
    assert "done" in ends
    assert set(ends) - {"done"}, "nothing went wrong"
    assert "InternalError" not in ends
    assert engine.stats()["transfers"]["in_flight"] == 0


def test_a_step_of_a_queue_pair_that_fails_is_an_error_with_its_errno(
    pair: tuple[TransferEngine, PeerProcess],
) -> None:
    engine, target = pair
    fake_verbs.set_plan("fail=modify_qp@1:ETIMEDOUT")
    with pytest.raises(
        UnavailableError, match=r"ibv_modify_qp\(qp \d+, RESET to INIT, port 1"
    ) as caught:
        engine.connect(target.address)
    assert caught.value.errno == errno.ETIMEDOUT
    assert os.strerror(errno.ETIMEDOUT) in str(caught.value)
    fake_verbs.set_plan("")
    assert engine.connect(target.address).alive


def test_explain_names_device_address_and_limits(
    pair: tuple[TransferEngine, PeerProcess],
) -> None:
    engine, target = pair
    peer = engine.connect(target.address)
    text = engine.explain(peer)
    assert "fake0:1" in text
    assert "RoCE v2" in text
    assert "::ffff:10.77.0.1" in text


def test_writes_are_pulled_where_the_owner_did_not_ask_for_pushes(
    pair: tuple[TransferEngine, PeerProcess],
) -> None:
    assert _VERBS is not None
    _, target = pair
    target.call("add_region", "kv", NBYTES, "registered")
    with replace(_VERBS, verbs_push=True).engine("pusher", SECRET) as engine:
        local = engine.allocate(NBYTES, "kv")
        local.array[:] = 7
        peer = engine.connect(target.address)
        _, token = target.call("grant", "kv", 0, NBYTES, ttl_s=600)
        engine.write(local, peer.regions["kv"], 0, 0, NBYTES, lease=token).wait(TIMEOUT_S)
        assert target.call("bytes_of", "kv") == local.array.tobytes()
        text = engine.explain(peer)
        assert "pulled by the peer: it gives no windows: the engine was made without" in text
        assert "0 bytes pushed" in text


DOCTOR = """
from kvxfer.doctor import examine
print(next(check.detail for check in examine() if check.name == "verbs"))
"""


def test_doctor_names_every_rail_and_where_it_is(tmp_path: Path) -> None:
    for device, node in (("fake0", "1"), ("fake1", "-1")):
        (tmp_path / device / "device").mkdir(parents=True)
        (tmp_path / device / "device" / "numa_node").write_text(f"{node}\n")
    plan = f"devices=2 sysfs={tmp_path}"
    text = run_with_fake_verbs(DOCTOR, KVXFER_FAKE_VERBS=plan, KVXFER_LIBCUDA="libnone.so.1")
    assert text.strip() == ("works here: fake0:1 (NUMA node 1), fake1:1 (NUMA node unknown)")


def test_reason_says_what_is_missing() -> None:
    assert run_with_fake_verbs(PROBE).strip() == "None"
    assert "no RDMA device" in run_with_fake_verbs(PROBE, KVXFER_FAKE_VERBS="devices=0")
    assert "port 1 is down" in run_with_fake_verbs(PROBE, KVXFER_FAKE_VERBS="down=0")
    assert "no GID" in run_with_fake_verbs(PROBE, KVXFER_FAKE_VERBS="gids=none")
    refused = run_with_fake_verbs(PROBE, KVXFER_FAKE_VERBS="fail=open_device@1:ENOSPC")
    assert "ibv_open_device(fake0)" in refused
    assert "No space left on device" in refused
    missing = run_with_fake_verbs(PROBE, KVXFER_LIBIBVERBS="/nowhere/libibverbs.so")
    assert "/nowhere/libibverbs.so" in missing


LOCKED = """
import numpy as np
from kvxfer.errors import RegistrationError
from kvxfer.transfer import TransferEngine
with TransferEngine("a", transports=("verbs",), secret=b"a secret for tests") as engine:
    try:
        engine.register(np.zeros(64 << 20, np.uint8), "too much")
    except RegistrationError as error:
        print(error)
    else:
        print("registered")
    engine.allocate(1 << 20, "enough")
"""


def test_memory_limit_is_explained() -> None:
    text = run_with_fake_verbs(LOCKED, KVXFER_FAKE_VERBS=f"memlock={8 << 20}")
    assert "ibv_reg_mr" in text
    assert "ulimit -l" in text or "locked-memory limit" in text
    assert "registered" in run_with_fake_verbs(LOCKED)


CONNECT = """
from kvxfer.transfer import EngineConfig, TransferEngine
def engine(name):
    return TransferEngine(name, transports=("verbs",), secret=b"a secret for tests", config=EngineConfig({}))
with engine("a") as a, engine("b") as b:
    peer = a.connect(b.address)
    remote = b.allocate(4096, "kv")
    print(a.explain(peer))
"""


NINE = """
from kvxfer.errors import KvxferError
from kvxfer.transfer import EngineConfig, TransferEngine
names = ",".join(f"fake{i}" for i in range(9))
try:
    TransferEngine("a", transports=("verbs",), config=EngineConfig(verbs_device=names))
except KvxferError as error:
    print(error)
"""


def test_more_devices_than_rails_are_refused_by_name() -> None:
    text = run_with_fake_verbs(NINE, KVXFER_FAKE_VERBS="devices=9")
    assert "'fake8' would be one more than the 8 ports" in text


def test_device_and_address_are_chosen_by_rule_or_by_name() -> None:
    two = {"KVXFER_FAKE_VERBS": "devices=2 gids=ll1,ll2,v4r1,v4r2,v6r2"}
    assert "fake0:1" in run_with_fake_verbs(CONNECT.format(""), **two)
    chosen = run_with_fake_verbs(CONNECT.format("verbs_device='fake1'"), **two)
    assert "fake1:1" in chosen
    assert "10.77.1.1" in chosen
    index = run_with_fake_verbs(CONNECT.format("verbs_gid_index=1"), **two)
    assert "fe80" in index
    down = {"KVXFER_FAKE_VERBS": "devices=2 down=0"}
    assert "fake1:1" in run_with_fake_verbs(CONNECT.format(""), **down)
