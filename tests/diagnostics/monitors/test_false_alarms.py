"""Clean streams against references of finitely many items: the false-alarm rate is the designed one."""

from __future__ import annotations

import numpy as np
import pytest

from service.diagnostics.monitors.alarms import SIGNALS, Step, stepped, steps_of
from service.diagnostics.monitors.cusum import ALLOWANCE, Cusum, family_threshold
from service.diagnostics.monitors.observation import COLUMNS, ObservedItems
from service.diagnostics.monitors.reference import fit_reference
from service.diagnostics.monitors.window import summarize

RUN_LENGTH = 10_000
BATCHES = 500
REFERENCES = 12


def clean_items(rng: np.random.Generator, num_prompts: int) -> ObservedItems:
    """Two completions of each prompt: correlated lengths and rewards, rare and heavy-tailed style markers."""
    prompts = np.repeat(np.arange(num_prompts), 2)
    n = len(prompts)

    def rare(share: float, scale: float) -> np.ndarray:
        return (rng.random(n) < share) * rng.exponential(scale, n)

    log_tokens = 5 + 0.3 * rng.normal(size=num_prompts)[prompts] + 0.5 * rng.normal(size=n)
    p_values = rng.random(n)
    columns = {
        "reward": rng.normal(size=num_prompts)[prompts] + 0.3 * (log_tokens - 5) + rng.normal(size=n),
        "log_tokens": log_tokens,
        "headers": rare(0.01, 3),
        "list_items": rare(0.1, 5),
        "bold": rare(0.05, 3),
        "emoji": rare(0.003, 5),
        "hedges": rare(0.2, 2),
        "flattery": rare(0.02, 2),
        "repeat4": rare(0.05, 0.2),
        "prompt_overlap": rng.beta(3, 6, n),
        "surprise": -np.log(p_values),
        "oe_surprise": -np.log(rng.random(n)),
        "flag": (p_values <= 0.01).astype(float),
    }
    columns["markdown"] = columns["headers"] + columns["list_items"] + columns["bold"]
    return ObservedItems(np.column_stack([columns[name] for name in COLUMNS]), prompts, np.zeros(n, np.bool_))


def count_alarms(seed: int) -> tuple[int, int]:
    """Alarms of one clean stream against one reference: with the raised allowances, and with the textbook's."""
    rng = np.random.default_rng(seed)
    reference = fit_reference(clean_items(rng, 1000))
    threshold = family_threshold(len(SIGNALS), RUN_LENGTH)
    raised, plain = ({name: Cusum() for name in SIGNALS} for _ in range(2))
    counts = [0, 0]
    for _ in range(BATCHES):
        steps = steps_of(summarize(clean_items(rng, 128), reference.style_thresholds), reference)
        raised = stepped(raised, steps, threshold)
        plain = stepped(plain, {name: Step(step.z, ALLOWANCE) for name, step in steps.items()}, threshold)
        for index, sums in enumerate((raised, plain)):
            for name in [name for name in SIGNALS if sums[name].alarming]:
                counts[index] += 1
                sums[name] = Cusum()
    return counts[0], counts[1]


@pytest.mark.slow
def test_clean_streams_raise_as_few_alarms_as_designed() -> None:
    """Of 6,000 clean batches 0.6 may raise an alarm; with the textbook allowance, more than 40 do."""
    raised, plain = np.sum([count_alarms(seed) for seed in range(REFERENCES)], axis=0)

    assert raised <= 4
    assert plain > 40
