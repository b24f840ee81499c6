# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Mistakes are refused at the call, before anything is sent, naming what was wrong."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transfer_peers import SECRET, TIMEOUT_S

from kvxfer.errors import InvalidArgumentError, RegistrationError, UnavailableError
from kvxfer.transfer import BlockView, EngineConfig, TlsFiles, TransferEngine

Pair = tuple[TransferEngine, TransferEngine]
i64 = np.int64


def offsets(*values: int) -> np.ndarray:
    return np.array(values, i64)


BAD_SPANS: list[tuple[str, dict[str, Any], str]] = [
    ("past the local end", {"local_offsets": 995}, "span 0: local offset 995"),
    ("past the remote end", {"remote_offsets": 991}, "span 0: remote offset 991"),
    ("negative", {"remote_offsets": -1}, r"remote_offsets\[0\] = -1"),
    ("zero bytes", {"nbytes": 0}, "not positive"),
    ("overlap", {"local_offsets": offsets(0, 10), "remote_offsets": offsets(0, 5)}, "overlap"),
    ("same slot twice", {"local_offsets": offsets(0, 10), "remote_offsets": 7}, "overlap"),
    ("lengths", {"local_offsets": offsets(0, 1), "remote_offsets": offsets(0, 100, 200)}, "3"),
    ("int32", {"local_offsets": np.array([0], np.int32)}, r"int64 .*not dtype int32, shape \[1\]"),
    ("uint64", {"local_offsets": np.array([0], np.uint64)}, "not dtype uint64"),
    ("float64", {"local_offsets": np.zeros(2)}, r"not dtype float64, shape \[2\]"),
    ("bool array", {"local_offsets": np.zeros(2, bool)}, "not dtype bool"),
    ("big-endian", {"local_offsets": np.zeros(2, ">i8")}, "not dtype int64, big-endian"),
    ("complex", {"local_offsets": np.zeros(2, "c8")}, "not dtype of buffer format 'Zf'"),
    ("float", {"nbytes": 1.0}, "int64"),
    ("bool", {"nbytes": True}, "int64"),
    ("list", {"local_offsets": [0]}, "not list"),
    ("tensor", {"local_offsets": torch.tensor([0, 10])}, "an int or .* int64 array, not Tensor"),
    ("matrix", {"local_offsets": np.zeros((2, 2), i64)}, "one-dimensional"),
    (
        "strided",
        {"local_offsets": np.zeros(4, i64)[::2], "remote_offsets": offsets(0, 10)},
        "strided",
    ),
    ("beyond 64 bits", {"local_offsets": 1 << 70}, "64 bits"),
    ("bases shape", {"bases": np.zeros((2, 3), i64)}, r"\[m, 2\]"),
    ("bases overlap", {"bases": np.zeros((2, 2), i64)}, "overlap"),
    ("bases past the end", {"bases": offsets(0, 0, 0, 995).reshape(2, 2)}, "span 1: remote"),
    ("lease text", {"lease": "token"}, "bytes"),
    ("lease nonsense", {"lease": b"token"}, "not a lease token"),
    ("notify text", {"notify": "x"}, "bytes"),
    ("deadline", {"deadline_s": -1.0}, "negative"),
    ("deadline nan", {"deadline_s": float("nan")}, "negative"),
]


@pytest.mark.parametrize(
    ("change", "message"), [c[1:] for c in BAD_SPANS], ids=[c[0] for c in BAD_SPANS]
)
def test_bad_spans_are_refused_at_the_call(
    pair: Pair, change: dict[str, Any], message: str
) -> None:
    a, b = pair
    local = a.register(np.zeros(1000, np.uint8), "kv")
    b.register(np.ones(1000, np.uint8), "kv")
    remote = a.connect(b.address).regions["kv"]
    arguments: dict[str, Any] = {"local_offsets": 0, "remote_offsets": 0, "nbytes": 10} | change
    with pytest.raises(InvalidArgumentError, match=message):
        a.write(local, remote, **arguments)
    assert a.stats()["transfers"]["in_flight"] == 0
    assert a.stats()["transport"].get("tcp", {}).get("requests", 0) == 0


def test_one_bad_span_among_a_thousand_is_named_and_nothing_is_sent(pair: Pair) -> None:
    a, b = pair
    local = a.allocate(1 << 20, "kv")
    local.array[:] = 1
    target = b.allocate(1 << 20, "kv")
    remote = a.connect(b.address).regions["kv"]
    slots = np.arange(1000, dtype=i64) * 1024
    there = slots.copy()
    there[617] = (1 << 20) - 1023
    with pytest.raises(InvalidArgumentError, match=r"span 617.*1048577"):
        a.write(local, remote, slots, there, 1024)
    assert not target.array.any()


