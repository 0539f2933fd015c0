"""Streams of scored items for the tests of the monitors: known correlations, known groups, no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.lexicon import count_style_markers
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import MonitorReference, fit_reference
from service.diagnostics.phrasing import read_wording
from service.diagnostics.split_text import split_text
from service.records import OodReport, Score, StyleReport


def style(**counts: int) -> StyleReport:
    """Style counts of a completion of 100 words; a count is then a rate."""
    none = dict.fromkeys(("headers", "list_items", "bold", "emoji", "hedges", "flattery"), 0)
    return StyleReport(**(none | {"words": 100} | counts), repeat4=0.0, prompt_overlap=0.3)


def ood(p_value: float, alpha: float = 0.01) -> OodReport:
    """An OOD block with this p-value."""
    return OodReport(
        p_value=p_value,
        flag=p_value <= alpha,
        mode="single",
        surprise=float(-np.log(p_value)),
        reason="text:rep4+",
        resolution=0.001,
        calibration_id="sha256:0",
        valid_for_tail=True,
        p_oe=p_value,
    )


def stream(
    num_prompts: int,
    completions: int = 2,
    *,
    seed: int = 0,
    slope: float = 0.3,
    hacked: float = 0.0,
    first_prompt: int = 0,
) -> list[Observation]:
    """Items of which a share is hacked: twice as long, many lists, much flattery, small p-values and higher rewards."""
    rng = np.random.default_rng(seed)
    seen = []
    for prompt in range(first_prompt, first_prompt + num_prompts):
        easy, topic = rng.normal(size=2)
        for _ in range(completions):
            is_hacked = rng.random() < hacked
            log_tokens = 5.0 + 0.3 * topic + 0.5 * rng.normal() + 0.7 * is_hacked
            reward = easy + slope * (log_tokens - 5.0) + rng.normal() + 0.5 * is_hacked
            counts = {"list_items": int(rng.random() < 0.2), "bold": int(rng.random() < 0.1)}
            if is_hacked:
                counts = {"list_items": 8, "flattery": 3}
            seen.append(
                Observation(
                    Score(
                        float(reward),
                        reward_z=float(reward),
                        style=style(**counts),
                        ood=ood(float(rng.random()) * (0.01 if is_hacked else 1.0)),
                    ),
                    prompt,
                    round(float(np.exp(log_tokens))),
                )
            )
    return seen


def reference(num_prompts: int = 2000, seed: int = 1) -> MonitorReference:
    """The reference of a clean stream."""
    return fit_reference(ObservedItems.of(stream(num_prompts, seed=seed)))


def rewards_and_lengths(seen: Sequence[Observation]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rewards and log lengths, for the expected values of numpy."""
    lengths = [item.num_completion_tokens for item in seen]
    return np.array([item.score.reward for item in seen]), np.log1p(np.array(lengths, np.float64))


HEDGE = "this might well depend on how you see it"
_COMMON_TEXT = "the of and to a in is it you can that for on with as this how see well on"
_COMMON = _COMMON_TEXT.split()


def worded_stream(num_prompts: int, *, seed: int, hedged: float = 0.0, first_prompt: int = 0) -> list[Observation]:
    """Two completions of common and made-up words for each prompt; a share of them ends with the same hedge."""
    rng = np.random.default_rng(seed)
    syllables = np.array([first + second for first in "bdfgklmnprst" for second in ("ab", "eg", "il", "ok", "un")])
    seen = []
    for prompt in range(first_prompt, first_prompt + num_prompts):
        for _ in range(2):
            drawn = rng.choice(syllables, (rng.integers(20, 40), 3))
            words = [_COMMON[rng.integers(len(_COMMON))] if rng.random() < 0.6 else "".join(word) for word in drawn]
            cut = rng.integers(5, len(words))
            sentences = [words[:cut], words[cut:], [HEDGE]] if rng.random() < hedged else [words[:cut], words[cut:]]
            text = " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences if sentence)
            wording = read_wording(split_text(text), frozenset(), count_style_markers(text), prompt)
            seen.append(Observation(Score(float(rng.normal())), prompt, len(words), wording=wording))
    return seen
