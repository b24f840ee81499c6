# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""A GPU's memory as a region: over software NICs and GPUs, whose memory kills the CPU that touches it."""

from __future__ import annotations

import gc
import multiprocessing
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transfer_peers import SECRET, TIMEOUT_S, run_with_fake_verbs, wait_for

from kvxfer.errors import InvalidArgumentError, RegistrationError, UnavailableError
from kvxfer.testing import fake_cuda, fake_verbs
from kvxfer.testing.fake_cuda import DeviceArray
from kvxfer.testing.faults import ways
from kvxfer.transfer import EngineConfig, TransferEngine

_VERBS = next((way for way in ways() if way.name == "verbs"), None)
pytestmark = pytest.mark.skipif(
    _VERBS is None or _VERBS.reason is not None or bool(fake_verbs.real_devices()),
    reason=f"needs software NICs: {_VERBS.reason if _VERBS else 'verbs is not compiled in'}",
)
SHAPE = (4, 1000, 3)


def make_engine(
    name: str, transports: tuple[str, ...] | None = ("verbs",), *, push: bool = False
) -> TransferEngine:
    with fake_verbs.in_use():
        return TransferEngine(
            name, transports=transports, secret=SECRET, config=EngineConfig(verbs_push=push)
        )


@pytest.fixture(autouse=True)
def software_gpus() -> Iterator[None]:
    with fake_cuda.in_use():
        fake_cuda.set_plan("")
        yield
        fake_cuda.set_plan("")
    fake_verbs.set_plan("")


@pytest.fixture
def engine() -> Iterator[TransferEngine]:
    with make_engine("a") as engine:
        yield engine