def test_read_only_buffer_is_a_source_but_no_destination(pair: Pair) -> None:
    a, b = pair
    fixed = a.register(bytes(range(100)), "fixed")
    assert not fixed.writable
    assert not fixed.array.flags.writeable
    theirs = b.register(np.zeros(100, np.uint8), "theirs")
    peer = a.connect(b.address)
    a.write(fixed, peer.regions["theirs"], 0, 0, 100).wait(TIMEOUT_S)
    assert theirs.array.tobytes() == bytes(range(100))
    with pytest.raises(InvalidArgumentError, match="'fixed' is read-only"):
        a.read(fixed, peer.regions["theirs"], 0, 0, 100)
    back = b.connect(a.address)
    with pytest.raises(InvalidArgumentError, match="'fixed' is read-only"):
        b.write(theirs, back.regions["fixed"], 0, 0, 100)
    b.read(theirs, back.regions["fixed"], 0, 0, 100).wait(TIMEOUT_S)


def test_overlapping_sources_are_fine(pair: Pair) -> None:
    a, b = pair
    local = a.register(np.arange(100, dtype=np.uint8), "kv")
    theirs = b.register(np.zeros(100, np.uint8), "kv")
    a.write(local, a.connect(b.address).regions["kv"], 0, offsets(0, 20), 10).wait(TIMEOUT_S)
    assert theirs.array[:10].tobytes() == theirs.array[20:30].tobytes() == bytes(range(10))


BAD_BUFFERS: list[tuple[str, Callable[[], Any], str]] = [
    ("strided", lambda: np.zeros((4, 4), np.uint8)[:, ::2], "not C-contiguous"),
    ("fortran", lambda: np.zeros((4, 4), np.float32, order="F"), "not C-contiguous"),
    (
        "tensor with gradients",
        lambda: torch.zeros(4, requires_grad=True),
        "lend its memory.*detach",
    ),
    ("strided tensor", lambda: torch.zeros(4, 4).t(), "not C-contiguous"),
    ("number", lambda: 5, "neither the buffer protocol"),
    ("empty", lambda: np.zeros(0, np.uint8), "empty"),
    ("no buffers", list, "empty"),
    ("one bad of two", lambda: [np.zeros(4), np.zeros((4, 4))[:, 1]], r"buffers\[1\]"),
]


