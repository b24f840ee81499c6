# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call, and why not the others.

A backend is a module with any of the functions in ``OPS``, ``unavailable(op, device)``, which gives the reason
why it cannot run that op on that device here, or None, and ``TAKES_NUMPY``. The public functions have checked and
normalised everything before a backend is called:

- caches are views ``[block, token, head, channel]`` with any strides, last axis contiguous (an HND cache
  is the same view with other strides), of a dtype in the module's ``CACHE_DTYPES``; where ``TAKES_NUMPY`` all
  arrays are NumPy views (bfloat16 as ``uint16``, float8 as ``uint8``: ``reference``, ``cpu``) and ``cache_dtype``
  is passed by name, else what the caller gave, torch tensors as a rule (``triton``, ``cuda``);
- scale caches, ``[block, token, head]`` float32, are passed only to a module that says ``SCALES``, and only
  when there are any;
- a decode plan is passed only to a module that says ``PLANS``; others get its split_size, as all do;
- ``batch_invariant`` is passed only to a module that says ``TILES_BY_BATCH``; others are in any case;
- a module with ``refuses(op, operands)`` has said with None that it takes these shapes and dtypes;
- outputs are allocated; ``lse`` is a float32 array or None; ``k_scale`` is folded into ``sm_scale``.

    append_kv(key, value, k_cache, v_cache, slot_mapping, *, k_scale, v_scale)
    paged_decode(q, k_cache, v_cache, block_table, seq_lens, out, lse, *,
                 sm_scale, v_scale, window_left, logits_soft_cap, sinks, split_size)
    paged_prefill(q, k_cache, v_cache, cu_seqlens_q, block_table, seq_lens, out, lse, *,
                  causal, sm_scale, v_scale, window_left, logits_soft_cap, sinks)
    mla_decode(q_latent, q_rope, latent_cache [block, token, channel], block_table, seq_lens, out, lse, *,
               sm_scale, kv_scale, split_size)
    merge_states(v_a, lse_a, v_b, lse_b, out, lse)
    copy_blocks(job: kvxfer.kernels._copy_job.CopyJob)
    checksum_blocks(job: kvxfer.kernels._checksum_job.ChecksumJob) -> uint64 [layers], NumPy
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from kvxfer.errors import InvalidArgumentError, UnavailableError
from kvxfer.kernels._arrays import FLOAT_DTYPES, Array, Operands, device_of
from kvxfer.kernels._numbers import whole

__all__ = [
    "BACKENDS",
    "OPS",
    "backend_reasons",
    "build_info",
    "choose",
    "explain",
    "get_num_threads",
    "set_num_threads",
    "takes_numpy",
]

OPS = (
    "append_kv",
    "paged_decode",
    "paged_prefill",
    "merge_states",
    "copy_blocks",
    "checksum_blocks",
    "mla_decode",
)

# In the order in which "auto" prefers them.
BACKENDS = {
    "cuda": "kvxfer.kernels._cuda",
    "triton": "kvxfer.kernels.triton",
    "cpu": "kvxfer.kernels._cpu",
    "reference": "kvxfer.kernels.reference",
}

_ALIASES = {"pack_blocks": "copy_blocks", "unpack_blocks": "copy_blocks"}
_logger = logging.getLogger("kvxfer.kernels")
_said: set[str] = set()


