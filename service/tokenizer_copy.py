"""The tokenizer's Rust part, of which the service has a copy: transformers changes the original in every call.

It is not changed after its construction, so several threads may encode at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.item_texts import PreparedPair, PreparedText


@dataclass(frozen=True, slots=True)
class EscapedEncoding:
    """What is read of an encoding of the Rust library, without the tokens of separators."""

    ids: list[int]
    type_ids: list[int]
    sequence_ids: list[int | None]

    offsets: list[tuple[int, int]]
    """Characters of each token in the text with its separators; the completion's first one is before any of them."""

    @classmethod
    def without(cls, encoded: Any, separator_id: int) -> EscapedEncoding:
        """Return an encoding without the tokens of one id."""
        chosen = [index for index, token_id in enumerate(encoded.ids) if token_id != separator_id]
        columns = (encoded.ids, encoded.type_ids, encoded.sequence_ids, encoded.offsets)
        return cls(*([column[index] for index in chosen] for column in columns))

    def __len__(self) -> int:
        return len(self.ids)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Return where a token begins and ends in the text."""
        return self.offsets[token]


class TokenizerCopy:
    """Encodes prepared texts, without padding and truncation.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not changed.

        separator: a text that stands in the special tokens of escaped texts.

    ``backend`` is the Rust tokenizer.
    """

    def __init__(self, tokenizer: Any, separator: str) -> None:
        from tokenizers import AddedToken, Tokenizer

        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = tokenizer.split_special_tokens
        # The separator is a token that splits the text around it, as special tokens do.
        self._separating = Tokenizer.from_str(self.backend.to_str())
        self._separating.encode_special_tokens = tokenizer.split_special_tokens
        self._separating.add_tokens([AddedToken(separator, normalized=False)])
        separator_id = self._separating.token_to_id(separator)
        assert separator_id is not None  # noqa: S101 - it has just been added
        self._separator_id = separator_id

    def encode_all(self, entries: Sequence[PreparedText | PreparedPair]) -> list[Any]:
        """Return the Rust library's encoding of each entry, in order; special tokens are added to pairs alone."""
        plain = [one for one in entries if not one.is_escaped]
        pairs = iter(
            self._encode_batch([(one.prompt, one.completion) for one in plain if isinstance(one, PreparedPair)])
        )
        texts = iter(self._encode_batch([one.text for one in plain if isinstance(one, PreparedText)]))
        return [
            self._encode_escaped(one) if one.is_escaped else next(pairs if isinstance(one, PreparedPair) else texts)
            for one in entries
        ]

    def _encode_escaped(self, entry: PreparedText | PreparedPair) -> EscapedEncoding:
        """Encode an entry with separators, without the tokens of these."""
        encoded = (
            self._separating.encode(entry.prompt, entry.completion, add_special_tokens=True)
            if isinstance(entry, PreparedPair)
            else self._separating.encode(entry.text, add_special_tokens=False)
        )
        return EscapedEncoding.without(encoded, self._separator_id)

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
