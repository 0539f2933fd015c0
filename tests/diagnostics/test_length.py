"""The length block: lengths of full texts, tokens that the model read, and None for what is unknown."""

from __future__ import annotations

from service.diagnostics.length import length_report
from service.records import LengthReport, TokenSequence


def test_whole_item() -> None:
    """Prompt and completion add up to what the model read."""
    sequence = TokenSequence(tuple(range(10)), num_prompt_tokens=6, completion_chars=17)

    assert length_report(sequence) == LengthReport(6, 4, 17, scored_tokens=10, truncated=False, last_token_id=9)


def test_truncated_prompt_is_counted_in_full() -> None:
    """Tokens removed from the prompt count in its length and not in the tokens that the model read."""
    sequence = TokenSequence(tuple(range(10)), num_prompt_tokens=6, num_dropped=5, completion_chars=17)

    assert length_report(sequence) == LengthReport(11, 4, 17, scored_tokens=10, truncated=True, last_token_id=9)


def test_unknown_lengths_are_none() -> None:
    """For token ids and templated texts only the number of tokens that the model read is known."""
    assert length_report(TokenSequence((1, 2, 3))) == LengthReport(
        None, None, None, scored_tokens=3, truncated=False, last_token_id=3
    )
