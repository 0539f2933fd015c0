"""A calibration fitted to random numbers, with every part of a real one, made in a fraction of a second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.calibration.fit import fit_gaussian, fit_laplace, fit_siblings, fit_state_form, fit_trees
from service.diagnostics.calibration import Binding, Calibration
from service.diagnostics.calibration_facts import CalibrationFacts, Rate, SelfTest
from service.diagnostics.conformal import TailMap
from service.diagnostics.detectors import OneSidedTests
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import fit_reference
from service.diagnostics.ngrams import NgramCounts
from service.diagnostics.ood import Component, Detectors, OodDetector, Ranking
from service.diagnostics.reference import LengthCurve, Reference
from service.diagnostics.states import PER_TAP, StateReader
from service.diagnostics.text import STATISTICS
from service.records import Score, StateTap, StyleReport

TAPS = (StateTap(1, "mean"), StateTap(2, "last"))
HIDDEN = 8
NUM_ITEMS = 240
VOCABULARY = 300
BINDING = Binding("w", "c", "t", "ct", "chat", 512, "hf", VOCABULARY)
FACTS = CalibrationFacts(
    created="2026-01-01T00:00:00+00:00",
    seed=0,
    versions={},
    data_sha256="ab",
    held_out_only=False,
    dropped=[],
    num_fit=0,
    num_select=NUM_ITEMS,
    num_calibrate=NUM_ITEMS,
    num_prompts=NUM_ITEMS // 2,
    admitted=["text", "feature", "oe"],
    gains={"text": 0.9},
    self_test=SelfTest([Rate(0.01, 0.0125, 0.007, NUM_ITEMS, NUM_ITEMS // 2, is_tolerable=True)], None, 0.5),
    realised={},
    suite={},
    unseen_family={},
    mean_auroc=0.9,
    weak=False,
    length={},
)
COLUMNS = len(STATISTICS) + len(PER_TAP) * len(TAPS)


def made_up_calibration(*, siblings: bool = True, seed: int = 0) -> Calibration:
    """Return a calibration for an engine with `TAPS` and states of `HIDDEN` numbers; its id is empty."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(NUM_ITEMS, len(TAPS), HIDDEN)).astype(np.float32)
    prompts = np.repeat(np.arange(NUM_ITEMS // 2), 2)
    rewards = rng.normal(size=NUM_ITEMS)
    log_lengths = rng.uniform(2, 5, NUM_ITEMS)
    forms = [fit_state_form(states[:, tap]) for tap in range(len(TAPS))]
    reader = StateReader(TAPS, forms, fit_laplace(states[:, 1], rewards, prompts, forms[1]), head_tap=1)
    statistics = np.concatenate([rng.normal(size=(NUM_ITEMS, len(STATISTICS))), reader.statistics(states)], axis=1)
    joint = fit_gaussian(statistics, range(COLUMNS))
    detectors = Detectors(
        text_tests=OneSidedTests.of(statistics),
        feature=joint,
        style=fit_gaussian(statistics, range(4)),
        mid_tap=0,
        last_tap=1,
        trees=fit_trees(statistics, statistics + 3, range(COLUMNS), seed),
        siblings=fit_siblings(statistics, prompts, joint) if siblings else None,
    )
    scores = detectors.scores(statistics)
    maps: dict[Component, TailMap] = {name: TailMap.of_component(scores[name]) for name in ("text", "feature", "oe")}
    surprise = np.max([maps[name](scores[name]) for name in maps], axis=0)
    references: dict[str, NDArray[np.float64]] = {name: np.sort(values) for name, values in scores.items()}
    references |= {"single": np.sort(surprise), "style": np.sort(detectors.style.distance(statistics))}
    if siblings:
        deviations = rng.chisquare(COLUMNS, NUM_ITEMS)
        maps["siblings"] = TailMap.of_component(deviations)
        references["siblings"] = np.sort(deviations)
        references["group"] = np.sort(np.maximum(surprise, maps["siblings"](deviations)))
    ranking = Ranking(maps, references)
    reports = OodDetector(detectors, ranking, "", 0.01).report(statistics, [True] * NUM_ITEMS)
    style = StyleReport(0, 0, 0, 0, 0, 0, words=20, repeat4=0.1, prompt_overlap=0.3)
    observations = [
        Observation(Score(float(reward), ood=report, style=style), int(prompt), int(length))
        for reward, report, prompt, length in zip(rewards, reports, prompts, np.exp(log_lengths), strict=True)
    ]
    return Calibration(
        binding=BINDING,
        arithmetic={"dtype": "float32"},
        facts=FACTS,
        rewards=Reference.of(rewards),
        lengths=Reference.of(log_lengths),
        length_curve=LengthCurve.of(log_lengths, rewards),
        ngrams=NgramCounts.of(_texts(rng), VOCABULARY),
        states=reader,
        detectors=detectors,
        ranking=ranking,
        monitors=fit_reference(ObservedItems.of(observations)),
    )


def _texts(rng: np.random.Generator) -> Sequence[tuple[int, ...]]:
    return [tuple(rng.integers(VOCABULARY, size=30).tolist()) for _ in range(50)]
