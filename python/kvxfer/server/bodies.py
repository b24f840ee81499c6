# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The fields of OpenAI's request bodies, and JSON into them. Refusals name the field.

Unknown fields are ignored, as OpenAI-compatible servers do; known ones that would change the answer and
are not supported are refused by name, unless they hold the value that asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from kvxfer.server.wire import RequestRefusedError

__all__ = ["ChatBody", "CompletionBody", "decode_body", "refused"]

# Field -> values that ask for nothing. None always does.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "repetition_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "continue_final_message": (False,),
    "prompt_embeds": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What both routes share. null means: as if absent."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None


class CompletionBody(_Body, kw_only=True):
    prompt: str | list[Any]
    # Absent: OpenAI's default of 16. null: all that the context has left.
    max_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    echo: bool | None = None
    add_special_tokens: bool | None = None


class ChatBody(_Body, kw_only=True):
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def refused(message: str, param: str | None = None) -> RequestRefusedError:
    return RequestRefusedError(400, message, code="invalid_value", param=param)


_B = TypeVar("_B", ChatBody, CompletionBody)


def decode_body(body: bytes, kind: type[_B]) -> _B:
    """Raises ``RequestRefusedError`` (400) for JSON that is malformed or not of this kind."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestRefusedError(
            400, f"the body is not valid JSON: {error}", code="invalid_json"
        ) from error
    if not isinstance(raw, dict):
        raise refused(f"the body must be a JSON object, not {type(raw).__name__}")
    fields = _convert(raw, kind)
    _refuse_unsupported(raw)
    return fields


def _convert(raw: Mapping[str, Any], kind: type[_B]) -> _B:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        at = re.search(r" - at `\$\.?(.*)`$", message)
        missing = re.search(r"missing required field `(\w+)`", message)
        param = missing[1] if missing else re.split(r"[.\[]", at[1])[0] if at else None
        where = f"{at[1]}: " if at and at[1] and not missing else ""
        raise refused(where + (message[: at.start()] if at else message), param) from error


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for name, neutral in _UNSUPPORTED.items():
        value = raw.get(name)
        # By type too: logprobs 0 asks for the chosen token's, False for none.
        if value is not None and not any(value == n and type(value) is type(n) for n in neutral):
            raise RequestRefusedError(
                400, f"{name} is not supported by this server", code="unsupported", param=name
            )
    best_of, n = raw.get("best_of"), raw.get("n") or 1
    if best_of is not None and best_of != n:
        raise RequestRefusedError(
            400,
            f"best_of is not supported unless equal to n: got best_of {best_of}, n {n}",
            code="unsupported",
            param="best_of",
        )
