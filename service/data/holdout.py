"""Which prompts training must never see, so that calibration has data the model was not fitted to.

Pure and by content: training leaves these prompts out, calibration uses only them, and no list passes between the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from service.records import Message

HOLD_OUT_PERCENT = 25
"""The share of prompts, in percent, that the demo model's training left out."""

_BUCKETS = 10_000


def is_held_out(prompt: str | Sequence[Message], percent: float = HOLD_OUT_PERCENT) -> bool:
    """Tell whether a prompt belongs to the share that is kept out of training.

    The rule: take the first user message (of a plain-string prompt the whole string, without a user turn the first
    turn), casefold it, join its words by single spaces, and hash its UTF-8 bytes with SHA-256. The first 8 bytes of
    the digest, big-endian, modulo 10,000 are the prompt's bucket; the lowest ``percent`` of the buckets are held out.
    So all conversations that open alike fall on the same side, and a smaller percentage holds out a subset.

    Args:
        prompt: the plain prompt, or the turns of the conversation before the completion.
        percent: the share to hold out, 0 to 100.
    """
    opening = " ".join(_opening(prompt).casefold().split())
    digest = hashlib.sha256(opening.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % _BUCKETS < percent * _BUCKETS / 100


def _opening(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    asked = [turn.content for turn in prompt if turn.role == "user"]
    return asked[0] if asked else "".join(turn.content for turn in prompt[:1])