@cache
def _load(backend: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported."""
    name = BACKENDS[backend]
    if importlib.util.find_spec(name) is None:
        return f"{name} is not part of this installation"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported: {error}"


class Needs(NamedTuple):
    """What a call asks of a backend beyond op and device."""

    cache_dtype: str | None = None
    scaled: bool = False
    call: Operands | None = None


_NOTHING = Needs()


def _why_not(backend: str, op: str, device: str, needs: Needs = _NOTHING) -> str | None:
    module = _load(backend)
    if isinstance(module, str):
        return module
    if not hasattr(module, op):
        return f"the {backend} backend has no {op}"
    if needs.cache_dtype is not None:
        known: tuple[str, ...] = getattr(module, "CACHE_DTYPES", FLOAT_DTYPES)
        if needs.cache_dtype not in known:
            return f"its caches are {', '.join(known)}, not {needs.cache_dtype}"
    if needs.scaled and not getattr(module, "SCALES", False):
        return f"its {op} knows no scales but k_scale and v_scale"
    reason: str | None = module.unavailable(op, device)
    if reason is None and needs.call is not None and hasattr(module, "refuses"):
        reason = module.refuses(op, needs.call)
    return reason


def _auto_why_not(backend: str, op: str, device: str, needs: Needs = _NOTHING) -> str | None:
    if backend == "triton" and device == "cpu":
        return "on CPU arrays Triton means its interpreter, which auto never takes"
    return _why_not(backend, op, device, needs)


def choose(
    op: str,
    device: str,
    backend: str,
    *,
    cache_dtype: str | None = None,
    scaled: bool = False,
    call: Operands | None = None,
) -> ModuleType:
    """The module that runs ``op`` for arrays on ``device``.

    Args:
        cache_dtype: that the call's cache has; a module says its own in ``CACHE_DTYPES``.
        scaled: the call has scales in memory, or converts between fixed ones; a module says ``SCALES``.
        call: its operands, for a module that takes less than all shapes and dtypes.
    Raises:
        InvalidArgumentError: no such backend.
        UnavailableError: it cannot run here; carries the reason.
    """
    # On the host nothing of the call but these decides, and the answer stays: asked for at every step of a server.
    if backend == "auto" and device == "cpu":
        return _auto_on_host(op, cache_dtype, scaled)
    needs = Needs(cache_dtype, scaled, call)
    if backend != "auto":
        if not isinstance(backend, str) or backend not in BACKENDS:
            names = ", ".join(["auto", *BACKENDS])
            raise InvalidArgumentError(f"backend: expected one of {names}, given {backend!r}")
        reason = _why_not(backend, op, device, needs)
        if reason is not None:
            raise UnavailableError(
                f"{op}: backend {backend!r} is unavailable: {reason}", reason=reason
            )
        return _loaded(backend)
    return _auto(op, device, needs)


@cache
def _auto_on_host(op: str, cache_dtype: str | None, scaled: bool) -> ModuleType:
    return _auto(op, "cpu", Needs(cache_dtype, scaled))


def _auto(op: str, device: str, needs: Needs) -> ModuleType:
    reasons: dict[str, str] = {}
    for name in BACKENDS:
        reason = _auto_why_not(name, op, device, needs)
        if reason is None:
            if name == "reference":
                _say_slow(op, reasons["cpu"])
            return _loaded(name)
        reasons[name] = reason
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UnavailableError(f"{op}: no backend for arrays on {device}: {text}", reason=text)


def takes_numpy(module: ModuleType) -> bool:
    """Does this backend want NumPy views (else: what the caller gave)?"""
    return bool(getattr(module, "TAKES_NUMPY", False))


def _loaded(backend: str) -> ModuleType:
    module = _load(backend)
    assert isinstance(module, ModuleType)
    return module


def _say_slow(op: str, reason: str) -> None:
    """A slower path is never taken silently: once per op."""
    if op not in _said:
        _said.add(op)
        _logger.warning("%s runs on the slow NumPy reference: %s", op, reason)


def backend_reasons(op: str, device: str = "cpu") -> dict[str, str | None]:
    """For each backend the reason why it cannot run ``op`` on ``device``, None where it can."""
    op = _ALIASES.get(op, op)
    if op not in OPS:
        raise InvalidArgumentError(f"op: expected one of {', '.join(OPS)}, given {op!r}")
    return {name: _why_not(name, op, device) for name in BACKENDS}


def explain(op: str, *arrays: Array) -> str:
    """Which backend ``auto`` takes for ``op`` on these arrays (none: host arrays), and why no other."""
    op_name = _ALIASES.get(op, op)
    if op_name not in OPS:
        raise InvalidArgumentError(f"op: expected one of {', '.join(OPS)}, given {op!r}")
    device = device_of(arrays[0]) if arrays else "cpu"
    lines = []
    taken = None
    for name in BACKENDS:
        reason = _auto_why_not(name, op_name, device)
        if reason is not None:
            lines.append(f"  {name}: no: {reason}")
        elif taken is None:
            taken = name
            detail = getattr(_loaded(name), "describe", lambda: "")()
            lines.append(f"  {name}: taken" + (f": {detail}" if detail else ""))
        else:
            lines.append(f"  {name}: possible, but slower than {taken}")
    head = f"{op} on {device}: {taken if taken else 'no backend can run it'}"
    return "\n".join([head, *lines])


def set_num_threads(num_threads: int) -> None:
    """Threads of the C++ backend, the caller's own included, 1 to 1024; results do not depend on it.

    torch's idle threads spin for milliseconds after a call of theirs. Where both share cores, ``OMP_WAIT_POLICY=PASSIVE``
    in the environment, before torch is imported, lets them sleep instead.
    """
    num_threads = whole("num_threads", num_threads, 1, 1024)
    module = _load("cpu")
    if isinstance(module, str):
        raise UnavailableError(f"set_num_threads: {module}", reason=module)
    module.set_num_threads(num_threads)


def get_num_threads() -> int:
    """Threads the C++ backend uses; 1 where only the reference is installed."""
    module = _load("cpu")
    return 1 if isinstance(module, str) else int(module.get_num_threads())


def build_info() -> dict[str, Any]:
    """What this installation was built with: ``compiler``, ``isa``, ``cuda``, ``cuda_reason``, ..."""
    module = _load("cpu")
    if isinstance(module, str):
        return {"cpu": False, "cpu_reason": module, "cuda": False, "cuda_reason": module}
    return dict(module.build_info())
