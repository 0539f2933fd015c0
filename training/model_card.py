"""The model card of a trained reward model: recipe, data, accuracy beside that of the length rule, and how to serve it.

Pure: it takes the manifest and returns the text of ``README.md``. It holds hashes and counts, and no text of a pair.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

from service.data.holdout import HOLD_OUT_PERCENT
from training.manifest import Manifest

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(manifest: Manifest, folder: Path, *, is_adapter: bool) -> str:
    """Return the model card in Markdown, with the metadata block that the hub reads.

    Args:
        manifest: the manifest of the run.
        folder: the model's folder, whose name is the model's.
        is_adapter: whether the folder holds an adapter instead of a whole checkpoint.
    """
    return "\n".join(
        [
            *_metadata(manifest, is_adapter=is_adapter),
            f"# {folder.resolve().name}",
            "",
            *_summary(manifest),
            "",
            *_accuracy(manifest),
            *_data(manifest),
            *_recipe(manifest),
            *_serving(folder),
        ]
    )


def _metadata(manifest: Manifest, *, is_adapter: bool) -> Iterator[str]:
    yield "---"
    yield f"library_name: {'peft' if is_adapter else 'transformers'}"
    yield "pipeline_tag: text-classification"
    if _HUB_ID.fullmatch(manifest.base) and not Path(manifest.base).exists():
        yield f"base_model: {manifest.base}"
    yield "tags:"
    yield "- reward-model"
    yield "---"
    yield ""


def _summary(manifest: Manifest) -> Iterator[str]:
    recipe = manifest.recipe
    form = "All weights" if recipe.full else f"A LoRA adapter of rank {recipe.lora_rank}"
    yield (
        f"A reward model with a scalar head. {form} and the head were trained on {manifest.pairs.trained} preference "
        "pairs with the Bradley-Terry loss."
    )
    yield "The reward is the raw output of the head: only differences between completions of one prompt have a meaning."


def _accuracy(manifest: Manifest) -> Iterator[str]:
    yield "## Accuracy"
    yield ""
    if not manifest.evaluations:
        yield "Not measured: no pairs were held out, and none were given to evaluate on."
        yield ""
        return
    yield "The share of pairs in which the chosen completion has the higher reward, with its standard error, and the"
    yield "same share for the rule that always prefers the longer completion."
    yield ""
    yield "| pairs from | pairs | accuracy | always the longer one | correlation of reward with log length |"
    yield "| -- | -- | -- | -- | -- |"
    for name, result in manifest.evaluations.items():
        accuracy, longer = result.accuracy, result.longer_wins
        yield (
            f"| {_cell(name)} | {result.num_pairs} | {accuracy.value:.1%} ± {accuracy.standard_error:.1%} "
            f"| {longer.value:.1%} ± {longer.standard_error:.1%} | {_correlation(result.log_length_correlation)} |"
        )
    yield ""


def _data(manifest: Manifest) -> Iterator[str]:
    counts, recipe = manifest.pairs, manifest.recipe
    yield "## Data"
    yield ""
    yield "| source | SHA-256 |"
    yield "| -- | -- |"
    for name, digest in manifest.data_hashes.items():
        yield f"| {_cell(name)} | `{digest}` |"
    yield ""
    yield "| pairs | number |"
    yield "| -- | -- |"
    yield f"| trained on | {counts.trained} |"
    yield f"| held out | {counts.held_out} |"
    yield f"| longer than {recipe.max_length} tokens | {counts.too_long} |"
    yield f"| that cannot be tokenized | {counts.refused} |"
    yield f"| left out because annotators disagree | {counts.disputed} |"
    yield f"| left out to balance lengths | {counts.unbalanced} |"
    yield f"| of those trained on, with a shortened prompt | {counts.shortened} |"
    for family, number in manifest.contrast_pairs.items():
        yield f"| contrast pairs made from those trained on, {_cell(family)} | {number} |"
    yield ""
    if not recipe.hold_out_percent:
        yield "Nothing was held out."
    else:
        yield (
            f"Held out are {recipe.hold_out_percent:g} percent of the prompts, selected by a hash of the first user "
            f"message (`service/data/holdout.py`; the default is {HOLD_OUT_PERCENT} percent). `reward-calibrate "
            "--held-out` selects the same prompts."
        )
    yield ""


def _recipe(manifest: Manifest) -> Iterator[str]:
    yield "## Recipe"
    yield ""
    yield f"Base: {manifest.base}" + (f" (hash over its weights `{manifest.base_hash}`)" if manifest.base_hash else "")
    yield ""
    yield "| hyperparameter | value |"
    yield "| -- | -- |"
    for name, value in dataclasses.asdict(manifest.recipe).items():
        if value is not None:
            yield f"| {name} | {value} |"
    yield f"| optimizer steps | {manifest.num_steps} |"
    if manifest.selected_step != manifest.num_steps:
        yield f"| step of the saved weights | {manifest.selected_step} |"
    yield ""
    yield "`training.json` has all of this for programs, with the versions of the libraries."
    yield ""


def _serving(folder: Path) -> Iterator[str]:
    name = folder.resolve().name
    yield "## Use"
    yield ""
    yield "```"
    yield f"reward-serve --model {name}"
    yield f"reward-audit {name} held-out-pairs.jsonl --out report"
    yield "```"
    yield ""


def _correlation(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:+.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
