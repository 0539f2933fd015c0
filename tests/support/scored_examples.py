"""Synthetic pairs and rewards with known properties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.console import Advance
from service.records import Exchange
from training.audit.findings import Findings, investigate
from training.audit.scored_pairs import ScoredPairs
from training.audit.scoring import Outcome, ScoredCompletion, UnscoredCompletion, score_pairs
from training.preferences import PreferencePair

MODEL = {"name": "example", "version": "0123"}
DATA = {"files": [{"name": "pairs.jsonl", "sha256": "ab" * 32}], "train_files": []}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "near", "an", "old", "ship", "today")


class FunctionScorer:
    """A model that is a function of the exchange; lengths are words, as if they were its tokens."""

    def __init__(self, reward_of: Callable[[Exchange], float | None]) -> None:
        self._reward_of = reward_of

    def description(self) -> Mapping[str, Any]:
        return MODEL

    def score(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Outcome]:
        advance(len(exchanges))
        rewards = [self._reward_of(exchange) for exchange in exchanges]
        return [
            UnscoredCompletion("no reward")
            if reward is None
            else ScoredCompletion(reward, len(exchange.completion_text.split()))
            for reward, exchange in zip(rewards, exchanges, strict=True)
        ]


def scored(
    gaps: Sequence[float] | NDArray[np.float64],
    *,
    lengths: Sequence[tuple[int, int]] | None = None,
    prompts: Sequence[str] | None = None,
) -> ScoredPairs:
    """Pairs with these gaps of rewards (the rejected one has reward 0), lengths (chosen, rejected) and prompts."""
    number = len(gaps)
    sizes = np.array(lengths if lengths is not None else [(5, 5)] * number, dtype=float).reshape(number, 2)
    names = prompts if prompts is not None else [f"prompt {n}" for n in range(number)]
    pairs = [PreferencePair(name, f"chosen {n}", f"rejected {n}", id=f"id-{n}") for n, name in enumerate(names)]
    return ScoredPairs(pairs, np.array(gaps, dtype=float), np.zeros(number), sizes[:, 0], sizes[:, 1])


def human_pairs(num_pairs: int, *, seed: int = 0, prefix: str = "question") -> list[PreferencePair]:
    """Pairs in which people choose the answer with more foxes, whatever its length; two prompts never look alike."""
    rng = np.random.default_rng(seed)

    def text(num_foxes: int) -> str:
        words = [str(word) for word in rng.choice(WORDS, int(rng.integers(4, 60)))] + ["fox"] * num_foxes
        return " ".join(words)

    return [
        PreferencePair(
            prompt=f"{prefix} {seed} {number} " + " ".join(map(str, rng.integers(0, 10_000, 10))),
            chosen=text(6),
            rejected=text(0),
            id=f"{prefix}-{number}",
            source="even" if number % 2 == 0 else "odd",
        )
        for number in range(num_pairs)
    ]


def audited(reward_of: Callable[[Exchange], float | None], pairs: Sequence[PreferencePair], **options: Any) -> Findings:
    """What an audit of such a model on such pairs finds."""
    return investigate(scored_by(reward_of, pairs), model=MODEL, data=DATA, **options)


def scored_by(reward_of: Callable[[Exchange], float | None], pairs: Sequence[PreferencePair]) -> ScoredPairs:
    return score_pairs(pairs, FunctionScorer(reward_of), lambda _: None)
