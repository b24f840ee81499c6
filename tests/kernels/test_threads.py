# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The C++ backend's promises: same bits whatever the batch and the threads; no waiting on each other; no spinning."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from paged_cases import NpArray, encode, paged

from kvxfer import kernels
from kvxfer.errors import InvalidArgumentError

pytestmark = pytest.mark.skipif(
    kernels.backend_reasons("paged_decode")["cpu"] is not None,
    reason=str(kernels.backend_reasons("paged_decode")["cpu"]),
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = kernels.get_num_threads()
    yield
    kernels.set_num_threads(before)


@pytest.mark.parametrize("window_left", [-1, 700])
def test_results_depend_neither_on_the_batch_nor_on_the_threads(
    rng: np.random.Generator, threads: None, window_left: int
) -> None:
    lengths = [2100, 1, 513, 512, 90]
    cache = paged(rng, lengths, head_dim=32)
    q = encode(rng.standard_normal((5, 4, 32)), "float32")
    alone = []
    kernels.set_num_threads(1)
    for row in range(5):
        chosen = slice(row, row + 1)
        alone.append(
            kernels.paged_decode(
                q[chosen], cache.k, cache.v, cache.block_table[chosen], cache.seq_lens[chosen],
                kv_layout="HND", window_left=window_left,
            )
        )  # fmt: skip
    for num_threads in (1, 2, 5):
        kernels.set_num_threads(num_threads)
        together = kernels.paged_decode(
            q,
            cache.k,
            cache.v,
            cache.block_table,
            cache.seq_lens,
            kv_layout="HND",
            window_left=window_left,
        )
        assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("window_left", [-1, 300])
def test_a_prompt_gives_the_same_bits_in_whatever_chunks(
    rng: np.random.Generator, threads: None, window_left: int
) -> None:
    length = 800
    cache = paged(rng, [length], head_dim=32)
    q = encode(rng.standard_normal((length, 4, 32)), "float32")

    def run(first: int, end: int, num_threads: int) -> NpArray:
        kernels.set_num_threads(num_threads)
        result: NpArray = kernels.paged_prefill(
            q[first:end], cache.k, cache.v, np.array([0, end - first], np.int32), cache.block_table,
            np.array([end], np.int32), kv_layout="HND", window_left=window_left,
        )  # fmt: skip
        return result

    whole = run(0, length, 1)
    assert np.array_equal(run(0, length, 3), whole)
    cuts = [0, 129, 131, 512, 800]
    chunks = [run(a, b, 2) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(chunks), whole)


def test_many_threads_may_call_at_once(rng: np.random.Generator, threads: None) -> None:
    kernels.set_num_threads(2)
    cache = paged(rng, [1500, 1500], head_dim=32)
    q = encode(rng.standard_normal((2, 4, 32)), "float32")
    arguments = (q, cache.k, cache.v, cache.block_table, cache.seq_lens)
    want = kernels.paged_decode(*arguments, kv_layout="HND")
    results: list[NpArray] = []

    def call() -> None:
        results.extend(kernels.paged_decode(*arguments, kv_layout="HND") for _ in range(20))

    workers = [threading.Thread(target=call) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert len(results) == 80
    assert all(np.array_equal(result, want) for result in results)


def test_idle_threads_use_no_cpu(rng: np.random.Generator, threads: None) -> None:
    kernels.set_num_threads(4)
    cache = paged(rng, [2000, 2000], head_dim=32)
    q = encode(rng.standard_normal((2, 4, 32)), "float32")
    kernels.paged_decode(q, cache.k, cache.v, cache.block_table, cache.seq_lens, kv_layout="HND")
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.1


def test_a_forked_child_gets_threads_of_its_own() -> None:
    # Once: a child inherited the pool object but none of its threads, and waited for them for ever.
    program = """
import os
import numpy as np
from kvxfer import kernels
kernels.set_num_threads(3)
k = np.random.default_rng(0).standard_normal((200, 16, 2, 32)).astype(np.float32)
table = np.arange(200, dtype=np.int32)[None]
call = lambda: kernels.paged_decode(k[0, :1, 0][None].repeat(4, 1), k, k, table, np.array([3200], np.int32))
want = call()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(call(), want) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert np.array_equal(call(), want)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, env=os.environ, check=False)
    assert done.returncode == 0


def test_a_wrong_number_of_threads_is_refused(threads: None) -> None:
    for wrong in (0, -1, 100_000):
        with pytest.raises(
            InvalidArgumentError, match=f"num_threads: expected 1 to 1024, given {wrong}"
        ):
            kernels.set_num_threads(wrong)


def test_an_unknown_instruction_set_is_refused() -> None:
    from kvxfer import _kernels_cpu

    with pytest.raises(InvalidArgumentError, match=r"isa: expected one of .*baseline.*given mmx"):
        _kernels_cpu.set_isa("mmx")
