"""Scores everything that a calibration is made from: the parts of the data, and hacks of the prompts of three parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.calibration.data import CleanItem, Part, require_enough, split
from export.calibration.hack_sets import Base, HackSet, make_hacks
from export.calibration.hacks import SUITE
from export.calibration.paired_items import preference_pairs
from export.calibration.scoring import ScoredItems, score_items
from service.assembly import ServedModel
from service.checkpoints.checkpoint import Checkpoint
from service.console import Advance
from service.edits.phrases import WORDINGS
from service.errors import CalibrationError

HACK_SEEDS: Mapping[Part, str] = {"fit_detectors": "detectors", "select": "combine", "calibrate": "conformal"}
"""Seeds of the choice of base items in the parts of which hacks are made. A change would give another calibration from
the same data and seed."""


HACK_WORDINGS: Mapping[Part, int] = {"fit_detectors": 0, "select": 1, "calibrate": 2}
"""Wording of what plausible hacks add, by part."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Number of base items of each built-in set, by the part whose prompts are used."""

    fit_detectors: int = 40
    select: int = 20
    calibrate: int = 40


@dataclass(frozen=True, slots=True)
class ScoredParts:
    """Everything that was scored."""

    clean: Mapping[Part, ScoredItems]
    """The items of the data, by part."""

    hacks: Mapping[Part, tuple[ScoredItems, list[str]]]
    """Hacks and the name of each one's set, by the part whose prompts they were made of."""

    pairs: Mapping[Part, NDArray[np.int64]]
    """Preference pairs of each part, int64 [pairs, 2]: indices of chosen and rejected item; none for other data."""


def count_items(items: Sequence[CleanItem], sizes: Sizes, sets: Sequence[HackSet] = SUITE) -> int:
    """Return how many items a calibration will score, for its progress bar."""
    return len(items) + len(sets) * (sizes.fit_detectors + sizes.select + sizes.calibrate)


def score_parts(
    served: ServedModel,
    items: Sequence[CleanItem],
    sizes: Sizes,
    advance: Advance,
    *,
    seed: int,
    sets: Sequence[HackSet] = SUITE,
    cache: Path | None = None,
) -> ScoredParts:
    """Score the parts of the data, and the hacks made of three of them.

    Args:
        served: the model, assembled with the candidate taps.
        items: clean items; they are split by prompt.
        sizes: number of base items of each set.
        advance: progress callback.
        seed: seed of the choice of base items and of the hacks.
        sets: sets of hacks to make.
        cache: folder of earlier scores.

    Raises:
        CalibrationError: a part is too small, or the model gives a reward that is not finite, or no states.
    """
    require_enough(items, "The data")
    parts = split(items)
    clean: dict[Part, ScoredItems] = {}
    pairs: dict[Part, NDArray[np.int64]] = {}
    for part, members in parts.items():
        clean[part], indices = score_items(served, [item.exchange for item in members], advance, cache)
        pairs[part] = preference_pairs([members[index] for index in indices])
    hacks: dict[Part, tuple[ScoredItems, list[str]]] = {}
    random_token = _token_sampler(required_checkpoint(served))
    counts: tuple[tuple[Part, int], ...] = (
        ("fit_detectors", sizes.fit_detectors), ("select", sizes.select), ("calibrate", sizes.calibrate)
    )  # fmt: skip
    for part, num_bases in counts:
        bases = _base_items(clean, part, num_bases, random_token, seed)
        made = make_hacks(bases, sets, seed)
        scored, made_indices = score_items(served, [hack.exchange for hack in made], advance, cache)
        hacks[part] = scored, [made[index].kind for index in made_indices]
    return ScoredParts(clean, hacks, pairs)


def required_checkpoint(served: ServedModel) -> Checkpoint:
    """Return the checkpoint of the served model.

    Raises:
        CalibrationError: the served engine is the oracle, which has none.
    """
    if served.checkpoint is None:
        raise CalibrationError("The oracle engine has no checkpoint, so it cannot be calibrated.")
    return served.checkpoint


def _base_items(
    clean: Mapping[Part, ScoredItems],
    part: Part,
    num_bases: int,
    random_token: Callable[[random.Random], str],
    seed: int,
) -> list[Base]:
    rng = random.Random(f"{seed} {HACK_SEEDS[part]}")  # noqa: S311 - a choice of items, not a secret
    own = clean[part].exchanges
    others = [exchange.completion_text for exchange in clean["fit_states"].exchanges]
    return [
        Base(exchange.prompt, exchange.completion_text, others, random_token, WORDINGS[HACK_WORDINGS[part]])
        for exchange in rng.sample(list(own), min(num_bases, len(own)))
    ]


def _token_sampler(checkpoint: Checkpoint) -> Callable[[random.Random], str]:
    tokenizer = checkpoint.tokenizer
    special = set(tokenizer.all_special_ids)
    # The first thousand ids of many vocabularies are single bytes and other fragments.
    first = 1000 if len(tokenizer) > 4000 else len(tokenizer) // 4
    ids = [token for token in range(first, len(tokenizer)) if token not in special]

    def sample(rng: random.Random) -> str:
        return str(tokenizer.decode([rng.choice(ids)]))

    return sample