@pytest.mark.parametrize(
    ("make", "message"), [c[1:] for c in BAD_BUFFERS], ids=[c[0] for c in BAD_BUFFERS]
)
def test_bad_buffers_are_refused(pair: Pair, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        pair[0].register(make())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_torch_tensors_are_registered_in_place(pair: Pair, dtype: torch.dtype) -> None:
    a, b = pair
    tensor = torch.arange(64).to(dtype).reshape(4, 16)
    target = torch.zeros_like(tensor)
    region = a.register(tensor, "kv")
    assert region.nbytes == tensor.numel() * tensor.element_size()
    b.register(target, "kv")
    a.write(region, a.connect(b.address).regions["kv"], 0, 0, region.nbytes).wait(TIMEOUT_S)
    assert torch.equal(tensor, target)


def test_several_buffers_are_one_offset_space(pair: Pair) -> None:
    a, b = pair
    parts = [
        np.arange(10, dtype=np.uint8),
        np.arange(10, 15, dtype=np.uint8),
        np.arange(15, 40, dtype=np.uint8),
    ]
    region = a.register(parts, "kv")
    assert (region.nbytes, region.piece_offsets) == (40, (0, 10, 15))
    theirs = b.register(np.zeros(40, np.uint8), "kv")
    a.write(region, a.connect(b.address).regions["kv"], 5, 0, 30).wait(TIMEOUT_S)
    assert theirs.array[:30].tolist() == list(range(5, 35))
    with pytest.raises(InvalidArgumentError, match="3 pieces"):
        _ = region.array


def test_region_keeps_its_buffer_until_it_is_deregistered(pair: Pair) -> None:
    a, _ = pair
    buffer = np.zeros(100, np.uint8)
    alive = weakref.ref(buffer)
    region = a.register(buffer)
    del buffer
    gc.collect()
    assert alive() is not None
    a.deregister(region)
    del region
    gc.collect()
    a.stats()  # a call that empties the graveyard
    assert alive() is None


def test_region_in_use_is_not_deregistered(pair: Pair) -> None:
    a, b = pair
    local = a.allocate(64 << 20, "kv")
    b.allocate(64 << 20, "kv")
    xfer = a.write(local, a.connect(b.address).regions["kv"], 0, 0, local.nbytes)
    with pytest.raises(InvalidArgumentError, match="in use by 1"):
        a.deregister(local)
    xfer.wait(TIMEOUT_S)
    a.deregister(local)
    a.deregister(local)


def test_foreign_regions_and_peers_are_refused(pair: Pair) -> None:
    a, b = pair
    mine, theirs = a.allocate(100, "kv"), b.allocate(100, "kv")
    peer = a.connect(b.address)
    with pytest.raises(InvalidArgumentError, match="not registered with this engine"):
        a.write(theirs, peer.regions["kv"], 0, 0, 10)
    with pytest.raises(InvalidArgumentError, match="another engine"):
        b.write(theirs, peer.regions["kv"], 0, 0, 10)
    with pytest.raises(InvalidArgumentError, match="not a peer"):
        b.notify(peer, b"x")
    with pytest.raises(InvalidArgumentError, match="not registered"):
        b.grant(mine, 0, 10, ttl_s=1)
    a.deregister(mine)
    with pytest.raises(InvalidArgumentError, match="not registered"):
        a.write(mine, peer.regions["kv"], 0, 0, 10)


def test_memory_that_is_not_registered_is_refused(pair: Pair) -> None:
    a, b = pair
    buffer: Any = np.zeros(100, np.uint8)
    mine = a.allocate(100, "kv")
    b.allocate(100, "kv")
    theirs = a.connect(b.address).regions["kv"]
    view = BlockView(base=0, block_stride=10, nbytes=10)
    ids = np.array([1], np.int64)
    for call in (a.write, a.read):
        with pytest.raises(InvalidArgumentError, match=r"not ndarray.*engine\.register"):
            call(buffer, theirs, 0, 0, 10)
        with pytest.raises(InvalidArgumentError, match=r"not ndarray.*peer\.regions"):
            call(mine, buffer, 0, 0, 10)
        with pytest.raises(InvalidArgumentError, match=r"not Region.*peer\.regions"):
            call(mine, cast(Any, mine), 0, 0, 10)
    for blocks in (a.write_blocks, a.read_blocks):
        with pytest.raises(InvalidArgumentError, match=r"not ndarray.*engine\.register"):
            blocks(buffer, theirs, view, view, ids, ids)
        with pytest.raises(InvalidArgumentError, match=r"not ndarray.*peer\.regions"):
            blocks(mine, buffer, view, view, ids, ids)
    with pytest.raises(InvalidArgumentError, match=r"not ndarray.*engine\.register"):
        a.grant(buffer, 0, 10, ttl_s=1)
    with pytest.raises(InvalidArgumentError, match=r"not ndarray.*engine\.register"):
        a.deregister(buffer)


def test_bad_grants_are_refused(pair: Pair) -> None:
    a, _ = pair
    region = a.allocate(100, "kv")
    for arguments, message in [
        ((region, 95, 10), "past the end"),
        ((region, offsets(), 10), "at least one span"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            a.grant(*arguments, ttl_s=1)
    for ttl_s in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match="ttl_s"):
            a.grant(region, 0, 10, ttl_s=ttl_s)
    with pytest.raises(InvalidArgumentError, match="32 hex"):
        a.grant(region, 0, 10, ttl_s=1, peer="abc")
    lease = a.grant(region, 0, 10, ttl_s=60, num_arrivals=4)
    assert len(lease.token) <= 128
    with pytest.raises(InvalidArgumentError, match="4"):
        lease.wait_arrived(4, 1)


def test_bad_engines_are_refused() -> None:
    for arguments, message in [
        ({"listen": "nonsense"}, "host:port"),
        ({"listen": "127.0.0.1:99999"}, "0 to 65535"),
        ({"listen": "::1:5"}, r"\[::1\]"),
        ({"listen": "0.0.0.0:0"}, "explicit secret"),
        ({"transports": ("teleport",)}, "unknown transport 'teleport'"),
        ({"transports": "tcp"}, "sequence"),
        ({"transports": ()}, "empty"),
        ({"secret": b""}, "secret is empty"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            TransferEngine("bad", **arguments)  # type: ignore[arg-type]
    with TransferEngine("first", secret=SECRET) as first:
        with pytest.raises(UnavailableError, match="cannot listen"):
            TransferEngine("second", listen=first.address, secret=SECRET)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("deadline_s", -1.0, "deadline_s"),
        ("deadline_s", float("nan"), "deadline_s"),
        ("num_lanes", 0, "1 to 8, not 0"),
        ("num_lanes", 2.0, "1 to 8, not 2.0"),
        ("num_lanes", True, "not True"),
        ("copy_threads", -1, "0 to 64, not -1"),
        ("copy_threads", 65, "0 to 64, not 65"),
        ("spin_us", -1, "spin_us"),
        ("spin_us", "20", "not '20'"),
        ("allow_ptrace", 1, "True or False"),
        ("verbs_push", "yes", "verbs_push must be True or False, not 'yes'"),
        ("tls", ("a", "b", "c"), "TlsFiles"),
        ("verbs_device", "", "verbs_device"),
        ("verbs_device", "mlx5_0:x", "not 'mlx5_0:x'"),
        ("verbs_device", "mlx5_0,", "not 'mlx5_0,'"),
        ("verbs_device", "mlx5_0, mlx5_1", "separated by commas"),
        ("verbs_device", "mlx5_0:0", "port 0; ports are 1 to 255"),
        ("verbs_device", "mlx5_1,mlx5_0:257", "'mlx5_0:257' names port 257"),
        ("verbs_device", "mlx5_0:1,mlx5_0:1", "names mlx5_0:1 more than once"),
        ("verbs_gid_index", -1, "0 to 255, not -1"),
        ("verbs_queue_pairs", 0, "1 to 8, not 0"),
    ],
)
def test_bad_configs_are_refused_where_they_are_made(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        EngineConfig(**{field: value})


def test_tls_files_must_exist(tmp_path: Path) -> None:
    there = tmp_path / "there.pem"
    there.write_text("")
    with pytest.raises(InvalidArgumentError, match=r"tls\.key: there is no file"):
        TlsFiles(there, tmp_path / "absent.pem", there)
    with pytest.raises(InvalidArgumentError, match="must be a path"):
        TlsFiles(there, there, "")


def test_config_reaches_the_transports(tmp_path: Path) -> None:
    pem = tmp_path / "pem"
    pem.write_text("")
    native = EngineConfig(
        num_lanes=3,
        copy_threads=2,
        spin_us=1.5,
        allow_ptrace=True,
        tls=TlsFiles(pem, str(pem), pem),
        deadline_s=2.5,
        verbs_device="mlx5_0:2,mlx5_1",
        verbs_gid_index=3,
        verbs_queue_pairs=4,
        verbs_push=True,
    ).native()
    assert (native.num_lanes, native.copy_threads, native.spin_ns) == (3, 2, 1500)
    assert native.allow_ptrace
    assert native.tls_certificate == native.tls_key == native.tls_authority == str(pem)
    assert (native.verbs_device, native.verbs_gid_index) == ("mlx5_0:2,mlx5_1", 3)
    assert native.verbs_queue_pairs == 4
    assert native.verbs_push
    assert native.deadline_ns == 2_500_000_000
    default = EngineConfig(deadline_s=math.inf).native()
    assert (default.deadline_ns, default.verbs_device) == (2**63 - 1, "")
    assert default.verbs_gid_index == -1
    assert not default.verbs_push  # memory is written by its owner alone, unless asked for
    assert (default.copy_threads, default.spin_ns, default.tls_key) == (-1, 20_000, "")


def test_impossible_allocation_is_an_error_not_an_oom(pair: Pair) -> None:
    with pytest.raises(RegistrationError, match="smaller"):
        pair[0].allocate(1 << 45, "kv")
    with pytest.raises(InvalidArgumentError, match="at least one byte"):
        pair[0].allocate(0)


def test_region_names_are_unique(pair: Pair) -> None:
    a, _ = pair
    a.allocate(10, "kv")
    with pytest.raises(InvalidArgumentError, match="exists"):
        a.allocate(10, "kv")
    assert a.allocate(10).name != a.allocate(10).name


def test_allocated_memory_is_sealed_zeroed_and_outlives_its_engine() -> None:
    with TransferEngine("a", secret=SECRET) as a:
        array = a.allocate(5000, "kv").array
        assert array.nbytes == 5000
        assert not array.any()
    array[:] = 3
    assert array.sum() == 15000


def test_closed_engine_refuses_everything(pair: Pair) -> None:
    a, b = pair
    region = a.allocate(10, "kv")
    peer = a.connect(b.address)
    a.close()
    for call in (
        lambda: a.allocate(10),
        lambda: a.register(bytearray(10)),
        lambda: a.connect(b.address),
        lambda: a.notify(peer, b"x"),
        lambda: a.grant(region, 0, 10, ttl_s=1),
    ):
        with pytest.raises(InvalidArgumentError, match="closed"):
            call()
    a.close()
    assert a.notifications() == []
