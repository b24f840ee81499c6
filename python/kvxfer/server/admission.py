# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""What a worker refuses before it answers 200: pure functions of what it is, what is asked, how full it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvxfer.server.engine.sequence import Role
from kvxfer.server.metrics import Snapshot
from kvxfer.server.wire import RequestRefusedError, TokenRequest

__all__ = ["Identity", "refuse_busy", "refuse_foreign", "refuse_unfit"]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What does not change while a worker lives."""

    role: Literal["prefill", "decode", "both"]
    incarnation: str
    engine: str
    signature: str
    model: str
    served_model_name: str
    max_model_len: int
    max_num_seqs: int
    max_waiting: int
    max_waiting_tokens: int
    vocab_size: int
    num_blocks: int
    block_size: int


def refuse_unfit(me: Identity, spec: TokenRequest, role: Role) -> None:
    """What can never be served here."""
    sampling = spec.sampling
    length = len(spec.prompt) + (0 if role == "prefill" else sampling.max_tokens)
    problem, param = "", "prompt"
    if not spec.prompt:
        problem = "the prompt is empty"
    elif not 0 <= min(spec.prompt) <= max(spec.prompt) < me.vocab_size:
        wrong = next(i for i in spec.prompt if not 0 <= i < me.vocab_size)
        problem = f"token id {wrong} is outside the vocabulary of {me.vocab_size}"
    elif sampling.max_tokens < 1:
        problem, param = f"max_tokens must be at least 1, not {sampling.max_tokens}", "max_tokens"
    elif not 1 <= sampling.n <= me.max_num_seqs:
        problem, param = f"n must be from 1 to {me.max_num_seqs}, not {sampling.n}", "n"
    elif not 0 <= spec.position0 < len(spec.prompt):
        problem = f"position0={spec.position0} is outside the prompt of {len(spec.prompt)} ids"
        param = "position0"
    elif not spec.deadline_s > 0:
        problem, param = f"deadline_s={spec.deadline_s} is not positive", "deadline_s"
    elif length > me.max_model_len:
        problem = (
            f"the prompt has {len(spec.prompt)} tokens and max_tokens is {sampling.max_tokens}: "
            f"more than the context of {me.max_model_len}"
        )
    if problem:
        raise RequestRefusedError(400, problem, code="invalid_request", param=param)
    if -(-length // me.block_size) > me.num_blocks:
        message = (
            f"{length} tokens need more than the {me.num_blocks} blocks of {me.block_size} "
            "that this worker has"
        )
        raise RequestRefusedError(422, message, code="too_large", param="prompt")


def refuse_foreign(me: Identity, spec: TokenRequest, role: Role) -> None:
    """What belongs to a worker of another role, or whose peer has another cache."""
    if me.role not in ("both", "prefill" if role == "prefill" else "decode"):
        message = f"this is a {me.role} worker; it does not take {role} legs"
        raise RequestRefusedError(422, message, code="wrong_role")
    if role != "local" and spec.kv_transfer_params is not None:
        peer = spec.kv_transfer_params.peer
        for name, theirs, ours in (
            ("model", peer.model, me.model),
            ("layout signature", peer.signature, me.signature),
        ):
            if theirs != ours:
                message = f"the peer's {name} is {theirs}, here it is {ours}: no handoff"
                raise RequestRefusedError(422, message, code="mismatch")


def refuse_busy(me: Identity, spec: TokenRequest, now: Snapshot, num_in_inbox: int) -> None:
    """What would only wait: the router finds another worker, or tells the client to come back."""
    num_waiting = now.num_waiting + num_in_inbox
    num_tokens = now.num_waiting_tokens + len(spec.prompt)
    if num_waiting >= me.max_waiting or (now.num_waiting and num_tokens > me.max_waiting_tokens):
        message = f"{num_waiting} requests of {now.num_waiting_tokens} tokens are waiting already"
        raise RequestRefusedError(503, message, code="full", retry_after_s=1.0)
