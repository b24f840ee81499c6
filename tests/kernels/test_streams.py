# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""From the public functions to the launch: the current stream, no look at the device, workspaces by stream.

The tensors are on a GPU that is not there: torch's fake ones, which have shapes and addresses, and raise an error where
their values are wanted on the host. A kernel's launch is noted in place of being made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from kvxfer import kernels  # noqa: E402
from kvxfer.kernels import _cuda, _cuda_base, _cuda_decode, _upload  # noqa: E402
from kvxfer.kernels._dispatch import _load  # noqa: E402
from kvxfer.layout import KVLayout  # noqa: E402

built = pytest.mark.skipif(
    _cuda_base.missing is not None, reason=f"not built: {_cuda_base.missing}"
)
LAUNCHES = ("append_kv", "checksum_blocks", "copy_rows", "merge_states", "paged_decode")


class WaitingError(Exception):
    """A copy between host and device that torch waits for, with everything before it on the stream."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        copies = func is torch.ops.aten._to_copy.default and args[0].device != result.device
        if copies and not kwargs.get("non_blocking"):
            raise WaitingError(f"{args[0].device} to {result.device}")
        return result


class Gpu:
    """The extension module, but for its launches; and torch's current stream."""

    INLINE_TABLES = 1 << 20

    def __init__(self) -> None:
        self.cuda_stream, self.capture, self.waited = 7, 0, 0
        self.launches: list[tuple[str, int]] = []
        self.decodes: list[Any] = []
        self.starts: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return self._note(name) if name in LAUNCHES else getattr(_cuda_base.native, name)

    def _note(self, name: str) -> Callable[..., None]:
        def launch(*given: Any, stream: int | None = None, **_: Any) -> None:
            self.launches.append((name, given[-1] if stream is None else stream))
            if name == "paged_decode":
                self.decodes.append(given[0])

        return launch

    def device_count(self) -> int:
        return 1

    def decode_slots(self, _: Any) -> int:
        return 1000

    def address_of(self, tensor: Any) -> int:
        """Far from every other storage's; as with torch's allocator, a dead one's goes to the next."""
        starts, storage = self.starts, tensor.untyped_storage()._cdata
        start = starts.setdefault(storage, (len(starts) + 1) << 40)
        return int(start + tensor.storage_offset() * tensor.element_size())

    def capture_id(self, stream: int) -> int:
        assert stream == self.cuda_stream
        return self.capture

    def synchronize(self) -> None:
        assert not self.capture, "a stream that is captured may not be waited for"
        self.waited += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    for module in (_cuda, _cuda_decode):
        monkeypatch.setattr(module, "native", gpu)
    for name in ("_arrived", "_spare", "_captured", "_slots_by_kernel"):
        monkeypatch.setattr(_cuda_decode, name, {})
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(gpu.capture))
    monkeypatch.setattr(
        FakeTensor, "data_ptr", lambda tensor: gpu.address_of(tensor), raising=False
    )
    with FakeTensorMode(), NoWaiting():
        yield gpu


def on_gpu(*shape: int, dtype: Any = torch.float16) -> Any:
    return torch.empty(*shape, dtype=dtype, device="cuda:0")


def decode(batch: int = 2, columns: int = 512) -> None:
    cache = [on_gpu(9, 16, 2, 64) for _ in range(2)]
    table, lens = on_gpu(batch, columns, dtype=torch.int32), on_gpu(batch, dtype=torch.int32)
    kernels.paged_decode(on_gpu(batch, 8, 64), *cache, table, lens)


def append() -> None:
    cache = [on_gpu(9, 16, 2, 64) for _ in range(2)]
    rows = [on_gpu(3, 2, 64) for _ in range(2)]
    kernels.append_kv(*rows, *cache, on_gpu(3, dtype=torch.int64))


def merge() -> None:
    one, other = ((on_gpu(3, 4, 64), on_gpu(3, 4, dtype=torch.float32)) for _ in range(2))
    kernels.merge_states(*one, *other)


def layout_and_cache() -> tuple[KVLayout, Any]:
    layout = KVLayout.from_order(
        "LKBNHC", num_layers=2, num_blocks=4, block_size=16, num_kv_heads=2, head_dim=64, dtype="float16"
    )  # fmt: skip
    return layout, on_gpu(layout.nbytes, dtype=torch.uint8)


def copy() -> None:
    (layout, src), (_, dst) = layout_and_cache(), layout_and_cache()
    kernels.copy_blocks(layout, [src], layout, [dst], np.array([0, 2]), np.array([3, 1]))


def pack() -> None:
    layout, cache = layout_and_cache()
    kernels.pack_blocks(layout, [cache], np.array([0, 2]))


def checksum() -> None:
    layout, cache = layout_and_cache()
    kernels.checksum_blocks(layout, [cache], np.array([0, 2]))


CALLS: dict[str, Callable[[], None]] = {
    "paged_decode": decode,
    "append_kv": append,
    "merge_states": merge,
    "copy_rows": copy,
    "copy_rows of a pack": pack,
    "checksum_blocks": checksum,
}


