# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Registering for verbs: in the background, its progress and its failures, and the limit on locked memory."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, run_with_fake_verbs

from kvxfer.errors import InvalidArgumentError, RegistrationError, TransferTimeoutError
from kvxfer.testing import fake_verbs
from kvxfer.testing.faults import ways
from kvxfer.transfer import EngineConfig, TransferEngine

_VERBS = next((way for way in ways() if way.name == "verbs"), None)
pytestmark = pytest.mark.skipif(
    _VERBS is None or _VERBS.reason is not None or bool(fake_verbs.real_devices()),
    reason=f"needs software NICs: {_VERBS.reason if _VERBS else 'verbs is not compiled in'}",
)
NBYTES = 1 << 20


def make_engine(name: str, transports: tuple[str, ...] | None = ("verbs",)) -> TransferEngine:
    """One that registers everything in the background."""
    with fake_verbs.in_use():
        return TransferEngine(
            name,
            transports=transports,
            secret=SECRET,
            config=EngineConfig(verbs_background_nbytes=0),
        )


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    try:
        with make_engine("a") as engine:
            fake_verbs.set_plan("")
            # With the first region the words of leases and regions are registered, by the caller.
            engine.allocate(4096, "first").wait_registered(TIMEOUT_S)
            yield engine
            fake_verbs.set_plan("")  # nobody waits for a plan that does not come
    finally:
        fake_verbs.set_plan("")


def wait_until_held() -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while fake_verbs.counts("registering") == [0]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_region_says_how_far_it_is_and_can_be_waited_for(engine: TransferEngine) -> None:
    fake_verbs.set_plan("hold_reg=2")
    done = engine.register(np.zeros(NBYTES, np.uint8), "done")
    region = engine.register([np.zeros(NBYTES, np.uint8), np.zeros(NBYTES, np.uint8)], "kv")
    done.wait_registered(TIMEOUT_S)
    wait_until_held()
    progress = region.registration["verbs"]
    assert (progress.state, progress.nbytes_done, progress.nbytes) == ("running", 0, 2 * NBYTES)
    assert progress.reason is None
    with pytest.raises(TransferTimeoutError, match=f"0 of {2 * NBYTES} bytes of region 'kv'"):
        region.wait_registered(0.01)
    stats = engine.stats()["registration"]["verbs"]
    assert stats == {
        "regions": 3,
        "running": 1,
        "failed": 0,
        "nbytes": 4096 + 3 * NBYTES,
        "nbytes_done": 4096 + NBYTES,
    }
    fake_verbs.set_plan("")
    region.wait_registered(TIMEOUT_S)
    progress = region.registration["verbs"]
    assert (progress.state, progress.nbytes_done) == ("done", 2 * NBYTES)


def test_a_failure_is_raised_where_verbs_was_asked_for(engine: TransferEngine) -> None:
    with make_engine("b") as b:
        b.allocate(NBYTES, "kv").wait_registered(TIMEOUT_S)
        peer = engine.connect(b.address)
        fake_verbs.set_plan("hold_reg=1")
        region = engine.register(np.zeros(NBYTES, np.uint8), "kv")
        wait_until_held()
        fake_verbs.set_plan("fail=reg_mr@1:ENOMEM")  # the one that was held
        with pytest.raises(RegistrationError, match=r"ibv_reg_mr.*region 'kv'") as raised:
            region.wait_registered(TIMEOUT_S)
        assert raised.value.transport == "verbs"
        assert raised.value.errno == 12
        progress = region.registration["verbs"]
        assert progress.state == "failed"
        assert progress.reason is not None
        assert "locked-memory limit" in progress.reason
        for use in (
            lambda: engine.write(region, peer.regions["kv"], 0, 0, 1),
            lambda: engine.read(region, peer.regions["kv"], 0, 0, 1),
            lambda: engine.grant(region, 0, 1, ttl_s=1),
        ):
            with pytest.raises(RegistrationError, match="region 'kv'"):
                use()
        assert engine.stats()["registration"]["verbs"]["failed"] == 1
        engine.deregister(region)


def test_a_failure_is_a_reason_where_nobody_asked_for_verbs() -> None:
    try:
        with make_engine("a", None) as a:
            fake_verbs.set_plan("")
            a.allocate(4096, "first").wait_registered(TIMEOUT_S)
            fake_verbs.set_plan("fail=reg_mr@1:EINVAL")
            region = a.register(np.zeros(NBYTES, np.uint8), "kv")
            region.wait_registered(TIMEOUT_S)
            assert region.registration["verbs"].state == "failed"
            reason = region.registration["verbs"].reason
            assert reason is not None
            assert "Invalid argument" in reason
            a.grant(region, 0, 1, ttl_s=1).begin_revoke()
            with TransferEngine("b", transports=("tcp",), secret=SECRET) as b:
                assert f"'kv': not for verbs: {reason}" in a.explain(a.connect(b.address))
    finally:
        fake_verbs.set_plan("")


