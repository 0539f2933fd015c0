"""A calibration of a tiny checkpoint, made by the real command from made-up completions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tiny_models import write_tiny_checkpoint

from export.calibration import fit as calibration_fit
from export.calibration.command import main
from service.checkpoints.files import CALIBRATION_FILE

WORDS = [
    "the",
    "a",
    "one",
    "some",
    "egg",
    "water",
    "minute",
    "sea",
    "wind",
    "ship",
    "fox",
    "dog",
    "model",
    "answer",
    "question",
    "reward",
    "prompt",
    "old",
    "short",
    "brown",
    "lazy",
    "quick",
    "boil",
    "put",
    "cool",
    "write",
    "jump",
    "help",
    "know",
    "add",
    "like",
    "and",
    "or",
    "but",
    "in",
    "on",
    "with",
    "into",
    "over",
    "about",
    "for",
    "is",
    "are",
    "was",
    "has",
    "please",
    "sorry",
]
NUM_PROMPTS = 330
SIZES = ("--items-per-set", "2", "--probe-completions", "4")


def made_up_text(rng: random.Random, num_sentences: int) -> str:
    """Return sentences with predictable word pairs: a word is often followed by its successor in `WORDS`."""
    sentences = []
    for _ in range(num_sentences):
        index = rng.randrange(len(WORDS))
        words = []
        for _ in range(rng.randint(4, 12)):
            words.append(WORDS[index])
            index = (index + 1 if rng.random() < 0.8 else rng.randrange(len(WORDS))) % len(WORDS)
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


def write_pairs(path: Path, num_prompts: int = NUM_PROMPTS, seed: int = 0) -> Path:
    """Write preference pairs of distinct prompts."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": f"{made_up_text(rng, 1)} Number {seed} {index}?",
            "chosen": made_up_text(rng, rng.randint(1, 5)),
            "rejected": made_up_text(rng, rng.randint(1, 4)),
        }
        for index in range(num_prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def calibrate(folder: Path, data: Path, *options: str) -> int:
    """Run the command with few trees, and return its exit status."""
    with patch.object(calibration_fit, "NUM_TREES", 8):
        return main([str(folder), str(data), *SIZES, "--force", *options])


def write_calibrated_checkpoint(folder: Path, **config_overrides: Any) -> Path:
    """Write a tiny Llama classifier with its calibration and return the folder."""
    write_tiny_checkpoint(folder, "llama", num_hidden_layers=4, **config_overrides)
    calibrate(folder, write_pairs(folder.parent / "pairs.jsonl"))
    assert (folder / CALIBRATION_FILE).is_file()
    return folder
