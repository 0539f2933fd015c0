r"""Conversations that are written as one text with role markers, as in Anthropic's ``hh-rlhf``.

Each turn begins with ``\n\nHuman:`` or ``\n\nAssistant:``. One space after a marker belongs to the marker, as in TRL's
conversion of the data set; everything else belongs to the turn, so that writing and reading are inverse.
"""

from __future__ import annotations

import re

from service.records import Message

_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
_START = re.compile(r"\s*Human:")
_OPEN_END = re.compile(r"\n\nAssistant: ?\Z")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether a text is a conversation with role markers: a human turn first, and an assistant turn after it."""
    return _START.match(text) is not None and "\n\nAssistant:" in text


def is_open_transcript(text: str) -> bool:
    """Whether a text is a transcript that ends with the marker of an assistant turn, which is still to be written."""
    return is_transcript(text) and _OPEN_END.search(text) is not None


def read_transcript(text: str) -> tuple[Message, ...]:
    """Return the turns of a transcript as messages."""
    _, *parts = _MARKER.split(text)
    return tuple(Message(_ROLES[role], content) for role, content in zip(parts[::2], parts[1::2], strict=True))
