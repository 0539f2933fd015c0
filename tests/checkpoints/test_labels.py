"""Labels of a classifier are served as outputs or as classes only where it is known which of the two they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from several_outputs import PAIRS, scores_of, served
from tiny_models import write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.checkpoints.checkpoint import model_version, open_checkpoint
from service.checkpoints.reward_description import (
    ClassifierHead,
    RewardDescription,
    WeightedSum,
    write_description,
)
from service.errors import CheckpointError, SettingsError
from service.settings import ModelSettings

NAMES = {0: "helpful", 1: "correct", 2: "brief"}
CLASSES: dict[str, Any] = {
    "num_labels": 2,
    "problem_type": "single_label_classification",
    "id2label": {0: "bad", 1: "good"},
}


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    """Transformers' logits [texts, labels] of the texts as they are served."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt, completion in PAIRS:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            inputs = tokenizer(prompt, completion, return_tensors="pt", return_token_type_ids=True)
        rows.append(model(**inputs).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("family", "forward"), [("llama", "packed"), ("qwen2", "padded"), ("bert", "padded")])
def test_labels_of_a_regression_are_outputs(family: str, forward: str, tmp_path: Path) -> None:
    """They have the names of id2label and transformers' logits; no reward is made up."""
    write_tiny_checkpoint(tmp_path, family, num_labels=3, problem_type="regression", id2label=NAMES)

    parts = served(tmp_path, forward=forward)
    scores = scores_of(parts, PAIRS)

    assert parts.info.outputs == ("helpful", "correct", "brief")
    assert torch.tensor([score.outputs for score in scores]).allclose(logits_of(tmp_path), atol=1e-4)
    assert all(score.reward is None for score in scores)


def test_names_and_weights_may_come_from_settings_and_file(tmp_path: Path) -> None:
    """A setting names labels whose problem type is unknown; reward_model.json names them and gives weights."""
    write_tiny_checkpoint(tmp_path, num_labels=3)
    names = ["one", "two", "three"]

    assert served(tmp_path, outputs=names).info.outputs == ("one", "two", "three")
    rule = WeightedSum({"one": 0.65, "two": 0.8, "three": -0.5})
    write_description(tmp_path, RewardDescription(ClassifierHead(), outputs=tuple(names), combine=rule))
    scores = scores_of(served(tmp_path), PAIRS)

    expected = logits_of(tmp_path) @ torch.tensor([0.65, 0.8, -0.5])
    assert [score.reward for score in scores] == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(SettingsError, match=r"without reward_model\.json"):
        served(tmp_path, outputs=names)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    ("setting", "function"),
    [
        ("logit:good", lambda logits: logits[:, 1]),
        ("logit_difference:good,bad", lambda logits: logits[:, 1] - logits[:, 0]),
        ("log_probability:good", lambda logits: torch.log_softmax(logits, dim=1)[:, 1]),
        ("probability:1", lambda logits: torch.softmax(logits, dim=1)[:, 1]),
    ],
)
def test_classes_are_served_by_a_named_function(setting: str, function: Any, family: str, tmp_path: Path) -> None:
    """The reward is the function of transformers' logits, and /v1/model shows it."""
    write_tiny_checkpoint(tmp_path, family, **CLASSES)

    parts = served(tmp_path, class_reward=setting)
    rewards = [score.reward for score in scores_of(parts, PAIRS)]

    assert rewards == pytest.approx(function(logits_of(tmp_path)).tolist(), abs=1e-4)
    described = parts.description()["reward_model"]
    assert described["outputs"] == ("bad", "good")
    assert "good" in json.dumps(described["combine"])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classes_are_refused_by_default(family: str, tmp_path: Path) -> None:
    """A choice among classes would be a guess; the refusal names the labels and both settings."""
    write_tiny_checkpoint(tmp_path, family, **CLASSES)

    with pytest.raises(CheckpointError, match=r"\(bad, good\).*model\.class_reward.*model\.outputs"):
        served(tmp_path)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"class_reward": "logit:ugly"}, "names the label ugly, but the labels are bad, good"),
        ({"class_reward": "sigmoid:good"}, "begins with none of logit, logit_difference"),
        ({"class_reward": "logit_difference:good"}, "needs two different labels"),
        ({"class_reward": "logit:good,bad"}, "needs one label"),
        ({"class_reward": "logit:good", "outputs": ("a", "b")}, "exclude each other"),
        ({"outputs": ("a", "b", "c")}, "has 3 names, but the model has 2 labels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], refusal: str, tmp_path: Path) -> None:
    """What the labels do not have, or says two things, is refused in one sentence."""
    write_tiny_checkpoint(tmp_path, **CLASSES)

    with pytest.raises(SettingsError, match=refusal):
        open_checkpoint(tmp_path, ModelSettings(path=str(tmp_path), **settings))


def test_the_version_covers_the_function(tmp_path: Path) -> None:
    """Two functions of the same logits are two models; the file and the setting that say the same are one."""
    write_tiny_checkpoint(tmp_path, **CLASSES)

    def version(**settings: Any) -> str:
        checkpoint = open_checkpoint(tmp_path, ModelSettings(path=str(tmp_path), **settings))
        return model_version(checkpoint, dtype="float32", template="chat").version

    by_setting = [version(class_reward=text) for text in ("logit:good", "logit:bad", "probability:good")]
    rule = WeightedSum({"good": 1.0})
    write_description(tmp_path, RewardDescription(ClassifierHead(), outputs=("bad", "good"), combine=rule))

    assert len(set(by_setting)) == 3
    assert version() == by_setting[0]
