# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE in which a space belongs to the word before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"  # separates documents in training, ends an answer in serving
END_OF_TEXT_ID = 0

# People type `def ` with the space. With GPT-2's rule the space opens the *next* word, so a trailing
# one is a token that the model has hardly ever seen. Here it closes `def `, as it did in training.
WORDS = r"[A-Za-z_]+ ?|\n[ \t]*|[0-9]|[^\sA-Za-z_0-9]+ ?|\s"


def train(texts: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """Learn merges from ``texts``; all 256 bytes are in the vocabulary, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """One stream of ids, each document closed by the separator."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids += encoding.ids
        ids.append(END_OF_TEXT_ID)
    return np.asarray(ids, dtype=np.int64)
