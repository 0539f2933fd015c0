"""Items as arrays of a batch that is padded on the right, as transformers' own tokenizer makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from loadtest.peer_servers.rendering import adds_special_tokens, render

Integers = NDArray[np.int64]


class PaddedTexts:
    """Renders and tokenizes items.

    Args:
        folder: of the tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="right")

    def batch(self, items: Sequence[Mapping[str, str]]) -> tuple[Integers, Integers]:
        """Return token ids and attention mask, int64 [item, length], of items with ``prompt`` and ``completion``."""
        encoded = self._tokenizer(
            [render(self._tokenizer, item["prompt"], item["completion"]) for item in items],
            add_special_tokens=adds_special_tokens(self._tokenizer),
            padding=True,
            return_tensors="np",
        )
        return encoded["input_ids"].astype(np.int64), encoded["attention_mask"].astype(np.int64)

    def last_positions(self, ids: Integers) -> Integers:
        """Return the position that a scalar head reads, int64 [item]: the last one that is no padding token."""
        columns = np.arange(ids.shape[1], dtype=np.int64)
        positions: Integers = np.where(ids != self._tokenizer.pad_token_id, columns, 0).max(axis=1)
        return positions
