# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Every caller's mistake is refused before memory is touched, naming the argument, the expected and the given."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvxfer import KVLayout, kernels
from kvxfer.errors import InvalidArgumentError, UnavailableError

Change = Callable[[dict[str, Any]], None]


def decode_call() -> dict[str, Any]:
    return {
        "q": np.zeros((2, 4, 16), np.float32),
        "k_cache": np.zeros((5, 8, 2, 16), np.float32),
        "v_cache": np.zeros((5, 8, 2, 16), np.float32),
        "block_table": np.array([[0, 1, -1], [2, 3, 4]], np.int32),
        "seq_lens": np.array([16, 17], np.int32),
    }


def prefill_call() -> dict[str, Any]:
    call = decode_call()
    call["q"] = np.zeros((6, 4, 16), np.float32)
    call["cu_seqlens_q"] = np.array([0, 2, 6], np.int32)
    return call


def append_call() -> dict[str, Any]:
    call = decode_call()
    return {
        "key": np.zeros((3, 2, 16), np.float32),
        "value": np.zeros((3, 2, 16), np.float32),
        "k_cache": call["k_cache"],
        "v_cache": call["v_cache"],
        "slot_mapping": np.array([0, 1, 2], np.int64),
    }


def to(name: str, value: Any) -> Change:
    return lambda call: call.__setitem__(name, value)


def entry(name: str, index: Any, value: Any) -> Change:
    return lambda call: call[name].__setitem__(index, value)


ATTENTION: list[tuple[str, Change, str]] = [
    ("q axes", to("q", np.zeros((2, 64), np.float32)), r"q: expected shape \[.*given \[2, 64\]"),
    ("q dtype", to("q", np.zeros((2, 4, 16))), "q: expected dtype float32 or .*given float64"),
    ("q type", to("q", [[1.0]]), "q: expected a NumPy array or a torch tensor, given list"),
    ("heads", to("q", np.zeros((2, 3, 16), np.float32)), "q: expected num_q_heads .* 2 KV heads, given 3"),
    ("head_dim", to("k_cache", np.zeros((5, 8, 2, 8), np.float32)), r"k_cache: expected shape .*16\].*given"),
    ("kv dtype", to("v_cache", np.zeros((5, 8, 2, 16), np.float16)), "v_cache: expected dtype float32, given float16"),
    ("kv blocks", to("v_cache", np.zeros((4, 8, 2, 16), np.float32)), r"v_cache: expected shape \[5, 8, 2,"),
    ("channels", to("k_cache", np.zeros((5, 8, 2, 32), np.float32)[..., ::2]), "k_cache: .*adjacent.*given stride 2"),
    ("reversed", to("v_cache", np.zeros((5, 8, 2, 16), np.float32)[::-1]), "v_cache: expected strides >= 0"),
    ("block size", lambda c: c.update(k_cache=np.zeros((1, 65537, 2, 16), np.float32), v_cache=np.zeros((1, 65537, 2, 16), np.float32)), "block size from 1 to 65536, given 65537"),
    ("kv_layout", to("kv_layout", "NDH"), "kv_layout: expected 'NHD' or 'HND', given 'NDH'"),
    ("table dtype", to("block_table", np.zeros((2, 3), np.int64)), "block_table: expected dtype int32, given int64"),
    ("lens shape", to("seq_lens", np.zeros((2, 1), np.int32)), r"seq_lens: expected shape"),
    ("lens negative", entry("seq_lens", 1, -4), r"seq_lens\[1\]: expected .* given -4"),
    ("short table", entry("seq_lens", 1, 25), "block_table: expected at least 4 blocks of 8 .*sequence 1, given 3"),
    ("hole", entry("block_table", (0, 1), -1), r"block_table\[0, 1\]: expected a block id from 0 to 4, given -1"),
    ("id", entry("block_table", (1, 2), 5), r"block_table\[1, 2\]: .* given 5"),
    ("huge id", entry("block_table", (1, 0), 2**31 - 1), r"block_table\[1, 0\]: .* given 2147483647"),
    ("window", to("window_left", -2), "window_left: expected >= -1, given -2"),
    ("cap", to("logits_soft_cap", -1.0), "logits_soft_cap: expected a finite value >= 0, given -1.0"),
    ("cap nan", to("logits_soft_cap", float("nan")), "logits_soft_cap: .* given nan"),
    ("scale", to("sm_scale", float("inf")), "sm_scale: expected a finite value, given inf"),
    ("sinks", to("sinks", np.zeros(3, np.float32)), r"sinks: expected shape \[4\], given \[3\]"),
    ("sinks dtype", to("sinks", np.zeros(4)), "sinks: expected dtype float32, given float64"),
    ("out shape", to("out", np.zeros((2, 4, 8), np.float32)), "out: expected shape"),
    ("out dtype", to("out", np.zeros((2, 4, 16), np.float16)), "out: expected dtype float32"),
    ("out is q", lambda c: c.update(out=c["q"]), "out: expected memory of its own, given some of q"),
    ("backend", to("backend", "cublas"), "backend: expected one of auto, cuda, triton, cpu, reference, given 'cublas'"),
]  # fmt: skip


