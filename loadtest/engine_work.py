"""What the ways of scoring are given: token sequences of drawn or real texts, in the order of arrival.

It tokenizes as the service does, and knows nothing of who scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.workload import Group
from service.checkpoints.checkpoint import Checkpoint
from service.data.prompts import parse_completions
from service.data.rows import read_rows
from service.errors import HttpError
from service.records import Encoding, Exchange, Item, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization


@dataclass(frozen=True, slots=True)
class Work:
    """Sequences to score; neighbours of equal ``groups`` answer one prompt.

    ``num_refused``: items that the service would refuse, and that are therefore left out.
    """

    sequences: tuple[TokenSequence, ...] = field(repr=False)
    groups: tuple[int, ...] = field(repr=False)
    num_refused: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return sum(sequence.num_tokens for sequence in self.sequences)


def tokenize(groups: Sequence[Group], checkpoint: Checkpoint) -> Work:
    """Return the completions of the groups with their prompts, cut on the left where they are too long."""
    tokenization = Tokenization(
        checkpoint.tokenizer,
        TokenizationSettings(),
        max_input_tokens=checkpoint.max_input_tokens,
        vocab_size=checkpoint.embedding_size,
    )
    items = [
        (number, Item(Exchange(group.prompt, completion)))
        for number, group in enumerate(groups)
        for completion in group.completions
    ]
    outcomes = tokenization.encode([item for _, item in items], Encoding(truncation="prompt_left"))
    kept = [
        (number, outcome)
        for (number, _), outcome in zip(items, outcomes, strict=True)
        if not isinstance(outcome, HttpError)
    ]
    return Work(
        sequences=tuple(sequence for _, sequence in kept),
        groups=tuple(number for number, _ in kept),
        num_refused=len(items) - len(kept),
    )


def read_groups(path: Path) -> Iterator[Group]:
    """Yield the rows of a data file, which are items (``prompt``, ``completion``) or pairs (``chosen``, ``rejected``).

    The turns of a conversation are joined by empty lines; what is measured is lengths.

    Raises:
        DatasetError: a row is neither.
    """
    for row in read_rows(path):
        parsed = parse_completions(row)
        prompt = parsed.prompt
        text = prompt if isinstance(prompt, str) else "\n\n".join(message.content for message in prompt)
        yield Group(text, parsed.completions)