def test_what_waits_to_be_registered_can_leave_at_once(engine: TransferEngine) -> None:
    fake_verbs.set_plan("hold_reg=1")
    first = engine.register(np.zeros(NBYTES, np.uint8), "kv")
    wait_until_held()
    with mmap.mmap(-1, NBYTES) as memory:
        waits = engine.register(memory, "waits")
        engine.deregister(waits)
        assert waits.registration["verbs"].state == "dropped"
        with pytest.raises(InvalidArgumentError, match="deregistered before it was registered"):
            waits.wait_registered(TIMEOUT_S)
        del waits
        engine.stats()
        memory.resize(2 * NBYTES)  # BufferError as long as anybody holds it
    fake_verbs.set_plan("")
    first.wait_registered(TIMEOUT_S)
    assert first.registration["verbs"].state == "done"


def test_transports_that_register_nothing_have_nothing_to_wait_for() -> None:
    with TransferEngine("a", transports=("tcp",), secret=SECRET) as a:
        region = a.allocate(NBYTES, "kv")
        assert region.registration == {}
        region.wait_registered(0)
        assert a.stats()["registration"] == {}


FORK = """
import os, sys
import numpy as np
from kvxfer.errors import InvalidArgumentError
from kvxfer.testing import fake_verbs
from kvxfer.transfer import EngineConfig, TransferEngine
config = EngineConfig(verbs_background_nbytes=0)
engine = TransferEngine("a", transports=("verbs",), secret=b"a secret for tests", config=config)
engine.allocate(4096, "first").wait_registered(30)
fake_verbs.set_plan("hold_reg=1")
region = engine.register(np.zeros(1 << 20, np.uint8), "kv")
while fake_verbs.counts("registering") == [0]:
    pass
pid = os.fork()
if pid == 0:
    try:
        region.wait_registered(30)
    except InvalidArgumentError as error:
        assert "forked" in str(error)
    else:
        raise AssertionError("it was registered in the child")
    assert region.registration["verbs"].state == "running"
    engine.close()
    del engine, region
    sys.exit(0)  # through all destructors
_, status = os.waitpid(pid, 0)
assert status == 0, status
fake_verbs.set_plan("")
region.wait_registered(30)
fake_verbs.set_plan("hold_reg=1")
late = engine.register(np.zeros(1 << 20, np.uint8), "late")
while fake_verbs.counts("registering") == [0]:
    pass
import threading
threading.Timer(0.2, fake_verbs.set_plan, [""]).start()
engine.close()
print(region.registration["verbs"].state, late.registration["verbs"].state)
"""


def test_a_fork_and_a_close_while_memory_is_registered() -> None:
    assert run_with_fake_verbs(FORK).split() == ["done", "dropped"]


LIMITED = """
import resource
import numpy as np
from kvxfer.errors import RegistrationError
from kvxfer.transfer import TransferEngine
hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
resource.setrlimit(resource.RLIMIT_MEMLOCK, (3 << 20, hard))
with TransferEngine("a", transports=("verbs",), secret=b"a secret for tests") as engine:
    try:
        engine.register(np.zeros(64 << 20, np.uint8), "pool")
    except RegistrationError as error:
        print(error)
"""


def test_the_error_has_the_limit_of_this_process_and_what_was_wanted() -> None:
    text = run_with_fake_verbs(LIMITED, KVXFER_FAKE_VERBS=f"memlock={4 << 20}")
    assert "region 'pool', 67108864 bytes" in text
    assert "(ulimit -l) of this process is 3145728 bytes, of which" in text
    root = os.geteuid() == 0
    assert ("CAP_IPC_LOCK" if root else "LimitMEMLOCK=infinity") in text


DOCTOR = """
import resource
hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
resource.setrlimit(resource.RLIMIT_MEMLOCK, ({limit}, hard))
from kvxfer.doctor import examine
print(next(check.detail for check in examine() if check.name == "locked memory"))
"""


def test_doctor_says_how_much_memory_may_be_locked() -> None:
    text = run_with_fake_verbs(DOCTOR.format(limit=2 << 20))
    assert "2097152 bytes" in text
    assert "LimitMEMLOCK=infinity" in text