HUGE = 10**400
NUMBERS: list[tuple[str, Any, str]] = [
    ("sm_scale", "x", "sm_scale: expected a finite value, given 'x'"),
    ("sm_scale", HUGE, "sm_scale: expected a finite value, given an integer of 1329 bits"),
    ("sm_scale", True, "sm_scale: expected a finite value, given True"),
    ("k_scale", None, "k_scale: expected a finite value, given None"),
    ("v_scale", np.ones(3), r"v_scale: expected a finite value, given ndarray of shape \[3\]"),
    ("k_scale", np.ones(1), r"k_scale: expected a finite value, given ndarray of shape \[1\]"),
    ("window_left", "3", "window_left: expected an integer >= -1, given '3'"),
    ("window_left", None, "window_left: expected an integer >= -1, given None"),
    ("window_left", float("nan"), "window_left: expected an integer >= -1, given nan"),
    ("window_left", 1.5, "window_left: expected an integer >= -1, given 1.5"),
    (
        "window_left",
        np.float32(2),
        r"window_left: expected an integer >= -1, given 2.0 \(float32\)",
    ),
    ("window_left", True, "window_left: expected an integer >= -1, given True"),
    ("logits_soft_cap", None, "logits_soft_cap: expected a finite value >= 0, given None"),
    ("return_lse", "false", "return_lse: expected True or False, given 'false'"),
]


@pytest.mark.parametrize("op", ["paged_decode", "paged_prefill"])
@pytest.mark.parametrize(("name", "value", "match"), NUMBERS)
def test_attention_takes_numbers_as_they_are_or_not_at_all(
    op: str, name: str, value: Any, match: str
) -> None:
    call = decode_call() if op == "paged_decode" else prefill_call()
    with pytest.raises(InvalidArgumentError, match=match):
        getattr(kernels, op)(**call, **{name: value})


@pytest.mark.parametrize("value", [2.0, "2", True, 2**40, HUGE])
def test_split_size_is_an_integer(value: Any) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"split_size: expected (an integer )?> 0 or None"
    ):
        kernels.paged_decode(**decode_call(), split_size=value)


def test_a_text_is_neither_true_nor_false() -> None:
    with pytest.raises(InvalidArgumentError, match="causal: expected True or False, given 'false'"):
        kernels.paged_prefill(**prefill_call(), causal="false")


def test_numbers_of_numpy_and_windows_past_any_length_are_taken(rng: np.random.Generator) -> None:
    call = decode_call()
    for name in ("q", "k_cache", "v_cache"):
        call[name] = rng.standard_normal(call[name].shape).astype(np.float32)
    want = kernels.paged_decode(**call, sm_scale=0.5, window_left=3, split_size=64, k_scale=2.0)
    numpy: dict[str, Any] = {"sm_scale": np.float32(0.5), "window_left": np.int8(3), "split_size": np.int64(64)}  # fmt: skip
    assert np.array_equal(kernels.paged_decode(**call, **numpy, k_scale=np.array(2.0)), want)
    unlimited = kernels.paged_decode(**call)
    assert np.array_equal(kernels.paged_decode(**call, window_left=2**62), unlimited)


