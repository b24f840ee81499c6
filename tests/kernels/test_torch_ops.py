# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""torch.ops.kvxfer: registered as PyTorch wants it, and the same numbers inside a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError, UnavailableError
from kvxfer.kernels.torch_ops import plan_tensors

ops = torch.ops.kvxfer


def arguments(op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    table = torch.tensor([[3, 0, -1], [1, 2, 4]], dtype=torch.int32)
    lens = torch.tensor([5, 11], dtype=torch.int32)
    k, v = values(6, 4, 2, 16), values(6, 4, 2, 8)
    if op == "append_kv":
        slots = torch.tensor([4, -1, 9])
        return (values(3, 2, 16), values(3, 2, 8), k, v, slots), {"k_scale": 2.0}
    if op == "append_kv_scaled":
        eight = [torch.zeros(6, 4, 2, 16, dtype=torch.int8) for _ in range(2)]
        scales = {f"{name}_scale_cache": torch.zeros(6, 4, 2) for name in "kv"}
        return (values(3, 2, 16), values(3, 2, 16), *eight, torch.tensor([4, -1, 9])), scales
    if op == "paged_decode":
        return (values(2, 4, 16), k, v, table, lens), {"window_left": 6, "sinks": values(4)}
    if op == "paged_decode_planned":
        plan = kernels.plan_decode(
            lens, num_q_heads=4, num_kv_heads=2, head_dim=16, block_size=4, window_left=6
        )
        return (values(2, 4, 16), k, v, table, lens), {"window_left": 6, **plan_tensors(plan)}
    if op == "paged_prefill":
        starts = torch.tensor([0, 2, 9], dtype=torch.int32)
        return (values(9, 4, 16), k, v, starts, table, lens), {"logits_soft_cap": 5.0}
    if op == "mla_decode":
        cache = values(6, 4, 24)
        return (values(2, 4, 16), values(2, 4, 8), cache, table, lens), {"sm_scale": 0.3}
    lse = [values(5, 3) for _ in range(2)]
    return (values(5, 3, 8), lse[0], values(5, 3, 8), lse[1]), {}


NAMES = ["append_kv", "append_kv_scaled", "paged_decode", "paged_decode_planned", "paged_prefill", "mla_decode", "merge_states"]  # fmt: skip


def overload(name: str) -> Any:
    return getattr(ops, name.removesuffix("_scaled").removesuffix("_planned")).default


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes(name: str) -> None:
    args, options = arguments(name)
    results = torch.library.opcheck(overload(name), args, options)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_graph_computes_the_same(name: str) -> None:
    op = overload(name)

    def step(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        doubled = (args[0] * 2, *args[1:])
        result = op(*doubled, **options)
        return result[0] + 1 if result is not None else args[2] + 0

    compiled: Callable[..., Any] = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain_args, plain_options = arguments(name)
    args, options = arguments(name)
    torch.testing.assert_close(compiled(args, options), step(plain_args, plain_options), rtol=0, atol=0)  # fmt: skip
    for ours, theirs in zip(args, plain_args, strict=True):
        assert torch.equal(ours, theirs), "what an operator writes must be written in the graph too"
    for key, value in options.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, plain_options[key])


GRADIENTS = ["paged_decode", "paged_prefill", "mla_decode", "merge_states"]


@pytest.mark.parametrize("name", GRADIENTS)
def test_going_backward_is_an_error_instead_of_no_gradient(name: str) -> None:
    args, options = arguments(name)
    first = args[0].requires_grad_()
    out = overload(name)(*args, **options)[0]
    assert out.requires_grad
    with pytest.raises(UnavailableError, match=f"torch.ops.kvxfer.{name} has no gradient"):
        out.sum().backward()
    assert first.grad is None
    with torch.no_grad():
        assert not overload(name)(*args, **options)[0].requires_grad


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_function_that_is_asked_for_gradients_says_that_it_has_none(name: str) -> None:
    args, options = arguments(name)
    run = getattr(kernels, name)
    want = run(*args, **options)
    args[0].requires_grad_()
    with pytest.raises(
        InvalidArgumentError, match=r"expected no gradient to be asked for.*no_grad"
    ):
        run(*args, **options)
    with torch.no_grad():
        ours = run(*args, **options)
    assert torch.equal(ours[0], want[0])
    assert torch.equal(run(args[0].detach(), *args[1:], **options)[0], want[0])


def test_learned_sinks_are_no_exception() -> None:
    args, options = arguments("paged_decode")
    options["sinks"].requires_grad_()
    with pytest.raises(InvalidArgumentError, match="sinks: expected no gradient to be asked for"):
        kernels.paged_decode(*args, **options)
    with pytest.raises(UnavailableError, match="has no gradient"):
        ops.paged_decode(*args, **options)[0].sum().backward()


def test_opcheck_passes_with_gradients_asked_for() -> None:
    args, options = arguments("paged_decode")
    args[0].requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    results = torch.library.opcheck(ops.paged_decode.default, args, options, test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}


def test_an_operator_is_its_function() -> None:
    args, options = arguments("paged_decode")
    expected = kernels.paged_decode(*args, return_lse=True, **options)
    for ours, theirs in zip(ops.paged_decode(*args, **options), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_mistakes_are_refused_through_the_operator_too() -> None:
    args, _ = arguments("merge_states")
    with pytest.raises(InvalidArgumentError, match="lse_a: expected shape"):
        ops.merge_states(args[0], args[1][:, :2], *args[2:])


def long_decode(lens: list[int], split_size: int) -> tuple[tuple[Any, ...], kernels.DecodePlan]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 16), (50, 16, 2, 16), (50, 16, 2, 16)))  # fmt: skip
    table = torch.randperm(50, generator=generator, dtype=torch.int32).view(2, 25)
    plan = kernels.plan_decode(
        lens, num_q_heads=4, num_kv_heads=2, head_dim=16, block_size=16, split_size=split_size
    )
    return (q, k, v, table, torch.tensor(lens, dtype=torch.int32)), plan


