"""Builds a calibration from scored parts: fits, selects, ranks and evaluates.

Taps, the form of the feature component and the admitted components are selected by what they gain on the hacks of the
part ``select``, on the user's own model. Figures are measured on the part ``calibrate``, whose prompts were used for no
fit and no selection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

from export.calibration.drift import fit_drift
from export.calibration.head_resampling import fit_resampled_heads
from export.calibration.length_fit import fit_length_curve
from export.calibration.measure import mean_over_sets
from export.calibration.measured_parts import MeasuredParts, joined
from export.calibration.ranking import evaluate, evaluate_length, evaluate_new_kinds, monitor_reference, rank_items
from export.calibration.scored_parts import ScoredParts, required_checkpoint
from export.calibration.selection import (
    Admission,
    UnseenFamily,
    admit_components,
    fit_without_families,
    select_detectors,
    unseen_detections,
)
from export.calibration.siblings import sibling_scores
from service.assembly import ServedModel, arithmetic_of
from service.diagnostics.calibration import Calibration
from service.diagnostics.calibration_facts import CalibrationFacts
from service.diagnostics.conformal import TailMap
from service.diagnostics.lookup import binding_of
from service.diagnostics.ood import Component, Detectors, Ranking
from service.diagnostics.reference import Reference
from service.diagnostics.resampled_heads import ResampledHeads

WEAK_AUROC = 0.70
"""Mean AUROC over the built-in sets below which a calibration is hardly of use."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Facts about the data that are stored in the artifact; the fields are those of `CalibrationFacts`."""

    data_sha256: str
    held_out_only: bool
    dropped: list[str]


def build(
    served: ServedModel,
    scored: ScoredParts,
    *,
    seed: int,
    data: DataFacts,
    show: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Fit, select, rank and evaluate a calibration on scored items.

    Args:
        served: the model that the items were scored with.
        scored: result of `score_parts`.
        seed: seed of trees and folds.
        data: facts about the data.
        show: called with the name of each step.

    Raises:
        CalibrationError: the oracle is served, or a hidden state is not finite.
    """
    show("Fitting states and counts")
    parts = MeasuredParts.measure(scored, served.info.taps, required_checkpoint(served))
    show("Selecting taps")
    detectors, parts = select_detectors(parts, seed)
    show("Selecting components")
    unseen = fit_without_families(parts, seed)
    clean_scores = detectors.scores(parts.clean["select"].statistics)
    maps = {name: TailMap.of_component(scores) for name, scores in clean_scores.items()}
    admission = admit_components(parts, detectors, maps, unseen)
    used: dict[Component, TailMap] = {name: maps[name] for name in admission.components}
    of_select = sibling_scores(detectors.siblings, parts.clean["select"], seed)
    if of_select is not None:
        used["siblings"] = TailMap.of_component(of_select)
    show("Ranking and evaluating")
    calibrate = parts.clean["calibrate"]
    of_calibrate = sibling_scores(detectors.siblings, calibrate, seed)
    ranking = rank_items(calibrate, detectors, used, of_calibrate)
    facts = _facts(parts, detectors, ranking, admission, unseen, seed, data)
    show("Fitting heads")
    heads = fit_resampled_heads(parts.pairs, parts.reader.forms[parts.reader.head_tap].mean, seed)
    if heads is not None:
        facts = replace(facts, heads=heads[1])
    return _assembled(served, parts, detectors, ranking, facts, None if heads is None else heads[0])


def _facts(
    parts: MeasuredParts,
    detectors: Detectors,
    ranking: Ranking,
    admission: Admission,
    unseen: dict[str, UnseenFamily],
    seed: int,
    data: DataFacts,
) -> CalibrationFacts:
    found = evaluate(parts, detectors, ranking, seed)
    new_kind = evaluate_new_kinds(parts, detectors, ranking, unseen)
    clean = parts.clean
    return CalibrationFacts(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        versions={name: version(name) for name in ("reward-service", "torch", "transformers", "scikit-learn")},
        data_sha256=data.data_sha256,
        held_out_only=data.held_out_only,
        dropped=data.dropped,
        num_fit=len(clean["fit_states"].scored) + len(clean["fit_detectors"].scored),
        num_select=len(clean["select"].scored),
        num_calibrate=len(clean["calibrate"].scored),
        num_prompts=int(clean["calibrate"].prompts.max()) + 1,
        admitted=list(ranking.maps),
        gains=admission.gains,
        self_test=found.self_test,
        realised=found.realised,
        suite=found.suite,
        unseen_family=unseen_detections(parts, unseen),
        mean_auroc=found.mean_auroc,
        weak=found.mean_auroc < WEAK_AUROC,
        length=evaluate_length(parts),
        new_kind=new_kind,
        new_kind_auroc=mean_over_sets(lambda one: one.auroc, new_kind, list(new_kind)) if new_kind else None,
    )


def _assembled(
    served: ServedModel,
    parts: MeasuredParts,
    detectors: Detectors,
    ranking: Ranking,
    facts: CalibrationFacts,
    heads: ResampledHeads | None,
) -> Calibration:
    """Return the calibration. Rewards and lengths are described by all items: no p-value depends on them."""
    log_lengths, rewards, prompts = joined(list(parts.clean.values()))
    template = served.tokenization.rule.name
    return Calibration(
        binding=binding_of(
            required_checkpoint(served),
            template=template,
            reward_weights=served.settings.model.reward_weights,
        ),
        arithmetic=arithmetic_of(served.info),
        facts=facts,
        rewards=Reference.of(rewards),
        lengths=Reference.of(log_lengths),
        length_curve=fit_length_curve(log_lengths, rewards, prompts),
        ngrams=parts.ngrams,
        states=parts.reader,
        detectors=detectors,
        ranking=ranking,
        monitors=monitor_reference(parts.clean["calibrate"], detectors, ranking),
        drift=fit_drift(parts),
        heads=heads,
    )