@built
@pytest.mark.parametrize("name", CALLS)
def test_a_launch_goes_to_the_current_stream_and_waits_for_nothing(gpu: Gpu, name: str) -> None:
    decode()  # the first one on a device waits until its counters are zeroed, and says so
    assert gpu.waited == 1
    gpu.launches.clear()
    for stream in (7, 9, 7):
        gpu.cuda_stream = stream
        if name == "checksum_blocks":  # whose sums are wanted on the host, after the launch
            with pytest.raises(WaitingError, match="cuda:0 to cpu"):
                CALLS[name]()
        else:
            CALLS[name]()
    assert gpu.launches == [(name.split()[0], stream) for stream in (7, 9, 7)]
    assert gpu.waited == 1


@built
def test_a_look_at_the_device_would_be_seen(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_CHECK_DEVICE_IDS", "1")  # which waits for the device, as it says
    for call in (decode, append):
        with pytest.raises(DataDependentOutputException):
            call()
    assert gpu.launches == []


TRITON = {
    "append": "append_kernel",
    "attention_decode": "decode_kernel merge_splits_kernel",
    "attention_prefill": "prefill_kernel",
    "checksum": "checksum_kernel",
    "copy": "copy_kernel",
    "merge": "merge_kernel",
    "mla": "mla_kernel merge_splits",
}


def prefill() -> None:
    cache = [on_gpu(9, 16, 2, 64) for _ in range(2)]
    ids = [on_gpu(*shape, dtype=torch.int32) for shape in ((3,), (2, 8), (2,))]
    kernels.paged_prefill(on_gpu(9, 8, 64), *cache, *ids)


def mla() -> None:
    ids = [on_gpu(*shape, dtype=torch.int32) for shape in ((2, 8), (2,))]
    q = on_gpu(2, 16, 512), on_gpu(2, 16, 64)
    kernels.mla_decode(*q, on_gpu(9, 16, 576), *ids, sm_scale=0.1)


TRITON_CALLS = {"decode": decode, "prefill": prefill, "append": append, "merge": merge, "copy": copy, "pack": pack, "mla": mla}  # fmt: skip


@pytest.mark.parametrize("name", [*TRITON_CALLS, "checksum"])
def test_tritons_host_code_waits_for_nothing(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    launched: list[str] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return self

        def __call__(self, *given: Any, **options: Any) -> None:
            launched.append(name)

    for module, names in TRITON.items():
        for kernel in names.split():
            monkeypatch.setattr(f"kvxfer.kernels.triton.{module}.{kernel}", Kernel())
    monkeypatch.setattr(_load("triton"), "unavailable", lambda op, device: None)
    monkeypatch.setattr(_cuda, "unavailable", lambda op, device: "not asked for")
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    if name == "checksum":  # whose sums are wanted on the host, after the launch
        with pytest.raises(WaitingError, match="cuda:0 to cpu"):
            checksum()
    else:
        TRITON_CALLS[name]()
    assert launched
    assert gpu.waited == 0


def test_a_plan_is_uploaded_without_waiting(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvxfer.kernels.plan._reached", lambda device: device)
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    plan = kernels.plan_decode([900, 3], **shape, device="cuda:0")
    assert str(plan.items.device) == "cuda:0"


def test_tables_of_a_captured_copy_are_pinned_and_stay(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(_upload, "_kept", kept)
    pinned = []
    monkeypatch.setattr(FakeTensor, "pin_memory", lambda self: pinned.append(self) or self)
    host = torch.zeros(3)
    _upload.upload(host, "cuda:0")
    assert not pinned
    gpu.capture = 1
    _upload.upload(host, "cuda:0")
    assert len(pinned) == len(kept) == 1


@built
def test_streams_have_counters_of_their_own_and_keep_them(gpu: Gpu) -> None:
    for stream in (7, 9, 7, 9):
        gpu.cuda_stream = stream
        decode()
    counters = [p.arrived for p in gpu.decodes]
    assert all(p.num_splits > 1 and p.arrived and p.partial for p in gpu.decodes)
    assert counters[:2] == counters[2:]
    assert counters[0] != counters[1]


@built
def test_a_larger_batch_gets_more_counters_and_other_streams_keep_theirs(gpu: Gpu) -> None:
    decode()
    gpu.cuda_stream = 9
    decode()
    decode(batch=1024)
    decode()
    gpu.cuda_stream = 7
    decode()
    first, second, many, after, again = (p.arrived for p in gpu.decodes)
    assert again == first != second
    assert many == after != second
    assert _cuda_decode._arrived[0, 9].numel() >= 1024 * 2


@built
def test_a_captured_graph_has_counters_of_its_own_and_waits_for_nothing(gpu: Gpu) -> None:
    decode()
    for capture, stream in ((1, 7), (1, 7), (2, 7), (2, 9)):
        gpu.capture, gpu.cuda_stream = capture, stream
        decode()
    gpu.capture, gpu.cuda_stream = 0, 7
    decode()
    plain, one, same, other, another_stream, again = (p.arrived for p in gpu.decodes)
    assert plain == again
    assert one == same
    assert len({plain, one, other, another_stream}) == 4
    assert gpu.waited == 1
