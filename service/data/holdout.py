"""The hold-out rule: which prompts training excludes, so that calibration has data the model was not fitted to.

Pure, and by content: training leaves these prompts out and calibration uses only them, without a list of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from service.data.prompts import normalized_opening
from service.records import Message

HOLD_OUT_PERCENT = 25
"""The percentage of prompts that the demo model's training left out."""

_BUCKETS = 10_000


def is_held_out(prompt: str | Sequence[Message], percent: float = HOLD_OUT_PERCENT) -> bool:
    """Whether a prompt is held out of training.

    The rule: take the first user message (the whole string of a plain prompt; the first message of a conversation
    without a user message), casefold it, join its words by single spaces, and hash its UTF-8 bytes with SHA-256. The
    first 8 bytes of the digest, big-endian, modulo 10,000 are the prompt's bucket; the lowest ``percent`` of the
    buckets are held out. So conversations with the same first user message are either all held out or all not, and a
    smaller percentage holds out a subset.

    Args:
        prompt: the plain prompt, or the messages of the conversation before the completion.
        percent: the percentage of prompts to hold out, 0 to 100.
    """
    digest = hashlib.sha256(normalized_opening(prompt).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % _BUCKETS < percent * _BUCKETS / 100
