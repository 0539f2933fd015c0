"""Each layout of a published reward model is converted and served with the rewards of an independent reading.

The reading is transformers' body, loaded from the same weights, and the head written out here. Where a layout was read
stands beside its function; all weights are random.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import (
    PUBLISHED,
    Published,
    beaver,
    grm,
    open_assistant,
    two_layers,
)
from tiny_layouts import HIDDEN_SIZE, random, store
from tiny_mixtures import HYBRIDS, MIXTURES, PADDED_MIXTURES
from tiny_models import SENTENCES
from transformers import AutoModel, AutoTokenizer

from export.conversion_command import main
from export.convert import convert
from export.layouts import LAYOUTS
from service.checkpoints.reward_description import DESCRIPTION_FILE
from service.errors import CheckpointError
from service.records import Exchange
from service.settings import read_settings
from training.audit.scoring import CheckpointScorer, ScoredCompletion

PAIRS = [(prompt, completion) for prompt in SENTENCES[:3] for completion in SENTENCES[3:]]


@torch.no_grad()
def expected_rewards(plain: Path, published: Published) -> list[float]:
    """The head on the last state of the text that the chat template renders."""
    body, tokenizer = AutoModel.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    rewards = []
    for prompt, completion in PAIRS:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *published.appended]
        rewards.append(float(published.read(body(torch.tensor([ids])).last_hidden_state[0, -1])))
    return rewards


def served_rewards(folder: Path, **model: Any) -> tuple[CheckpointScorer, list[float]]:
    scorer = CheckpointScorer(
        read_settings({"model": {"path": str(folder), "device": "cpu", "dtype": "float32"} | model})
    )
    scores = scorer.score([Exchange(*pair) for pair in PAIRS], lambda _: None)
    return scorer, [score.reward for score in scores if isinstance(score, ScoredCompletion)]


@pytest.mark.parametrize("write", PUBLISHED)
def test_a_published_layout_is_served_with_its_rewards(write: Callable[[Path], Published], tmp_path: Path) -> None:
    """A converted checkpoint gives the rewards of its own head on transformers' states, and says what it was."""
    published = write(tmp_path / "source")

    conversion = convert(tmp_path / "source", tmp_path / "out")
    _, rewards = served_rewards(tmp_path / "out")

    expected = expected_rewards(tmp_path / "plain", published)
    assert rewards == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert conversion.origin == published.layout
    description = json.loads((tmp_path / "out" / DESCRIPTION_FILE).read_bytes())
    assert (description["pooling"], description["source"]["layout"]) == (published.pooling, published.layout)
    assert description["text"].get("append_token_ids", []) == list(published.appended)


@pytest.mark.parametrize("forward", ["packed", "padded"])
def test_a_deeper_head_gives_the_same_rewards_on_each_path_and_in_any_batch(forward: str, tmp_path: Path) -> None:
    """On packed and padded batches rewards are those of the reading, whose order changes no more than rounding."""
    published = grm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")

    scorer, rewards = served_rewards(tmp_path / "out", forward=forward)
    exchanges = [Exchange(*pair) for pair in PAIRS]
    backwards = scorer.score(exchanges[::-1], lambda _: None)[::-1]

    assert rewards == pytest.approx(expected_rewards(tmp_path / "plain", published), abs=1e-4)
    assert [score.reward for score in backwards if isinstance(score, ScoredCompletion)] == pytest.approx(
        rewards, abs=1e-6
    )


def test_the_activation_of_an_unknown_layout_is_not_guessed(tmp_path: Path) -> None:
    """A deeper head of an unknown class is refused until the activation is given, and then served with it."""
    head = {
        "score.0.weight": random(HIDDEN_SIZE, HIDDEN_SIZE, seed=1),
        "score.0.bias": random(HIDDEN_SIZE, seed=2),
        "score.2.weight": random(1, HIDDEN_SIZE, seed=3),
        "score.2.bias": torch.tensor([0.125]),
    }
    store(tmp_path / "source", head, architectures=["LlamaForRewardModel"])
    silu = torch.nn.functional.silu
    published = Published(two_layers(head, "score.0", "score.2", silu), "linear layers")

    with pytest.raises(CheckpointError, match="do not tell the activation between them: pass --activation"):
        convert(tmp_path / "source", tmp_path / "out")
    convert(tmp_path / "source", tmp_path / "out", activation="silu")

    _, rewards = served_rewards(tmp_path / "out")
    assert rewards == pytest.approx(expected_rewards(tmp_path / "plain", published), abs=1e-4)


def test_a_head_that_is_not_known_is_named(tmp_path: Path) -> None:
    """The refusal has the names of the tensors outside the body, and the command that prints what is known."""
    mixture = {"mixture.layers.0.weight": random(8, HIDDEN_SIZE), "regression_layer.weight": random(19, HIDDEN_SIZE)}
    store(tmp_path / "source", mixture)

    with pytest.raises(CheckpointError, match=r"mixture\.layers\.0\.weight, regression_layer\.weight.*--list"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_normalisation_is_told(tmp_path: Path) -> None:
    """What training did to the head's output and the service does not is a note of the conversion."""
    beaver(tmp_path / "source")

    notes = convert(tmp_path / "source", tmp_path / "out").notes

    assert any("less its mean ([2.5])" in note for note in notes)


def test_the_mean_of_states_is_refused(tmp_path: Path) -> None:
    """OpenAssistant's other pooling is not served, so it is not converted either."""
    open_assistant(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_bytes()) | {"pooling": "mean"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match="reads the mean of all states"):
        convert(tmp_path / "source", tmp_path / "out")


def test_the_layouts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """``--list`` prints each layout with the models that have it, and needs no folder."""
    with pytest.raises(SystemExit) as exit_status:
        main(["--list"])

    assert exit_status.value.code == 0
    assert "UltraRM" in capsys.readouterr().out


def test_the_documented_layouts_are_those_that_are_recognised() -> None:
    """docs/models.md has a row for each layout, with its pooling, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- layouts: begin -->")[2].partition("<!-- layouts: end -->")[0].splitlines()[3:]

    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    assert [(name, models, pooling) for name, models, _, pooling in cells] == [
        (layout.name, layout.models, layout.pooling) for layout in LAYOUTS
    ]


def test_the_documented_mixtures_and_hybrids_are_those_that_are_tested() -> None:
    """docs/models.md has every tested model type with experts or a recurrence, under the path that the tests expect."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    packed, padded = (
        next(line for line in page.splitlines() if line.startswith(f"| {path} | `")) for path in ("packed", "padded")
    )

    assert all(f"`{name}`" in packed for name in MIXTURES)
    assert all(f"`{name}`" in padded for name in (*PADDED_MIXTURES, *HYBRIDS))
