"""Chooses the entries of a padded batch: sequences of similar length, around the one that is served first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from service.scheduling.budget import BatchBudget
from service.scheduling.flows import Entry, Flow, FlowTable

LENGTH_WINDOW_BATCHES = 4
"""Sequences of similar length are chosen from this many batch budgets of work, in order of fairness."""

PASS_OVERHEAD_TOKENS = 256
"""Overhead of a padded pass, in computed tokens: up to that, padding is accepted to save a pass."""


def take_padded_batch(flows: FlowTable, budget: BatchBudget, now: float, expired: list[Entry]) -> list[Entry]:
    """Take a padded batch out of the flows and return it; expired entries are appended to ``expired``."""
    window, candidates = _window(flows, budget, now, expired)
    if not window:
        return []
    chosen = [window[index] for index in select_similar_lengths([entry.num_tokens for entry, _ in window], budget)]
    for entry, flow in chosen:
        flows.serve(flow, (entry,), entry.num_tokens)
    flows.requeue(candidates)
    return [entry for entry, _ in chosen]


def _window(
    flows: FlowTable, budget: BatchBudget, now: float, expired: list[Entry]
) -> tuple[list[tuple[Entry, Flow]], list[Flow]]:
    """Return the entries that the batch is chosen from, each with its flow, and the flows that they belong to."""
    window: list[tuple[Entry, Flow]] = []
    candidates: list[Flow] = []
    num_tokens = 0
    max_tokens = LENGTH_WINDOW_BATCHES * budget.max_tokens
    max_sequences = LENGTH_WINDOW_BATCHES * budget.max_sequences
    for flow in flows.by_priority(now, expired):
        candidates.append(flow)
        for entry in islice(flow.entries, budget.max_sequences):
            window.append((entry, flow))
            num_tokens += entry.num_tokens
        if num_tokens >= max_tokens or len(window) >= max_sequences:
            break
    return window, candidates


def select_similar_lengths(lengths: Sequence[int], budget: BatchBudget) -> list[int]:
    """Return the indices, shortest sequence first, of a padded batch around the first of these lengths.

    The batch grows from the first sequence to the next shorter or next longer one, whichever wastes less, while it fits
    the budget and the real tokens per computed token (the overhead of the pass included) do not fall.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    first = last = order.index(0)
    real, longest = lengths[0], lengths[0]
    best = _efficiency(real, longest, 1)
    while (count := last - first + 2) <= budget.max_sequences:
        steps: list[tuple[float, int]] = []
        if first > 0:
            shorter = lengths[order[first - 1]]
            if longest * count <= budget.max_tokens:
                steps.append((_efficiency(real + shorter, longest, count), -1))
        if last + 1 < len(order):
            longer = lengths[order[last + 1]]
            if longer * count <= budget.max_tokens:
                steps.append((_efficiency(real + longer, longer, count), 1))
        if not steps or max(steps)[0] < best:
            break
        best, direction = max(steps)
        first, last = (first - 1, last) if direction < 0 else (first, last + 1)
        longest = lengths[order[last]]
        real += lengths[order[first if direction < 0 else last]]
    return order[first : last + 1]


def _efficiency(real: int, longest: int, count: int) -> float:
    """Return the real tokens per token that a padded pass costs, its overhead included."""
    return real / (longest * count + PASS_OVERHEAD_TOKENS)
