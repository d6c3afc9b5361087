"""How many words a stretch of tokens is: what makes perplexities comparable that are of different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def count_words(texts: Iterable[np.ndarray], tokenizer: Any) -> int:
    """The words, what white space separates, of tokens in which documents end with the end-of-document token."""
    words = 0
    for tokens in texts:
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
        for document in np.split(tokens, ends):
            words += len(tokenizer.decode(document.tolist(), skip_special_tokens=True).split())
    return words


def per_word(loss: float, tokens: int, words: int) -> float | None:
    """The perplexity per word of `tokens` tokens that are so many words, from the loss in nats per token; None where there are no words."""
    return math.exp(min(loss * tokens / words, 700.0)) if words else None