@pytest.mark.parametrize("value", [2.5, "2", None, 2**40, True])
def test_the_number_of_threads_is_an_integer(value: Any) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"num_threads: expected (an integer )?1 to 1024"
    ):
        kernels.set_num_threads(value)


def swapped(array: Any) -> Any:
    return array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name)
     for op, call in (("paged_decode", decode_call()), ("paged_prefill", prefill_call()), ("append_kv", append_call()))
     for name in call],
)  # fmt: skip
def test_numbers_in_the_other_byte_order_are_refused(op: str, name: str, backend: str) -> None:
    # Once: they were read as if in this machine's, which gives other numbers.
    made = {"paged_decode": decode_call, "paged_prefill": prefill_call, "append_kv": append_call}
    call = made[op]()
    call[name] = swapped(call[name])
    with pytest.raises(InvalidArgumentError, match=f"{name}: expected dtype .* of the other byte order"):  # fmt: skip
        getattr(kernels, op)(**call, backend=backend)


def test_the_other_byte_order_is_refused_everywhere_else() -> None:
    call = decode_call()
    v, lse = np.zeros((2, 4, 16), np.float32), np.zeros((2, 4), np.float32)
    match = "of the other byte order"
    with pytest.raises(InvalidArgumentError, match="out: .*" + match):
        kernels.paged_decode(**call, out=swapped(v))
    with pytest.raises(InvalidArgumentError, match="sinks: .*" + match):
        kernels.paged_decode(**call, sinks=swapped(np.zeros(4, np.float32)))
    with pytest.raises(InvalidArgumentError, match="k_cache: .*" + match):
        kernels.BoundCache(swapped(call["k_cache"]), swapped(call["v_cache"]))
    for wrong in range(4):
        arrays = [v, lse, v, lse]
        arrays[wrong] = swapped(arrays[wrong])
        with pytest.raises(InvalidArgumentError, match=match):
            kernels.merge_states(*arrays)
    half = call["k_cache"].astype(np.uint16)  # bfloat16's
    with pytest.raises(InvalidArgumentError, match="k_cache: .*" + match):
        kernels.paged_decode(**call | {"k_cache": swapped(half), "v_cache": swapped(half)})


@pytest.mark.parametrize("op", ["paged_decode", "paged_prefill"])
def test_a_length_past_the_table_is_refused_before_anything_that_long_is_made(
    op: str, backend: str
) -> None:
    # Once: the reference made positions of 16 GiB first, and the process was killed.
    call = decode_call() if op == "paged_decode" else prefill_call()
    call["seq_lens"][1] = 2**31 - 1
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgumentError, match="block_table: expected at least 268435456 blocks of 8"):  # fmt: skip
            getattr(kernels, op)(**call, backend=backend)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_caches_that_overlap_or_repeat_are_not_written(backend: str) -> None:
    call = append_call()
    k = call["k_cache"]
    with pytest.raises(InvalidArgumentError, match="v_cache: expected memory of its own, given some of k_cache"):  # fmt: skip
        kernels.append_kv(**call | {"v_cache": k}, backend=backend)
    one = np.zeros((1, 8, 2, 16), np.float32)
    repeated = np.lib.stride_tricks.as_strided(one, (5, 8, 2, 16), (0, *one.strides[1:]))
    for name in ("k_cache", "v_cache"):
        with pytest.raises(InvalidArgumentError, match=rf"{name}: expected each element at a place of its own, given strides \[0, "):  # fmt: skip
            kernels.append_kv(**call | {name: repeated}, backend=backend)
    fused = np.zeros((5, 8, 2, 2, 16), np.float32)
    kernels.append_kv(**call | {"k_cache": fused[:, :, 0], "v_cache": fused[:, :, 1]}, backend=backend)  # fmt: skip


