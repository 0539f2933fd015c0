"""The length block of an item: how long its texts are, and how much of them the model read.

Pure arithmetic on a Sequence; where the border between prompt and completion is unknown, so are their lengths.
"""

from __future__ import annotations

from service.records import LengthReport, TokenSequence


def length_report(sequence: TokenSequence) -> LengthReport:
    """Describe the lengths of one item.

    Prompt and completion counts are of the full texts, as if nothing had been cut; truncation only ever cuts the
    prompt, from the left.
    """
    kept = sequence.num_prompt_tokens
    return LengthReport(
        prompt_tokens=None if kept is None else kept + sequence.num_dropped,
        completion_tokens=sequence.num_completion_tokens,
        completion_chars=sequence.completion_chars,
        scored_tokens=sequence.num_tokens,
        truncated=sequence.truncated,
    )
