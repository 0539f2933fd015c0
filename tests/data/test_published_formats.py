"""The same pairs in every published form and file format have the same rewards in training, audit and calibration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from published_formats import PUBLISHED, Dialogue, made_up_dialogues, write_published
from tiny_models import write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from export.calibration.data import read_items
from export.calibration.scoring import score_items
from service.assembly import ServedModel, assemble
from service.data.rows import read_rows
from service.diagnostics.candidate_taps import candidate_taps
from service.records import Exchange, Message
from service.settings import read_settings
from training.audit.scoring import CheckpointScorer, score_pairs
from training.evaluation import rewards
from training.pairs import tokenize_pairs
from training.preferences import read_pairs

NUM_PAIRS = 200
REFERENCE = "conversation.jsonl"
LONGEST_CHARS = 700
OFTEN = frozenset({
    "conversation.jsonl.gz", "conversation.json", "conversation.csv", "conversation.parquet", "hub-text.jsonl",
    "ultrafeedback.jsonl",
})  # fmt: skip
"""The formats whose rewards are computed in the fast tests."""


def ignore(_: int) -> None:
    """No progress bar."""


@dataclass(frozen=True)
class Readers:
    """The three ways from a data file to rewards, on one checkpoint."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    scorer: CheckpointScorer
    served: ServedModel

    def rewards(self, file: Path) -> NDArray[np.float64]:
        """Rewards float64 [training, audit, calibration][item]: chosen and rejected of each pair in turn."""
        pairs = list(read_pairs([file]))
        tokenized = tokenize_pairs(pairs, self.tokenizer)
        ids = [ids for pair in tokenized for ids in (pair.chosen_ids, pair.rejected_ids)]
        audited = score_pairs(pairs, self.scorer, ignore)
        calibrated, _ = score_items(self.served, [item.exchange for item in read_items(file)], ignore)
        return np.array(
            [
                rewards(self.model, ids),
                np.stack([audited.chosen, audited.rejected], axis=1).ravel(),
                calibrated.rewards,
            ],
            dtype=np.float64,
        )


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("model"))
    # Each command scores one data set with an empty prefix cache; here one model scores all of them.
    tree = {"path": str(folder), "dtype": "float32", "num_threads": 1}
    settings = read_settings({"model": tree, "batching": {"prefix_cache_mib": 0}})
    return Readers(
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
        CheckpointScorer(settings),
        assemble(settings, taps=candidate_taps(2)),
    )


@dataclass(frozen=True)
class Reference:
    """Pairs, and their rewards from the file format of the reference."""

    pairs: list[Dialogue]
    rewards: NDArray[np.float64]


@pytest.fixture(scope="module")
def reference(readers: Readers, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    pairs = made_up_dialogues(NUM_PAIRS)
    file = write_published(tmp_path_factory.mktemp("data"), REFERENCE, pairs)
    return Reference(pairs, readers.rewards(file))


def test_the_three_commands_agree(reference: Reference) -> None:
    """Training, audit and calibration give the same rewards within 1e-5, which are those of different texts."""
    train, audit, calibrate = reference.rewards

    assert train.shape == (2 * NUM_PAIRS,)
    assert len(np.unique(train)) > 0.95 * train.size
    np.testing.assert_allclose(audit, train, atol=1e-5, rtol=0)
    np.testing.assert_allclose(calibrate, train, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name != REFERENCE],
)
def test_all_formats_give_the_same_rewards(readers: Readers, reference: Reference, tmp_path: Path, name: str) -> None:
    """Bit for bit, in training, audit and calibration."""
    file = write_published(tmp_path, name, reference.pairs)

    found = readers.rewards(file)

    np.testing.assert_array_equal(found, reference.rewards)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_all_formats_have_the_same_texts(tmp_path: Path, name: str) -> None:
    """Training and audit read the same pairs, and calibration the same items, whatever the file looks like."""
    pairs = made_up_dialogues(NUM_PAIRS)

    file = write_published(tmp_path, name, pairs)

    expected = [(tuple(Message(**turn) for turn in pair.prompt), pair.chosen, pair.rejected) for pair in pairs]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs([file])] == expected
    assert [item.exchange for item in read_items(file)] == [
        Exchange(prompt, text) for prompt, *both in expected for text in both
    ]


@pytest.mark.slow
def test_human_pairs_give_the_same_rewards_in_all_formats(readers: Readers, tmp_path: Path) -> None:
    """As above, with pairs of people from the file in the environment variable ``PREFERENCE_PAIRS``."""
    source = os.environ.get("PREFERENCE_PAIRS")
    if not source:
        pytest.skip("PREFERENCE_PAIRS names no file of human preference pairs")
    rows = (row.values for row in read_rows(Path(source)))
    dialogues = (
        Dialogue(tuple(turn["content"] for turn in row["prompt"]), row["chosen"], row["rejected"]) for row in rows
    )
    short = (pair for pair in dialogues if sum(map(len, [*pair.turns, pair.chosen, pair.rejected])) < LONGEST_CHARS)
    pairs = list(islice(short, NUM_PAIRS))

    found = {name: readers.rewards(write_published(tmp_path, name, pairs)) for name in PUBLISHED}

    assert found[REFERENCE].shape == (3, 2 * NUM_PAIRS)
    for rewards_of_format in found.values():
        np.testing.assert_array_equal(rewards_of_format, found[REFERENCE])
