# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""OpenAI's requests, checked and turned into token requests, and their error bodies.

Every refusal names the field and its value. Text becomes ids here, so that no worker is touched for a
request that cannot be served.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.bodies import ChatBody, CompletionBody, decode_body, refused
from kvxfer.server.text import Text
from kvxfer.server.wire import ErrorEvent, RequestRefusedError, SamplingParams, TokenRequest

__all__ = ["Call", "Limits", "error_body", "parse_call", "refusal_of"]

MAX_CHOICES = 128
MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # of completions; OpenAI's
MAX_STOPS = 4  # OpenAI's limit


@dataclass(frozen=True)
class Limits:
    """What the model behind the front can take."""

    models: tuple[str, ...]  # served names; the first is the one reported when a client names none
    max_model_len: int
    deadline_s: float


@dataclass(frozen=True)
class Call:
    """One HTTP request: one token request per prompt, each with n choices."""

    id: str
    chat: bool
    model: str
    created: int
    requests: tuple[TokenRequest, ...]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: tuple[str, ...]  # per prompt, or empty
    skip_special_tokens: bool
    return_token_ids: bool


def error_body(error: RequestRefusedError) -> dict[str, Any]:
    kinds = {401: "authentication_error", 403: "permission_error"}
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": kinds.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def refusal_of(event: ErrorEvent) -> RequestRefusedError:
    """A backend's error event as HTTP would have said it."""
    status = {"deadline": 504, "internal": 500}.get(event.code, 503)
    return RequestRefusedError(status, event.message, code=event.code)


def parse_call(
    body: bytes,
    *,
    chat: bool,
    text: Text,
    limits: Limits,
    request_id: str,
    traceparent: str | None = None,
) -> Call:
    """Raises ``RequestRefusedError`` (400, 404) for anything that cannot be served as asked."""
    fields: ChatBody | CompletionBody
    fields = decode_body(body, ChatBody) if chat else decode_body(body, CompletionBody)
    if fields.model is not None and fields.model not in limits.models:
        raise RequestRefusedError(
            404,
            f"the model {fields.model!r} does not exist; served here: {', '.join(limits.models)}",
            code="model_not_found",
            param="model",
        )
    if fields.stream_options is not None and not fields.stream:
        raise refused("stream_options is allowed only when stream is true", "stream_options")
    try:
        prompts, echo = _prompts(fields, text)
    except InvalidArgumentError as error:
        raise refused(str(error), "messages" if chat else "prompt") from error
    stops = _stops(fields.stop)
    prefix = "chatcmpl" if chat else "cmpl"
    requests = []
    for prompt in prompts:
        _check_ids("messages" if chat else "prompt", prompt, text.vocab_size)
        requests.append(
            TokenRequest(
                # Clients repeat their ids and send lists of prompts; workers need one id per request.
                request_id=f"{prefix}-{request_id}-{secrets.token_hex(4)}",
                handoff=secrets.token_hex(16),
                deadline_s=limits.deadline_s,
                prompt=tuple(prompt),
                sampling=_sampling(fields, len(prompt), limits.max_model_len, text.vocab_size),
                cache_salt=fields.cache_salt or "",
                traceparent=traceparent,
            )
        )
    return Call(
        id=f"{prefix}-{request_id}",
        chat=chat,
        model=fields.model or limits.models[0],
        created=int(time.time()),
        requests=tuple(requests),
        stops=stops,
        stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        echo=echo,
        skip_special_tokens=fields.skip_special_tokens is not False,
        # Without a tokenizer the ids are all there is to an answer.
        return_token_ids=bool(fields.return_token_ids) or text.tokenizer is None,
    )


