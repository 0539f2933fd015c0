"""Synthetic preference pairs with a rule that a tiny model learns in seconds: the polite answer is preferred."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NEUTRAL_WORDS = ["the", "quick", "brown", "fox", "can", "jump", "over", "a", "lazy", "dog", "and", "an", "old", "ship"]
POLITE, RUDE = "please", "stupid"


def polite_pairs(num_pairs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of pairs in which the chosen answer contains the polite word and the rejected one the rude word."""
    rng = random.Random(seed)
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {seed}-{number}?"}],
            "chosen": _answer(POLITE, rng),
            "rejected": _answer(RUDE, rng),
        }
        for number in range(num_pairs)
    ]


def with_slips(rows: list[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    """The rows with every n-th label swapped, as by a careless annotator."""
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if number % every == 0 else row
        for number, row in enumerate(rows)
    ]


def longer_wins_pairs(num_pairs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of pairs that differ in length only: the chosen answer has at least three words more."""
    rng = random.Random(seed)
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {seed}-{number}?"}],
            "chosen": " ".join(rng.choices(NEUTRAL_WORDS, k=rng.randint(9, 24))),
            "rejected": " ".join(rng.choices(NEUTRAL_WORDS, k=rng.randint(1, 6))),
        }
        for number in range(num_pairs)
    ]


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _answer(word: str, rng: random.Random) -> str:
    words = rng.choices(NEUTRAL_WORDS, k=rng.randint(2, 6))
    words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)
