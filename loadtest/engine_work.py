"""The work of an engine measurement: token sequences of random or real texts, in the order of arrival.

It is tokenized as the service does it and is the same for every engine that is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.workload import Group
from service.checkpoints.checkpoint import Checkpoint
from service.data.reading import read_examples
from service.engines.base import EngineInfo
from service.offline import encode_items
from service.records import Encoding, Exchange, Item, Message, TokenSequence
from service.scheduling.budget import batch_cost
from service.settings import TokenizationSettings
from service.tokenization import Tokenization


@dataclass(frozen=True, slots=True)
class Work:
    """Sequences to score."""

    sequences: tuple[TokenSequence, ...] = field(repr=False)

    groups: tuple[int, ...] = field(repr=False)
    """For each sequence the number of its prompt; sequences of one prompt are adjacent."""

    num_refused: int = 0
    """Items that the service would refuse and that are therefore left out."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return sum(sequence.num_tokens for sequence in self.sequences)


def tokenize(groups: Sequence[Group], checkpoint: Checkpoint) -> Work:
    """Return the completions of the groups with their prompts, truncated on the left where they are too long."""
    tokenization = Tokenization(
        checkpoint.tokenizer,
        TokenizationSettings(),
        max_input_tokens=checkpoint.max_input_tokens,
        vocab_size=checkpoint.embedding_size,
        append_token_ids=checkpoint.append_token_ids,
    )
    numbers = [number for number, group in enumerate(groups) for _ in group.completions]
    items = [Item(Exchange(group.prompt, completion)) for group in groups for completion in group.completions]
    encoded = encode_items(tokenization, items, Encoding(truncation="prompt_left"))
    accepted = [
        (number, entry) for number, entry in zip(numbers, encoded, strict=True) if isinstance(entry, TokenSequence)
    ]
    return Work(
        sequences=tuple(sequence for _, sequence in accepted),
        groups=tuple(number for number, _ in accepted),
        num_refused=len(items) - len(accepted),
    )


def batches_in_order(sequences: Sequence[TokenSequence], info: EngineInfo) -> Iterator[range]:
    """Yield the ranges of indices that fit one pass each, in the order of the sequences; a long one is alone.

    Unlike the batches of the service, these are composed as the caller ordered the sequences.
    """
    begin = 0
    lengths = [sequence.num_tokens for sequence in sequences]
    for end in range(1, len(lengths) + 1):
        if end - begin > 1 and batch_cost(lengths[begin:end], info.cost) > info.max_batch_tokens:
            yield range(begin, end - 1)
            begin = end - 1
    if begin < len(lengths):
        yield range(begin, len(lengths))


def read_groups(path: Path) -> Iterator[Group]:
    """Yield the rows of a data file, which are items (``prompt``, ``completion``) or pairs (``chosen``, ``rejected``).

    The turns of a conversation are joined by empty lines, because only lengths matter here.

    Raises:
        DatasetError: a row is neither.
    """
    for _, parsed in read_examples(path):
        yield Group(_joined(parsed.prompt), tuple(map(_joined, parsed.completions)))


def _joined(text: str | tuple[Message, ...]) -> str:
    return text if isinstance(text, str) else "\n\n".join(message.text for message in text)
