"""Computes all measures of an audit and collects them in one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.edits.probe import Probe
from service.errors import DatasetError
from training.annotator_agreement import AnnotatorAgreement, measure_annotator_agreement
from training.audit.accuracy import Accuracy, measure_accuracy
from training.audit.data import MIN_PAIRS
from training.audit.gaps import Gaps, measure_gaps
from training.audit.leakage import Leakage, measure_leakage
from training.audit.length_bias import LengthBias, measure_length_bias
from training.audit.outputs import OutputFindings, measure_outputs
from training.audit.overtraining import Overtraining, measure_overtraining
from training.audit.probability import Probability, measure_probability
from training.audit.scored_pairs import Completions, ScoredPairs, distinct_completions
from training.audit.style_slopes import Style, measure_style
from training.audit.top_completions import TopCompletion, top_completions
from training.failures import describe_reasons
from training.preferences import PreferencePair


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of an audit."""

    model: Mapping[str, Any]
    """Description of the audited model, for the reader of the report."""

    data: Mapping[str, Any]
    """Description of the audited data, for the reader of the report."""

    scored: ScoredPairs = field(repr=False)
    completions: Completions = field(repr=False)
    accuracy: Accuracy
    length_bias: LengthBias
    probability: Probability
    gaps: Gaps
    style: Style
    leakage: Leakage
    top: Sequence[TopCompletion]

    outputs: Sequence[OutputFindings] = ()
    """One for each output of a model with several; empty for a model with one."""

    overtraining: Overtraining | None = None
    """None where no training pairs were given."""

    annotator_agreement: AnnotatorAgreement | None = None
    """None where no pair has two reviews."""

    probe: Probe | None = None
    """What the reward pays for; None where no probe was asked for."""


def investigate(
    scored: ScoredPairs,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    trained: ScoredPairs | None = None,
    train_pairs: Sequence[PreferencePair] | None = None,
    hide_texts: bool = False,
    probe: Probe | None = None,
) -> Findings:
    """Compute all measures.

    Args:
        scored: the audited pairs.
        model: description of the model, for the reader of the report.
        data: description of the data, for the reader of the report.
        trained: pairs that the model was trained on, or a sample of them, scored.
        train_pairs: all pairs that it was trained on, to search for leaked prompts; without rewards.
        hide_texts: leave the texts of the completions with the highest rewards out.
        probe: what the reward pays for, if it was measured.

    Raises:
        DatasetError: there are fewer than ``MIN_PAIRS`` pairs with rewards.
    """
    if len(scored) < MIN_PAIRS:
        reasons = f" ({describe_reasons(scored.failures)})" if scored.failures else ""
        raise DatasetError(
            f"{len(scored)} pairs have rewards, and {scored.num_failed} have none{reasons}; an audit needs at least "
            f"{MIN_PAIRS}."
        )
    completions = distinct_completions(scored)
    return Findings(
        model=model,
        data=data,
        scored=scored,
        completions=completions,
        accuracy=measure_accuracy(scored),
        length_bias=measure_length_bias(completions),
        probability=measure_probability(scored),
        gaps=measure_gaps(scored),
        style=measure_style(completions),
        leakage=measure_leakage(scored, train_pairs),
        top=top_completions(completions, scored.unit, hide_texts=hide_texts),
        outputs=measure_outputs(scored),
        overtraining=None if trained is None or not len(trained) else measure_overtraining(scored, trained),
        annotator_agreement=measure_annotator_agreement(scored.pairs),
        probe=probe,
    )
