# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: tokenizer, chat template, streamed decoding, stop strings. Only the front imports it.

Stands on tokenizers and jinja2 alone: transformers would cost seconds of import. Text is what a client
sees, so every piece is final once it is returned, and the pieces joined are the whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvxfer.errors import InvalidArgumentError
from kvxfer.server.chat_template import ChatTemplate, load_chat_template

__all__ = ["AnswerText", "Detokenizer", "StopStrings", "Text"]

_REPLACEMENT = "\ufffd"  # what decoders give for bytes that are not (yet) UTF-8
_CONTEXT_IDS = 16  # decoders look at neighbours (spaces, byte runs), never further than this
_MAX_HELD_IDS = 64  # a longer run of bytes that are not UTF-8 is not going to become text


class Detokenizer:
    """Ids in, final text out. Holds back what a later id may still complete.

    Decodes a short window twice, without and with the new ids: a decoder's treatment of the window's first
    id (the leading space that it drops) is the same in both. Windows begin where earlier text was complete,
    because a run of byte tokens cut in two decodes to something else.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(context[-_CONTEXT_IDS:])
        self._complete = [0, len(self._ids)]  # indices into _ids where the text so far was whole

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        return self._text(final=False)

    def flush(self) -> str:
        """What is still held: an incomplete character shows as U+FFFD, as in a decode of the whole."""
        return self._text(final=True)

    def _text(self, *, final: bool) -> str:
        known = self._complete[-1]
        before = self._decode(self._ids[:known])
        after = self._decode(self._ids)
        held = len(self._ids) - known
        if after.endswith(_REPLACEMENT) and not final and held < _MAX_HELD_IDS:
            return ""
        self._complete.append(len(self._ids))
        while len(self._complete) > 2 and self._complete[-1] - self._complete[1] >= _CONTEXT_IDS:
            begin = self._complete[1]
            self._ids = self._ids[begin:]
            self._complete = [index - begin for index in self._complete[1:]]
        if not after.startswith(before):
            # The prompt ended inside a character, which is whole now: it is the answer's.
            before = before.rstrip(_REPLACEMENT)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))


class StopStrings:
    """Cuts text before the stop string that ends first, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        if self.hit is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self._held = ""
            return text[:at]
        keep = next(
            (
                size
                for size in range(min(self._longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class AnswerText:
    """One choice's text: decoding, then stop strings. Without a tokenizer there is no text."""

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        stops: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._stop_token_ids = frozenset(stop_token_ids)

    @property
    def stopped(self) -> bool:
        return self._stops.hit is not None

    def push(self, ids: Sequence[int]) -> str:
        if self._detokenizer is None or self.stopped:
            return ""
        # A stop token ends the answer; like a stop string, it is no part of it.
        text_ids = [i for i in ids if i not in self._stop_token_ids]
        return self._stops.push(self._detokenizer.push(text_ids)) if text_ids else ""

    def flush(self) -> str:
        if self._detokenizer is None or self.stopped:
            return ""
        text = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush()


class Text:
    """What the front knows of a model: its tokenizer and chat template, either of which may be missing."""

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, *, vocab_size: int
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.vocab_size = vocab_size

    @classmethod
    def load(cls, model_dir: str | Path, *, vocab_size: int) -> Text:
        """Reads a model directory. ``tokenizer.json`` alone will do; without it prompts are ids only.

        Raises:
            InvalidArgumentError: a file is there but cannot be read; the message names it.
        """
        folder = Path(model_dir)
        path = folder / "tokenizer.json"
        tokenizer = None
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:
                raise InvalidArgumentError(f"{path} cannot be read: {error}") from error
            # Files saved after training keep its truncation, which would cut prompts silently.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        return cls(tokenizer, load_chat_template(folder), vocab_size=vocab_size)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self.tokenizer is None:
            raise InvalidArgumentError(
                "this model has no tokenizer.json: give the prompt as a list of token ids"
            )
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        if self.template is None:
            raise InvalidArgumentError(
                "this model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): use /v1/completions"
            )
        # Special tokens are the template's business: it writes bos itself.
        return self.encode(self.template.render(messages, **options), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(ids)))

    def answer(
        self,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> AnswerText:
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(
                self.tokenizer, prompt, skip_special_tokens=skip_special_tokens
            )
        return AnswerText(detokenizer, stops, stop_token_ids)
