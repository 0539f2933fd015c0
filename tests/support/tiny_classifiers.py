"""Tiny classifiers loaded as the engine loads them, and token ids that cover the hard cases of forward paths."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from service.checkpoints.configuration import read_config
from service.checkpoints.reward_description import read_description
from service.engines.base import EngineInfo
from service.engines.model.classifier import Classifier, load_classifier
from service.engines.parity import Parity, choose_path, probes_for, reference_of
from service.engines.paths.base import ForwardPath, PathChoice, PathSpec, candidate_paths
from service.engines.paths.packed import PackedForward
from service.records import Pooling, TokenSequence

CPU = torch.device("cpu")

LENGTHS = (5, 1, 70, 33, 129, 2, 64, 17, 5)
"""Longer and shorter than the tiny families' sliding window of 16, odd and even, and a single token."""


def load_tiny(
    folder: Path, dtype: torch.dtype = torch.float32, pooling: Pooling = "hf", device: torch.device = CPU
) -> Classifier:
    """Load a tiny checkpoint with the pad token of its own configuration."""
    pad_token_id = read_config(folder).get_text_config().pad_token_id
    return load_classifier(
        folder,
        dtype=dtype,
        device=device,
        pooling=pooling,
        pad_token_id=pad_token_id,
        description=read_description(folder),
    )


def packed_spec(**options: Any) -> PathSpec:
    """Return a packed path with these options of a ``PathSpec``; it shares prefixes unless they say otherwise."""
    return PathSpec("packed", **{"share_prefixes": True, **options})


def packed_path(classifier: Classifier, **options: Any) -> PackedForward:
    """Open a packed path with the options of `packed_spec`."""
    return PackedForward(classifier, packed_spec(**options))


def probe_and_choose(
    classifier: Classifier, choice: PathChoice = "auto", max_tokens: int = 400, **options: Any
) -> tuple[ForwardPath, Parity]:
    """Choose a forward path as the engine does; ``options`` are those of the fastest packed path."""
    fastest = packed_spec(**options)
    reference = reference_of(classifier, probes_for(classifier, max_tokens))
    return choose_path(classifier, candidate_paths(choice, fastest), reference)


def measured(info: EngineInfo, name: str) -> float:
    """Return a number that the parity probe measured."""
    return float(info.parity[name])


def random_rows(classifier: Classifier, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[tuple[int, ...]]:
    """Return random token ids of these lengths, without the special tokens (the first five ids)."""
    dice = random.Random(seed)
    return [tuple(dice.randrange(5, classifier.config.vocab_size) for _ in range(length)) for length in lengths]


def rows_that_share(classifier: Classifier, seed: int = 0) -> list[tuple[int, ...]]:
    """Return token ids with nested common prefixes: a system prompt, prompts after it, completions after those.

    Some are prefixes of others, and one shares nothing.
    """
    dice = random.Random(seed)
    system, *prompts, stranger = random_rows(classifier, lengths=(37, 1, 40, 90, 50), seed=seed)
    rows = [system, system[:20], stranger]
    for prompt in prompts:
        lengths = tuple(dice.randrange(1, 80) for _ in range(4))
        completions = random_rows(classifier, lengths, seed=dice.randrange(1000))
        rows += [system + prompt, *(system + prompt + completion for completion in completions)]
    rows.append(rows[5] + rows[6][:33])
    return dice.sample(rows, len(rows))


def with_pad(classifier: Classifier, rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the rows, each with the pad token at its end."""
    assert classifier.pad_token_id is not None
    return [(*row, classifier.pad_token_id) for row in rows]


def head_of(classifier: Classifier) -> torch.nn.Linear:
    """Return the linear head, which the tiny classifiers of decoders have."""
    assert isinstance(classifier.state_head, torch.nn.Linear)
    return classifier.state_head


def rows_with_endings(classifier: Classifier) -> list[tuple[int, ...]]:
    """Return random token ids, some ending as completions do (EOS, two, EOS and a newline, pads) or pads only."""
    rows = random_rows(classifier)
    config = classifier.config
    eos = 2 if config.eos_token_id is None else config.eos_token_id
    pad = config.pad_token_id
    endings: list[tuple[int, ...]] = [(eos,), (eos, eos), (eos, 7), (pad,), (eos, pad, pad)]
    return [*rows, *(row + ending for row, ending in zip(rows, endings, strict=False)), (pad,), (pad, pad, pad)]


def sequences_of(rows: list[tuple[int, ...]]) -> list[TokenSequence]:
    """Return token ids as the records that the scheduler passes to an engine."""
    return [TokenSequence(row) for row in rows]


def shuffled_batches(rows: list[tuple[int, ...]], seed: int) -> list[list[tuple[int, ...]]]:
    """Return the rows in a random order, split into batches of random sizes."""
    dice = random.Random(seed)
    waiting = dice.sample(rows, len(rows))
    batches = []
    while waiting:
        size = dice.randint(1, len(waiting))
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches
