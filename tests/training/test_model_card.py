"""The model card of a trained model: recipe, data, and accuracy beside the rule that prefers the longer answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import yaml

from training.evaluation import Evaluation, Share
from training.manifest import Manifest
from training.model_card import model_card
from training.recipe import Recipe
from training.selection import PairCounts

EVALUATION = Evaluation(
    num_pairs=200,
    accuracy=Share(0.655, 0.034),
    longer_wins=Share(0.52, 0.035),
    mean_margin=0.4,
    log_length_correlation=0.31,
    within_pairs_correlation=0.21,
)
MANIFEST = Manifest(
    base="org/sft",
    base_hash="ab" * 32,
    data_hashes={"pairs.jsonl": "cd" * 32},
    pairs=PairCounts(held_out=25, too_long=3, unbalanced=0, trained=72),
    recipe=Recipe(max_length=512, dtype="fp32"),
    num_steps=5,
    selected_step=5,
    evaluations={"dev.jsonl": EVALUATION},
)


def test_accuracy_stands_beside_the_length_rule() -> None:
    """One row for each evaluation, with the standard errors."""
    card = model_card(MANIFEST, Path("models/polite"), is_adapter=True)

    assert "| dev.jsonl | 200 | 65.5% ± 3.4% | 52.0% ± 3.5% | +0.31 |" in card


def test_data_and_recipe_are_complete() -> None:
    """Hashes and counts of the data, what was held out, every hyperparameter that is set, and the base."""
    card = model_card(MANIFEST, Path("models/polite"), is_adapter=True)

    assert f"| pairs.jsonl | `{'cd' * 32}` |" in card
    assert "| held out | 25 |" in card
    assert "| longer than 512 tokens | 3 |" in card
    assert "Held out are 25 percent of the prompts" in card
    assert f"Base: org/sft (hash over its weights `{'ab' * 32}`)" in card
    assert "| learning_rate | 0.0002 |" in card
    assert "reward-serve --model polite" in card


def test_the_metadata_is_what_the_hub_reads() -> None:
    """YAML with the library, and the base where it is a hub id."""
    adapter = model_card(MANIFEST, Path("polite"), is_adapter=True)
    whole = model_card(replace(MANIFEST, base="local-folder"), Path("polite"), is_adapter=False)

    assert yaml.safe_load(adapter.split("---")[1]) == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "base_model": "org/sft",
        "tags": ["reward-model"],
    }
    assert yaml.safe_load(whole.split("---")[1])["library_name"] == "transformers"
    assert "base_model" not in yaml.safe_load(whole.split("---")[1])


def test_what_is_not_known_is_not_a_number() -> None:
    """Without evaluations, and for an undefined correlation, the card says so."""
    unknown = replace(EVALUATION, log_length_correlation=math.nan)

    undefined = model_card(replace(MANIFEST, evaluations={"dev": unknown}), Path("polite"), is_adapter=True)
    none = model_card(replace(MANIFEST, evaluations={}), Path("polite"), is_adapter=True)

    assert "| undefined |" in undefined
    assert "nan" not in undefined
    assert "Not measured: no pairs were held out" in none