def test_an_expanded_out_is_refused(backend: str) -> None:
    one = np.zeros((1, 4, 16), np.float32)
    out = np.lib.stride_tricks.as_strided(one, (2, 4, 16), (0, *one.strides[1:]))
    with pytest.raises(InvalidArgumentError, match="out: expected each element at a place"):
        kernels.paged_decode(**decode_call(), out=out, backend=backend)
    torch = pytest.importorskip("torch")
    call = {name: torch.from_numpy(value) for name, value in decode_call().items()}
    with pytest.raises(InvalidArgumentError, match="out: expected each element at a place"):
        kernels.paged_decode(**call, out=torch.zeros(1, 4, 16).expand(2, 4, 16), backend=backend)


def ops_and_changes() -> list[Any]:
    # The table's q and out have decode's shape, so those rows are for decode alone.
    return [
        pytest.param(op, change, match, id=f"{op}: {name}")
        for op in ("paged_decode", "paged_prefill")
        for name, change, match in ATTENTION
        if op == "paged_decode" or not name.startswith(("q", "out", "heads"))
    ]


@pytest.mark.parametrize(("op", "change", "match"), ops_and_changes())
def test_attention_refuses(op: str, change: Change, match: str, backend: str) -> None:
    call = decode_call() if op == "paged_decode" else prefill_call()
    call["backend"] = backend
    change(call)
    with pytest.raises(InvalidArgumentError, match=match):
        getattr(kernels, op)(**call)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (entry("cu_seqlens_q", 0, 1), r"cu_seqlens_q: expected not descending from 0 to 6"),
        (entry("cu_seqlens_q", 2, 5), r"from 0 to 6 \(rows of q\), given \[0, 2, 5\]"),
        (entry("cu_seqlens_q", 1, 7), "not descending"),
        (
            to("cu_seqlens_q", np.zeros(2, np.int32)),
            r"cu_seqlens_q: expected shape \[3\], given \[2\]",
        ),
        (entry("seq_lens", 0, 1), r"seq_lens\[0\]: expected at least the 2 new tokens"),
    ],
)
def test_prefill_refuses(change: Change, match: str, backend: str) -> None:
    call = prefill_call() | {"backend": backend}
    change(call)
    with pytest.raises(InvalidArgumentError, match=match):
        kernels.paged_prefill(**call)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (to("key", np.zeros((3, 1, 16), np.float32)), "key: expected num_kv_heads 2 like k_cache"),
        (to("value", np.zeros((2, 2, 16), np.float32)), r"value: expected shape \[3, 2, 16\]"),
        (
            to("value", np.zeros((3, 2, 16), np.float16)),
            "value: expected dtype float32, given float16",
        ),
        (
            to("slot_mapping", np.zeros(3, np.int32)),
            "slot_mapping: expected dtype int64, given int32",
        ),
        (entry("slot_mapping", 2, 40), r"slot_mapping\[2\]: .*0 to 39 \(5 blocks of 8\), given 40"),
        (to("k_scale", None), "k_scale: expected a finite value > 0, given None"),
        (to("v_scale", np.ones(2)), "v_scale: expected a finite value > 0, given ndarray"),
        (to("k_scale", 0.0), "k_scale: expected a finite value > 0, given 0.0"),
        (lambda c: c["v_cache"].setflags(write=False), "v_cache: expected a writable array"),
    ],
)
def test_append_refuses(change: Change, match: str, backend: str) -> None:
    call = append_call() | {"backend": backend}
    change(call)
    with pytest.raises(InvalidArgumentError, match=match):
        kernels.append_kv(**call)


def test_libraries_may_not_be_mixed() -> None:
    torch = pytest.importorskip("torch")
    call = decode_call()
    call["block_table"] = torch.from_numpy(call["block_table"])
    with pytest.raises(
        InvalidArgumentError, match="block_table: expected a NumPy array on cpu like q"
    ):
        kernels.paged_decode(**call)


