"""Special tokens that are written out in the text of a completion: counted, and on request escaped.

A tokenizer reads a special token that is written in a text as that token. So a completion can end its own turn and
write others, with the very ids of an honest conversation. Escaped, its text is tokenized as any other text. For that a
separator is put behind the first character of each special token in the completion: no special token is left in the
text, and the separator's own token is taken out of the result.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from service.records import Completion, Exchange, Message


class SpecialTokens:
    """The special tokens of one tokenizer.

    Args:
        texts: their texts.

    ``separator`` cannot be guessed, so no text of a user contains it.
    """

    def __init__(self, texts: frozenset[str]) -> None:
        found = sorted(filter(None, texts), key=len, reverse=True)  # a longer one takes precedence over its prefix
        self.separator = f"\ue000{secrets.token_hex(8)}\ue000"
        self._first_chars = tuple({text[0] for text in found})
        self._token = re.compile("|".join(map(re.escape, found)) or "(?!)")
        # Also those that overlap: none of them may be left.
        self._start = re.compile(f"(?={self._token.pattern})")
        self._single = frozenset(text for text in found if len(text) == 1)

    def count(self, completion: Completion) -> int:
        """Return how many special tokens are written in a completion; in all of its turns where it has several."""
        return sum(len(self._token.findall(text)) for text in _texts(completion) if self._may_occur(text))

    def can_escape(self, completion: Completion) -> bool:
        """Whether no special token in a completion is a single character, which nothing can be put into."""
        return not any(char in text for text in _texts(completion) for char in self._single)

    def escaped(self, exchange: Exchange) -> Exchange:
        """Return the exchange with separators in the special tokens of its completion."""
        completion = exchange.completion
        if isinstance(completion, str):
            return replace(exchange, completion=self._separated(completion))
        return replace(exchange, completion=tuple(map(self._separated_turn, completion)))

    def _may_occur(self, text: str) -> bool:
        return any(char in text for char in self._first_chars)

    def _separated(self, text: str) -> str:
        if not self._may_occur(text):
            return text
        cuts = [match.start() + 1 for match in self._start.finditer(text)]
        parts = (text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True))
        return self.separator.join(parts)

    def _separated_turn(self, turn: Message) -> Message:
        fields = self._separated_values(json.loads(turn.fields)) if turn.fields else None
        return Message(
            self._separated(turn.role),
            None if turn.content is None else self._separated(turn.content),
            json.dumps(fields, ensure_ascii=False) if fields else "",
        )

    def _separated_values(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._separated(value)
        if isinstance(value, dict):
            return {self._separated(key): self._separated_values(entry) for key, entry in value.items()}
        return [self._separated_values(entry) for entry in value] if isinstance(value, list) else value


def _texts(completion: Completion) -> Iterator[str]:
    if isinstance(completion, str):
        yield completion
        return
    for turn in completion:
        yield turn.role
        yield turn.text
        yield from _strings(json.loads(turn.fields)) if turn.fields else ()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
