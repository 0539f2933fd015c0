"""The length block of an item: lengths of its texts, how many tokens the model read, and how they begin and end.

Pure arithmetic on a TokenSequence. Where the number of prompt tokens is unknown, the lengths of prompt and completion
are None.
"""

from __future__ import annotations

import math

from service.diagnostics.reference import Reference
from service.records import LengthReport, TokenSequence


def length_report(sequence: TokenSequence, reference: Reference | None = None) -> LengthReport:
    """Describe the lengths of one item.

    Prompt and completion counts are of the full texts before truncation; truncation only removes tokens from the left
    end of the prompt.

    Args:
        sequence: the item.
        reference: distribution of ln(1 + completion tokens) of the calibration; None: the length is not compared.
    """
    num_prompt_tokens, num_completion_tokens = sequence.num_prompt_tokens, sequence.num_completion_tokens
    log_length = None
    if reference is not None and num_completion_tokens is not None:
        log_length = math.log1p(num_completion_tokens)
    return LengthReport(
        prompt_tokens=None if num_prompt_tokens is None else num_prompt_tokens + sequence.num_dropped,
        completion_tokens=num_completion_tokens,
        completion_chars=sequence.completion_chars,
        scored_tokens=sequence.num_tokens,
        truncated=sequence.truncated,
        last_token_id=sequence.token_ids[-1] if sequence.token_ids else None,
        double_bos=sequence.double_bos,
        special_tokens=sequence.num_written_special,
        length_z=None if reference is None or log_length is None else reference.z(log_length),
        length_percentile=None if reference is None or log_length is None else reference.percentile(log_length),
    )