def elsewhere(call: dict[str, Any], name: str) -> tuple[dict[str, Any], Any]:
    """The call with tensors, and one of them on the device that has no memory."""
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(value) for key, value in call.items()}
    return tensors, tensors[name].to("meta")


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name)
     for op, call in (("paged_decode", decode_call()), ("append_kv", append_call()))
     for name in [*call][1:]],
)  # fmt: skip
def test_arrays_on_two_devices_are_refused(op: str, name: str, backend: str) -> None:
    call, tensor = elsewhere(decode_call() if op == "paged_decode" else append_call(), name)
    match = f"^{name}: expected a torch tensor on cpu like {next(iter(call))}, given a torch tensor on meta"
    run = getattr(kernels, op)
    run(**call, backend=backend)  # so that a call like it has been seen
    before = {key: value.clone() for key, value in call.items()}
    with pytest.raises(InvalidArgumentError, match=match):
        run(**call | {name: tensor}, backend=backend)
    assert all(value.equal(before[key]) for key, value in call.items())


@pytest.mark.parametrize("name", ["out", "sinks"])
def test_what_decode_may_be_given_is_on_the_same_device(name: str, backend: str) -> None:
    given = {"out": np.zeros((2, 4, 16), np.float32), "sinks": np.zeros(4, np.float32)}
    call, tensor = elsewhere(decode_call() | given, name)
    match = f"^{name}: expected a torch tensor on cpu like q, given a torch tensor on meta"
    with pytest.raises(InvalidArgumentError, match=match):
        kernels.paged_decode(**call | {name: tensor}, backend=backend)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("src", "^dst: expected memory on meta like src, of another GPU.*, given cpu"),
        ("dst", "^dst: expected memory on cpu like src, of another GPU.*, given meta"),
    ],
)
def test_a_copy_between_devices_that_no_kernel_reaches_is_refused(
    name: str, match: str, backend: str
) -> None:
    torch = pytest.importorskip("torch")
    layout = KVLayout.from_order("LKBNHC", num_layers=1, num_blocks=3, block_size=4, num_kv_heads=2, head_dim=8, dtype="float32")  # fmt: skip
    sides = {"src": torch.ones(layout.nbytes, dtype=torch.uint8), "dst": torch.zeros(layout.nbytes, dtype=torch.uint8)}  # fmt: skip

    def copy(src: Any, dst: Any) -> None:
        kernels.copy_blocks(layout, src, layout, dst, [0, 1], [1, 2], backend=backend)

    copy(**sides)  # so that a copy like it has been made
    sides["dst"].zero_()
    with pytest.raises(InvalidArgumentError, match=match):
        copy(**sides | {name: sides[name].to("meta")})
    assert not sides["dst"].any()
    halves = [*sides[name].chunk(2)]
    halves[1] = halves[1].to("meta")
    with pytest.raises(InvalidArgumentError, match=f"^{name}: expected all of its memory on cpu like its first array, given meta"):  # fmt: skip
        copy(**sides | {name: halves})
    assert not sides["dst"].any()


def test_tensors_in_tensors_out_and_no_copy_of_the_cache() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        call = {name: torch.from_numpy(value) for name, value in decode_call().items()}
        for name in ("q", "k_cache", "v_cache"):
            call[name] = torch.randn(call[name].shape).to(dtype)
        key = torch.randn(1, 2, 16).to(dtype)
        kernels.append_kv(
            key, key, call["k_cache"], call["v_cache"], torch.tensor([3]), kv_layout="NHD"
        )
        assert torch.equal(call["k_cache"][0, 3], key[0])
        out = kernels.paged_decode(**call)
        assert out.dtype == dtype
        mine = torch.empty_like(call["q"])
        assert kernels.paged_decode(**call, out=mine) is mine
        assert torch.equal(out, mine)


def test_an_explicit_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(UnavailableError, match="cuda") as caught:
        kernels.paged_decode(**decode_call(), backend="cuda")
    assert caught.value.reason


def test_explain_names_the_choice_and_every_other_reason() -> None:
    text = kernels.explain("paged_decode", np.zeros(1, np.float32))
    assert text.startswith("paged_decode on cpu: ")
    for name in ("cuda", "triton", "cpu", "reference"):
        assert f"  {name}: " in text
    assert set(kernels.backend_reasons("pack_blocks")) == {"cuda", "triton", "cpu", "reference"}
    with pytest.raises(InvalidArgumentError, match="op: expected one of"):
        kernels.explain("attention")