def test_an_operator_follows_its_plan() -> None:
    args, plan = long_decode([400, 130], 64)
    given = ops.paged_decode(*args, **plan_tensors(plan))
    for ours, theirs in zip(given, kernels.paged_decode(*args, return_lse=True, plan=plan), strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)
    assert torch.equal(given[0], ops.paged_decode(*args, split_size=64)[0])
    assert not torch.equal(given[0], ops.paged_decode(*args)[0]), "other splits round otherwise"


def test_the_next_steps_plan_does_not_compile_anew() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(ops.paged_decode.default, fullgraph=True, backend=counter)
    for first in (200, 264, 330, 393, 300):  # more splits, and fewer
        args, plan = long_decode([first, 130], 64)
        want = kernels.paged_decode(*args, return_lse=True, plan=plan)
        for ours, theirs in zip(compiled(*args, **plan_tensors(plan)), want, strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count <= 2, "the second time with a number of items that may change"


def test_plans_that_are_none_or_another_calls_are_refused_through_the_operator() -> None:
    args, _ = long_decode([400, 130], 64)
    plan = plan_tensors(long_decode([400, 129], 64)[1])
    items, numbers = plan["plan_items"], plan["plan_numbers"]
    for wrong, message in (
        (plan, "number 1 is 130, given one for 129"),
        ({"plan_items": items}, "plan_numbers: expected both tensors of plan_tensors"),
        ({"plan_numbers": numbers}, "plan_items: expected both"),
        (
            plan | {"plan_numbers": numbers[:6]},
            r"plan_numbers: expected at least 7 of int64.*\[6\]",
        ),
        (plan | {"plan_numbers": numbers.int()}, "plan_numbers: .*torch.int32"),
        (plan | {"plan_items": items.long()}, "plan_items: expected .*int32, given .*torch.int64"),
        (plan | {"plan_items": items.view(-1)}, r"plan_items: expected shape \[num_items, 2\]"),
        (plan | {"split_size": 64}, "split_size: expected None, since the plan has 64"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            ops.paged_decode(*args, **wrong)
    with pytest.raises(InvalidArgumentError, match="plan: expected what plan_decode returns, given int"):  # fmt: skip
        plan_tensors(64)
