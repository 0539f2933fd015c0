"""The tokenizer's Rust part, of which the service has a copy: transformers changes the original in every call.

It is not changed after its construction, so several threads may encode at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.item_texts import PreparedPair, PreparedText


class TokenizerCopy:
    """Encodes prepared texts, without padding and truncation.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not changed.

    ``backend`` is the Rust tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = tokenizer.split_special_tokens

    def encode_all(self, entries: Sequence[PreparedText | PreparedPair]) -> list[Any]:
        """Return the Rust library's encoding of each entry, in order; special tokens are added to pairs alone."""
        pairs = iter(
            self._encode_batch([(one.prompt, one.completion) for one in entries if isinstance(one, PreparedPair)])
        )
        texts = iter(self._encode_batch([one.text for one in entries if isinstance(one, PreparedText)]))
        return [next(pairs if isinstance(one, PreparedPair) else texts) for one in entries]

    def ids_of(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text without special tokens around it."""
        return tuple(self._encode_one(text).ids)

    def spans_of(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Return the token ids of a text without special tokens, and the first and the last character + 1 of each."""
        encoded = self._encode_one(text)
        return tuple(encoded.ids), list(encoded.offsets)

    def _encode_batch(self, inputs: list[Any]) -> list[Any]:
        if len(inputs) == 1:  # for a single text the batch call would start its thread pool
            return [self._encode_one(inputs[0])]
        of_pairs = bool(inputs) and isinstance(inputs[0], tuple)
        return list(self.backend.encode_batch(inputs, add_special_tokens=of_pairs))

    def _encode_one(self, text: str | tuple[str, str]) -> Any:
        if isinstance(text, tuple):
            return self.backend.encode(*text, add_special_tokens=True)
        return self.backend.encode(text, add_special_tokens=False)