def values(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def test_a_region_of_it_says_where_it_is_and_gives_no_array(engine: TransferEngine) -> None:
    array = DeviceArray(SHAPE, np.float16, device=1)
    region = engine.register(array, "kv")
    assert region.device == "cuda:1"
    assert region.nbytes == array.nbytes
    assert region.registration["verbs"].state == "done"
    assert "memory of cuda:1 by dma-buf" in region.registration["verbs"].detail
    with pytest.raises(InvalidArgumentError, match=r"'kv' is memory of cuda:1.*cannot touch"):
        _ = region.array
    with pytest.raises(BufferError):
        memoryview(region._core)
    assert engine.allocate(4096, "host").device == "cpu"


def test_it_is_kept_alive_as_long_as_the_region(engine: TransferEngine) -> None:
    array = DeviceArray(SHAPE)
    gone = weakref.ref(array)
    region = engine.register(array, "kv")
    del array
    gc.collect()
    assert gone() is not None
    engine.deregister(region)
    del region
    engine.stats()
    gc.collect()
    assert gone() is None


def serve(pipe: Connection, push: bool) -> None:
    """The peer: an array of a GPU of its own, which it shows and overwrites when told."""
    with fake_cuda.in_use(), make_engine("b", push=push) as engine:
        array = DeviceArray(SHAPE, np.float32)
        array.set(values(1))
        region = engine.register(array, "kv")
        lease = engine.grant(region, 0, region.nbytes, ttl_s=300)
        pipe.send((engine.address, lease.token))
        assert pipe.recv() == "written"
        pipe.send(array.get())
        array.set(values(2))
        pipe.send("overwritten")
        assert pipe.recv() == "over"


@pytest.mark.parametrize("push", [False, True], ids=["pulled", "pushed"])
def test_two_processes_move_it_both_ways(push: bool) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    peer_process = spawn.Process(target=serve, args=(theirs, push))
    peer_process.start()
    try:
        with make_engine("a", push=push) as engine:
            assert ours.poll(TIMEOUT_S)
            address, token = ours.recv()
            array = DeviceArray(SHAPE, np.float32)
            region = engine.register(array, "kv")
            remote = engine.connect(address, TIMEOUT_S).regions["kv"]
            assert remote.device == "cuda:0"
            engine.read(region, remote, 0, 0, region.nbytes).wait(TIMEOUT_S)
            assert np.array_equal(array.get(), values(1))
            array.set(values(3))
            engine.write(region, remote, 0, 0, region.nbytes, lease=token).wait(TIMEOUT_S)
            ours.send("written")
            assert ours.poll(TIMEOUT_S)
            assert np.array_equal(ours.recv(), values(3))
            assert ours.recv() == "overwritten"
            engine.read(region, remote, 0, 0, region.nbytes, lease=token).wait(TIMEOUT_S)
            assert np.array_equal(array.get(), values(2))
            ours.send("over")
        peer_process.join(TIMEOUT_S)
        assert peer_process.exitcode == 0
    finally:
        peer_process.kill()
        peer_process.join()


def test_blocks_of_several_arrays_go_to_host_memory_with_their_message(
    engine: TransferEngine,
) -> None:
    layers = [DeviceArray((64, 128), np.uint8) for _ in range(3)]
    for i, layer in enumerate(layers):
        layer.set(np.full((64, 128), i + 1, np.uint8))
    region = engine.register(layers, "layers")
    assert region.piece_offsets == (0, 8192, 16384)
    with make_engine("b") as b:
        target = b.allocate(3 * 128, "kv")
        remote = engine.connect(b.address).regions["kv"]
        offsets = np.array(region.piece_offsets) + 5 * 128
        engine.write(region, remote, offsets, np.arange(3) * 128, 128, notify=b"block 5").wait(
            TIMEOUT_S
        )
        [note] = wait_for(b, b.notifications)
        assert note.payload == b"block 5"
        assert np.array_equal(target.array.reshape(3, 128)[:, 0], [1, 2, 3])


def test_a_read_only_array_is_a_source_and_no_destination(engine: TransferEngine) -> None:
    array = DeviceArray(SHAPE)
    array.read_only = True
    region = engine.register(array, "kv")
    assert not region.writable
    with make_engine("b") as b:
        b.allocate(4096, "kv")
        remote = engine.connect(b.address).regions["kv"]
        engine.write(region, remote, 0, 0, 64).wait(TIMEOUT_S)
        with pytest.raises(InvalidArgumentError, match="read-only"):
            engine.read(region, remote, 0, 0, 64)


class Strange:
    """What is no tensor, with any interface."""

    def __init__(self, interface: object) -> None:
        self._interface = interface

    @property
    def __cuda_array_interface__(self) -> object:
        if isinstance(self._interface, Exception):
            raise self._interface
        return self._interface


def test_what_is_no_contiguous_memory_of_one_gpu_is_refused(engine: TransferEngine) -> None:
    array, other = DeviceArray((8, 8), np.float32), DeviceArray((8, 8), device=1)
    transposed = DeviceArray((8, 8), np.float32)
    transposed.strides = (4, 32)
    host = np.zeros(64, np.uint8)
    wrong: list[tuple[object, str]] = [
        (transposed, "the buffer is not C-contiguous"),
        ([array, host], r"buffers\[1\] is host memory, those before it are a GPU's"),
        ([host, array], r"buffers\[1\] is a GPU's memory, those before it are the host's"),
        ([array, other], "buffer 0 is memory of cuda:0, and buffer 1 of cuda:1"),
        ([array, array], "share memory"),
        (DeviceArray((8,), kind="managed"), "managed memory"),
        (DeviceArray((8,), kind="host"), "pinned host memory"),
        (Strange({"shape": (0,), "typestr": "|u1", "data": (0, False)}), "is empty"),
        (Strange(KeyError("torch.float8_e4m3fn")), r"view\(torch.uint8\)"),
        (Strange({"shape": (4,), "typestr": "|u1"}), "is not what it should be: KeyError"),
        (Strange([4]), "is not what it should be"),
        (
            Strange({"shape": (4,), "typestr": "?", "data": (array.address, False)}),
            "typestr of no known size: '\\?'",
        ),
        (
            Strange({"shape": (4,), "typestr": "|u1", "data": (host.ctypes.data, False)}),
            "not memory that CUDA knows",
        ),
        (
            Strange({"shape": (1 << 20,), "typestr": "|u1", "data": (array.address, False)}),
            "goes beyond its allocation of 256 bytes",
        ),
    ]
    for buffer, text in wrong:
        with pytest.raises(InvalidArgumentError, match=text):
            engine.register(buffer, "kv")
    with pytest.raises(InvalidArgumentError, match='share="never"'):
        engine.register(array, "kv", share="never")
    engine.register([array, DeviceArray((8,))], "kv")  # none of those has taken the name


@pytest.mark.parametrize("transports", [("tcp",), ("shm", "tcp")])
def test_an_engine_that_cannot_move_it_does_not_register_it(transports: tuple[str, ...]) -> None:
    with (
        make_engine("a", transports) as engine,
        pytest.raises(RegistrationError, match=r"'kv' is memory of cuda:0.*copy by the CPU"),
    ):
        engine.register(DeviceArray(SHAPE), "kv")


def test_to_a_peer_without_verbs_nothing_is_sent() -> None:
    with make_engine("a", None) as a, make_engine("b", ("tcp",)) as b:
        b.allocate(4096, "host")
        region = a.register(DeviceArray(SHAPE), "kv")
        peer = a.connect(b.address)
        for move in (a.write, a.read):
            with pytest.raises(
                UnavailableError, match=r"our region 'kv' is memory of cuda:0.*over verbs alone"
            ):
                move(region, peer.regions["host"], 0, 0, 64).wait(TIMEOUT_S)
        assert a.stats()["transport"]["tcp"]["requests"] == 0
        assert "a GPU's memory: nothing (not tcp: it copies by the CPU" in a.explain(peer)


def test_the_error_has_the_reason_of_both_ways(engine: TransferEngine) -> None:
    fake_cuda.set_plan("dmabuf=0")
    with pytest.raises(RegistrationError) as raised:
        engine.register(DeviceArray(SHAPE, kind="mapped"), "kv")
    text = str(raised.value)
    assert "By dma-buf: cuMemGetHandleForAddressRange failed" in text
    assert "By its address: ibv_reg_mr failed: Bad address" in text
    assert "modprobe nvidia_peermem" in text
    assert "expandable_segments:False" in text
    assert raised.value.errno == 14
    fake_verbs.set_plan("peermem=1")
    region = engine.register(DeviceArray(SHAPE, kind="mapped"), "kv")
    assert "by its address (peermem)" in region.registration["verbs"].detail


def test_torchs_cpu_tensors_are_host_memory_as_before(engine: TransferEngine) -> None:
    torch = pytest.importorskip("torch")
    assert engine.register(torch.zeros(64), "kv").device == "cpu"


WITHOUT = """
import numpy as np
from kvxfer.errors import UnavailableError
from kvxfer.transfer import TransferEngine

class Array:
    __cuda_array_interface__ = {"shape": (64,), "typestr": "|u1", "data": (4096, False)}

with TransferEngine("a", transports=("verbs",), secret=b"a secret for tests") as engine:
    engine.register(np.zeros(64, np.uint8), "host")
    try:
        engine.register(Array(), "kv")
    except UnavailableError as error:
        print(error)
"""


def test_without_libcuda_there_is_a_reason() -> None:
    text = run_with_fake_verbs(WITHOUT, KVXFER_LIBCUDA="libnone.so.1")
    assert "the buffer is said to be a GPU's memory, but CUDA does not work here" in text
    assert "libnone.so.1 cannot be opened" in text
    path = str(fake_cuda.library()[0])
    text = run_with_fake_verbs(WITHOUT, KVXFER_LIBCUDA=path, KVXFER_FAKE_CUDA="init=100")
    assert "cuInit failed: CUDA_ERROR_NO_DEVICE (100)" in text


DOCTOR = """
from kvxfer.doctor import examine
print(next(check.detail for check in examine() if check.name == "GPU memory"))
"""


def test_doctor_says_how_a_gpus_memory_could_be_registered() -> None:
    path = str(fake_cuda.library()[0])
    text = run_with_fake_verbs(DOCTOR, KVXFER_LIBCUDA=path)
    assert "cuda:0 Fake GPU 0 (0000:3b:00.0) exports dma-bufs; cuda:1 Fake GPU 1" in text
    assert "no peermem module is loaded" in text
    assert "cannot reach it" not in text
    text = run_with_fake_verbs(DOCTOR, KVXFER_LIBCUDA=path, KVXFER_FAKE_CUDA="dmabuf=0 devices=1")
    assert "exports no dma-buf; no peermem module is loaded: verbs cannot reach it" in text
    text = run_with_fake_verbs(DOCTOR, KVXFER_LIBCUDA=path, KVXFER_FAKE_CUDA="ordering=0")
    assert "only after a flush" in text
    text = run_with_fake_verbs(DOCTOR, KVXFER_LIBCUDA=path, KVXFER_FAKE_CUDA="devices=0")
    assert "CUDA shows this process no GPU" in text
    assert "libnone.so.1" in run_with_fake_verbs(DOCTOR, KVXFER_LIBCUDA="libnone.so.1")


def test_doctor_says_which_nics_each_gpu_prefers(tmp_path: Path) -> None:
    def wire(folder: str, node: int) -> Path:
        place = tmp_path / "devices" / folder
        place.mkdir(parents=True)
        (place / "numa_node").write_text(f"{node}\n")
        (place / "subsystem").symlink_to(tmp_path / "bus")
        (tmp_path / "bus" / "devices").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bus" / "devices" / place.name).symlink_to(place)
        return place

    wire("pci0000:3a/0000:3a:01.0/0000:3b:00.0", 0)
    for name, folder in (
        ("fake0", "0000:3a:02.0/0000:3d:00.0"),
        ("fake1", "0000:3a:01.0/0000:3c:00.0"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "device").symlink_to(wire(f"pci0000:3a/{folder}", 0))
    text = run_with_fake_verbs(
        DOCTOR.replace("GPU memory", "verbs"),
        KVXFER_LIBCUDA=str(fake_cuda.library()[0]),
        KVXFER_FAKE_CUDA="devices=1",
        KVXFER_FAKE_VERBS=f"devices=2 sysfs={tmp_path}",
    )
    assert "fake1:1 (NUMA node 0, PCI pci0000:3a/0000:3a:01.0/0000:3c:00.0)" in text
    assert (
        "; a GPU's memory at 0000:3b:00.0 prefers fake1:1 (behind PCI bridge 0000:3a:01.0) "
        "to fake0:1 (under root complex pci0000:3a)"
    ) in text
