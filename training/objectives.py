"""Training of several objectives: pairs labelled with the objective that people judged, an output of the head for each.

A row names its objective in ``objective``; its Bradley-Terry loss is that of the objective's own output, so the outputs
share the model's body and nothing else. The names, and the weights if there are any, go into ``reward_model.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from service.checkpoints.reward_description import ClassifierHead, Provenance, RewardDescription, WeightedSum
from service.errors import DatasetError
from training.preferences import PreferencePair
from training.recipe import Recipe


def describe_outputs(recipe: Recipe) -> RewardDescription:
    """Return the content of ``reward_model.json`` for a model that a recipe trains."""
    # TRL trains transformers' classifier, so its pooling is that of training.
    description = RewardDescription(ClassifierHead(), source=Provenance("reward-train"))
    if not recipe.objectives:
        return description
    weights = dict(zip(recipe.objectives, recipe.objective_weights, strict=False))
    combine = WeightedSum(weights) if weights else None
    return msgspec.structs.replace(description, outputs=recipe.objectives, combine=combine)


def check_labels(pairs: Iterable[PreferencePair], objectives: Sequence[str]) -> None:
    """Check that each pair names one of the objectives.

    Raises:
        DatasetError: one does not; names file and row, and repeats no value of the row.
    """
    for pair in pairs:
        if pair.objective not in objectives:
            problem = 'an "objective" that --objectives does not name' if pair.objective else 'no "objective"'
            raise DatasetError(f"{pair.location or pair.id} has {problem}: each pair needs one of the names given.")


def check_all_trained(pairs: Iterable[PreferencePair], objectives: Sequence[str]) -> None:
    """Check that there is a pair to train on for each objective.

    Raises:
        DatasetError: there is none for one; names it.
    """
    counts = Counter(pair.objective for pair in pairs)
    for name in objectives:
        if not counts[name]:
            raise DatasetError(f"No pair is left to train the objective {name} on.")


def by_objective(
    named_pairs: Mapping[str, Sequence[Any]], objectives: Sequence[str]
) -> Iterator[tuple[str, int, list[Any]]]:
    """Yield the tokenized pairs of each source and objective, as name, index of the output, and pairs.

    Without objectives each source is yielded as it is, with output 0.
    """
    for source, pairs in named_pairs.items():
        if not objectives:
            yield source, 0, list(pairs)
        for output, objective in enumerate(objectives):
            own = [pair for pair in pairs if pair.pair.objective == objective]
            if own:
                yield f"{source}, {objective}", output, own


@contextmanager
def one_label(model: Any) -> Iterator[None]:
    """Let a model's configuration say one label while TRL's trainer is made, which refuses every other number.

    The head keeps its outputs, and the trainer of several objectives passes TRL one of them for each pair.
    """
    config, labels = model.config, dict(model.config.id2label)
    if len(labels) == 1:
        yield
        return
    config.num_labels = 1
    try:
        yield
    finally:
        config.id2label, config.label2id = labels, {name: index for index, name in labels.items()}
