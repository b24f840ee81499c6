# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Token events into OpenAI's chunks, or into one body: each choice's text, end and share of the usage."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from kvxfer.server.openai import Call, refusal_of
from kvxfer.server.tasks import end_tasks
from kvxfer.server.text import AnswerText, Text
from kvxfer.server.wire import (
    Backend,
    ErrorEvent,
    Finish,
    RequestRefusedError,
    Reserved,
    TokenEvent,
    TokenRequest,
    Tokens,
    Usage,
)

__all__ = ["Answers"]

Json = dict[str, Any]


@dataclass
class _Choice:
    index: int
    text: AnswerText
    echo: str  # shown before the answer
    begun: bool = False
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    reason: str | None = None


@dataclass
class _Prompt:
    """One token request's progress."""

    request: TokenRequest
    choices: list[_Choice]
    cached_tokens: int = 0

    def cut_short(self) -> bool:
        """Every choice has ended, one of them by a stop string, of which the backend knows nothing."""
        return all(c.reason for c in self.choices) and any(c.text.stopped for c in self.choices)


class Answers:
    """The answers to one call. ``chunks()`` runs the backend; ``body()`` and ``usage()`` tell the result."""

    def __init__(self, call: Call, backend: Backend, text: Text) -> None:
        self._call = call
        self._backend = backend
        self._prompts = []
        for number, request in enumerate(call.requests):
            choices = [
                _Choice(
                    index=number * request.sampling.n + i,
                    text=text.answer(
                        request.prompt,
                        stops=call.stops,
                        stop_token_ids=request.sampling.stop_token_ids,
                        skip_special_tokens=call.skip_special_tokens,
                    ),
                    echo=call.echo[number] if call.echo else "",
                )
                for i in range(request.sampling.n)
            ]
            self._prompts.append(_Prompt(request, choices))

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """Chunks as they come, usage excluded. Closing it cancels everything still running.

        Raises:
            RequestRefusedError: the backend refused, or an error ended the answer.
        """
        if len(self._prompts) == 1:
            async with contextlib.aclosing(self._run(self._prompts[0])) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        queue: asyncio.Queue[Json | BaseException | None] = asyncio.Queue()

        async def pump(prompt: _Prompt) -> None:
            try:
                async with contextlib.aclosing(self._run(prompt)) as chunks:
                    async for chunk in chunks:
                        queue.put_nowait(chunk)
                queue.put_nowait(None)
            except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(prompt)) for prompt in self._prompts]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            await end_tasks(*tasks)

    async def _run(self, prompt: _Prompt) -> AsyncGenerator[Json, None]:
        async with contextlib.aclosing(
            _as_generator(self._backend.generate(prompt.request))
        ) as events:
            async for event in events:
                for chunk in self._apply(prompt, event):
                    yield chunk
                if isinstance(event, Usage) or prompt.cut_short():
                    return
        raise RequestRefusedError(
            500, "the backend's answer ended without a finish or an error", code="internal"
        )

    def _apply(self, prompt: _Prompt, event: TokenEvent) -> list[Json]:
        if isinstance(event, ErrorEvent):
            raise refusal_of(event)
        if isinstance(event, Reserved):
            prompt.cached_tokens = event.cached_tokens
        elif isinstance(event, Usage):
            prompt.cached_tokens = event.cached_tokens
            unfinished = [c.index for c in prompt.choices if c.reason is None]
            if unfinished:
                raise RequestRefusedError(
                    500, f"the backend gave no finish for the choices {unfinished}", code="internal"
                )
        elif isinstance(event, (Tokens, Finish)):
            choice = prompt.choices[event.i]
            if choice.reason is not None:
                return []  # after a stop string: neither shown nor billed
            ids: tuple[int, ...] = ()
            if isinstance(event, Tokens):
                ids = event.ids
                choice.ids += ids
                text = choice.text.push(ids)
                choice.reason = "stop" if choice.text.stopped else None
            else:
                text = choice.text.flush()
                choice.reason = "stop" if choice.text.stopped else event.reason
            choice.pieces.append(text)
            return self._chunks_of(choice, text, ids)
        return []

    def _chunks_of(self, choice: _Choice, text: str, ids: tuple[int, ...]) -> list[Json]:
        chunks = []
        if not choice.begun:
            choice.begun = True
            if self._call.chat:
                chunks.append(self._chunk(choice, "", (), begin=True))
            text = choice.echo + text
        if text or choice.reason or (ids and self._call.return_token_ids):
            chunks.append(self._chunk(choice, text, ids))
        return chunks

    def _chunk(
        self, choice: _Choice, text: str, ids: tuple[int, ...], *, begin: bool = False
    ) -> Json:
        entry: Json = {"index": choice.index}
        if self._call.chat:
            entry["delta"] = {"role": "assistant", "content": ""} if begin else {"content": text}
        else:
            entry["text"] = text
        entry |= {"logprobs": None, "finish_reason": None if begin else choice.reason}
        if self._call.return_token_ids:
            entry["token_ids"] = list(ids)
        return self.envelope([entry])

    def envelope(self, choices: list[Json], usage: Json | None = None) -> Json:
        """A chunk around choices; with usage asked for, OpenAI's have a null one until the last."""
        kind = "chat.completion.chunk" if self._call.chat else "text_completion"
        chunk: Json = {
            "id": self._call.id,
            "object": kind,
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }
        if self._call.include_usage:
            chunk["usage"] = usage
        return chunk

    def body(self) -> Json:
        choices = []
        for prompt in self._prompts:
            for choice in prompt.choices:
                entry: Json = {"index": choice.index}
                text = choice.echo + "".join(choice.pieces)
                if self._call.chat:
                    entry["message"] = {"role": "assistant", "content": text}
                else:
                    entry["text"] = text
                entry |= {"logprobs": None, "finish_reason": choice.reason}
                if self._call.return_token_ids:
                    entry["token_ids"] = choice.ids
                    entry["prompt_token_ids"] = list(prompt.request.prompt)
                choices.append(entry)
        return {
            "id": self._call.id,
            "object": "chat.completion" if self._call.chat else "text_completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
            "usage": self.usage(),
        }

    def usage(self) -> Json:
        prompt_tokens = sum(len(p.request.prompt) for p in self._prompts)
        completion_tokens = sum(len(c.ids) for p in self._prompts for c in p.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(p.cached_tokens for p in self._prompts)},
        }


async def _as_generator(events: AsyncIterator[TokenEvent]) -> AsyncGenerator[TokenEvent, None]:
    """A Backend promises an iterator; if it can be closed, closing this closes it."""
    try:
        async for event in events:
            yield event
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
