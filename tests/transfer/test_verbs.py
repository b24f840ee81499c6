# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What only verbs has, between two processes: the network beneath, limits, addresses, reasons."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, PeerProcess, run_with_fake_verbs

from kvxfer.errors import KvxferError
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


def test_explain_names_device_address_and_limits(
    pair: tuple[TransferEngine, PeerProcess],
) -> None:
    engine, target = pair
    peer = engine.connect(target.address)
    text = engine.explain(peer)
    assert "fake0:1" in text
    assert "RoCE v2" in text
    assert "::ffff:10.77.0.1" in text


@pytest.mark.parametrize("way", ["devices=2"], indirect=True)
def test_two_processes_stripe_over_two_rails(pair: tuple[TransferEngine, PeerProcess]) -> None:
    engine, target = pair
    size = 8 * NBYTES
    target.call("add_region", "kv", size, "registered")
    local = engine.allocate(size, "kv")
    peer = engine.connect(target.address)
    data = np.random.default_rng(6).integers(0, 256, size, np.uint8)
    local.array[:] = data
    engine.write(local, peer.regions["kv"], 0, 0, size).wait(TIMEOUT_S)
    local.array[:] = 0
    deadline = time.monotonic() + TIMEOUT_S
    while engine.explain(peer).count("; in use") < 2:  # the second one is tried first
        assert time.monotonic() < deadline, engine.explain(peer)
        time.sleep(0.01)
    engine.read(local, peer.regions["kv"], 0, 0, size).wait(TIMEOUT_S)
    assert local.array.tobytes() == data.tobytes()
    pulled = [int(each) for each in re.findall(r"(\d+) bytes pulled", engine.explain(peer))]
    assert len(pulled) == 2
    assert sum(pulled) == size
    assert min(pulled) >= NBYTES


@pytest.mark.parametrize("devices", [1, 2])
def test_writes_under_leases_are_pushed_where_both_sides_say_so(devices: int) -> None:
    assert _VERBS is not None
    way = replace(_VERBS, verbs_push=True, nic=f"devices={devices}")
    size = 8 * NBYTES
    target = PeerProcess("target", way)
    try:
        with way.engine("driver", SECRET) as engine:
            target.call("add_region", "kv", size, "registered")
            local = engine.allocate(size, "kv")
            local.array[:] = np.random.default_rng(7).integers(0, 256, size, np.uint8)
            peer = engine.connect(target.address)
            number, token = target.call("grant", "kv", 0, size, ttl_s=600, num_arrivals=1)
            xfer = engine.write(local, peer.regions["kv"], 0, 0, size, lease=token, arrival=0)
            xfer.wait(TIMEOUT_S)
            target.call("wait_arrived", number, 0)
            assert target.call("bytes_of", "kv") == local.array.tobytes()
            text = engine.explain(peer)
            pushed = [int(each) for each in re.findall(r"(\d+) bytes pushed", text)]
            assert len(pushed) == devices
            assert sum(pushed) == size
            assert "our writes are pushed where they have a lease" in text
            assert target.call("revoke", number)
            with pytest.raises(KvxferError, match="lease"):
                engine.write(local, peer.regions["kv"], 0, 0, 4096, lease=token).wait(TIMEOUT_S)
    finally:
        target.close()
        fake_verbs.set_plan("")


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


@pytest.mark.parametrize("way", ["devices=2"], indirect=True)
def test_a_region_of_many_pieces_has_keys_for_each_on_both_rails(
    pair: tuple[TransferEngine, PeerProcess],
) -> None:
    engine, target = pair
    pieces, nbytes = 300, 8192  # more than a message has rows of keys for
    size = pieces * nbytes
    target.call("add_region", "kv", size, "registered")
    rng = np.random.default_rng(8)
    arrays = [rng.integers(0, 256, nbytes, np.uint8) for _ in range(pieces)]
    local = engine.register(arrays, "kv")
    peer = engine.connect(target.address)
    order = rng.permutation(2 * pieces) * (nbytes // 2)
    engine.write(local, peer.regions["kv"], order, order, nbytes // 2).wait(TIMEOUT_S)
    data = np.concatenate(arrays)
    assert target.call("bytes_of", "kv") == data.tobytes()
    for array in arrays:
        array[:] = 0
    engine.read(local, peer.regions["kv"], order, order, nbytes // 2).wait(TIMEOUT_S)
    assert np.concatenate(arrays).tobytes() == data.tobytes()


DOCTOR = """
from kvxfer.doctor import examine
print(next(check.detail for check in examine() if check.name == "verbs"))
"""


def test_doctor_names_every_rail_and_its_node(tmp_path: Path) -> None:
    for device, node in (("fake0", "1"), ("fake1", "-1")):
        (tmp_path / device / "device").mkdir(parents=True)
        (tmp_path / device / "device" / "numa_node").write_text(f"{node}\n")
    text = run_with_fake_verbs(DOCTOR, KVXFER_FAKE_VERBS=f"devices=2 sysfs={tmp_path}")
    assert text.strip() == ("works here: fake0:1 (NUMA node 1), fake1:1 (NUMA node unknown)")


def test_reason_says_what_is_missing() -> None:
    assert run_with_fake_verbs(PROBE).strip() == "None"
    assert "no RDMA device" in run_with_fake_verbs(PROBE, KVXFER_FAKE_VERBS="devices=0")
    assert "active" in run_with_fake_verbs(PROBE, KVXFER_FAKE_VERBS="down=0")
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
