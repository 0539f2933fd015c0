"""The length block of an item: lengths of its texts, how many tokens the model read, and how they begin and end.

Pure arithmetic on a TokenSequence. Where the number of prompt tokens is unknown, the lengths of prompt and completion
are None.
"""

from __future__ import annotations

from service.records import LengthReport, TokenSequence


def length_report(sequence: TokenSequence) -> LengthReport:
    """Describe the lengths of one item.

    Prompt and completion counts are of the full texts before truncation; truncation only removes tokens from the left
    end of the prompt.
    """
    num_prompt_tokens = sequence.num_prompt_tokens
    return LengthReport(
        prompt_tokens=None if num_prompt_tokens is None else num_prompt_tokens + sequence.num_dropped,
        completion_tokens=sequence.num_completion_tokens,
        completion_chars=sequence.completion_chars,
        scored_tokens=sequence.num_tokens,
        truncated=sequence.truncated,
        last_token_id=sequence.token_ids[-1] if sequence.token_ids else None,
        double_bos=sequence.double_bos,
        special_tokens=sequence.num_written_special,
    )