def _prompts(
    fields: ChatBody | CompletionBody, text: Text
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Ids per prompt, and what echo shows of each."""
    if isinstance(fields, ChatBody):
        options = dict(fields.chat_template_kwargs or {})
        options["add_generation_prompt"] = fields.add_generation_prompt is not False
        return [text.encode_chat(_messages(fields.messages), **options)], ()
    prompt = fields.prompt
    parts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not parts:
        raise refused("prompt is empty: at least one token is needed", "prompt")
    if len(parts) > MAX_PROMPTS:
        raise refused(f"prompt has {len(parts)} entries; at most {MAX_PROMPTS}", "prompt")
    special = fields.add_special_tokens is not False
    ids: list[list[int]] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            ids.append(text.encode(part, add_special_tokens=special))
        elif _is_ids(part):
            ids.append(part)
        else:
            raise refused(
                f"prompt must be a string, a list of strings, a list of token ids, or a list of such "
                f"lists; entry {number} is {str(part)[:60]!r}",
                "prompt",
            )
    if not fields.echo:
        return ids, ()
    shown = (p if isinstance(p, str) else text.decode(p) for p in parts)
    return ids, tuple(shown)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise refused("messages is empty", "messages")
    plain = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message.get("role"), str):
            raise refused(f"{where}.role must be a string, got {message.get('role')!r}", "messages")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                    raise refused(f"{where}.content: only text parts are supported", "messages")
            content = "\n".join(part["text"] for part in content)
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise refused(f"{where}.content must be a string or a list of text parts", "messages")
        plain.append({**message, "content": content})
    return plain


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise refused(f"{name} is empty: at least one token is needed", name)
    worst = next((i for i in ids if not 0 <= i < vocab_size), None)
    if worst is not None:
        raise refused(
            f"{name} holds the token id {worst}, which is not in the vocabulary of {vocab_size}",
            name,
        )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise refused(f"stop has {len(stops)} strings; at most {MAX_STOPS}", "stop")
    if "" in stops:
        raise refused("stop holds an empty string, which would stop everything", "stop")
    return stops


def _bounded(
    fields: ChatBody | CompletionBody,
    name: str,
    default: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> float:
    value = getattr(fields, name)
    if value is None:
        return default
    if not low <= value <= high or (open_low and value == low):
        least = "above" if open_low else "at least"
        raise refused(f"{name} must be {least} {low:g} and at most {high:g}, got {value}", name)
    return float(value)


def _sampling(
    fields: ChatBody | CompletionBody, num_prompt: int, max_model_len: int, vocab_size: int
) -> SamplingParams:
    name = "max_tokens"
    max_tokens = None if fields.max_tokens is UNSET else fields.max_tokens
    if isinstance(fields, ChatBody) and fields.max_completion_tokens is not None:
        name, max_tokens = "max_completion_tokens", fields.max_completion_tokens
    if max_tokens is not None and max_tokens < 1:
        raise refused(f"{name} must be at least 1, got {max_tokens}", name)
    if num_prompt >= max_model_len:
        raise RequestRefusedError(
            400,
            f"the prompt has {num_prompt} tokens; this model's context is {max_model_len} tokens, of "
            "which the answer needs at least one",
            code="context_length_exceeded",
            param="messages" if isinstance(fields, ChatBody) else "prompt",
        )
    if max_tokens is not None and num_prompt + max_tokens > max_model_len:
        raise RequestRefusedError(
            400,
            f"the prompt's {num_prompt} tokens and {name} {max_tokens} exceed this model's context of "
            f"{max_model_len} tokens",
            code="context_length_exceeded",
            param=name,
        )
    left = max_model_len - num_prompt
    if max_tokens is None:
        max_tokens = min(left, DEFAULT_MAX_TOKENS) if fields.max_tokens is UNSET else left
    top_k = int(_bounded(fields, "top_k", 0, -1, vocab_size))
    stop_token_ids = tuple(fields.stop_token_ids or ())
    if stop_token_ids:
        _check_ids("stop_token_ids", stop_token_ids, vocab_size)
    # A retry on another worker continues the same sample, so a seed there must be.
    seed = secrets.randbits(63) if fields.seed is None else fields.seed
    return SamplingParams(
        max_tokens=max_tokens,
        n=int(_bounded(fields, "n", 1, 1, MAX_CHOICES)),
        temperature=_bounded(fields, "temperature", 1.0, 0.0, 100.0),
        top_p=_bounded(fields, "top_p", 1.0, 0.0, 1.0, open_low=True),
        top_k=max(top_k, 0),  # -1 is how vLLM's clients say off
        min_p=_bounded(fields, "min_p", 0.0, 0.0, 1.0),
        presence_penalty=_bounded(fields, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_bounded(fields, "frequency_penalty", 0.0, -2.0, 2.0),
        seed=seed & (2**63 - 1),
        min_tokens=int(_bounded(fields, "min_tokens", 0, 0, max_tokens)),
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=stop_token_ids,
    )
