"""The cost of diagnostics: the same items scored at every level in one run, alternately, and the ratios of their times.

The scorer runs in this process, without HTTP, so that a difference of one percent is measurable. Turns are short and
their order is random, so that other load on the machine affects all levels equally. CPU time is reported beside wall
time: on a busy machine it varies less, in particular with ``--threads 1``, where no thread spins while it waits.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from reward_client.options import DiagnosticsLevel
from rich.console import Console

from service.assembly import ServedModel, assemble
from service.diagnostics.item_state import ItemState
from service.records import Encoding, Item, ScoreRequest, TokenSequence
from service.settings import read_settings

LEVELS: tuple[DiagnosticsLevel, ...] = get_args(DiagnosticsLevel)
ITEMS_PER_REQUEST = 16
REQUESTS_PER_TURN = 2
DIRECT_ITEMS = 24


@dataclass(frozen=True, slots=True)
class Turn:
    """The duration of one turn in seconds."""

    wall_s: float

    processor_s: float
    """CPU time of all threads."""


async def measure(served: ServedModel, items: Sequence[Item], num_turns: int) -> dict[DiagnosticsLevel, list[Turn]]:
    """Return the durations of the turns by level; the n-th turns of all levels score the same items."""
    scorer = served.scorer
    await scorer.start()
    turns: dict[DiagnosticsLevel, list[Turn]] = {level: [] for level in LEVELS}
    rng = random.Random(0)  # noqa: S311 - an order of measurements, not a secret
    per_turn = ITEMS_PER_REQUEST * REQUESTS_PER_TURN
    for turn in range(num_turns + 1):
        begin = turn * per_turn % max(1, len(items) - per_turn)
        chosen = items[begin : begin + per_turn]
        for level in rng.sample(LEVELS, len(LEVELS)):
            wall, processor = time.perf_counter(), time.process_time()
            await asyncio.gather(
                *(scorer.score(_request(chosen[n::REQUESTS_PER_TURN], level)) for n in range(REQUESTS_PER_TURN))
            )
            if turn:  # the first one warms up
                turns[level].append(Turn(time.perf_counter() - wall, time.process_time() - processor))
    await scorer.stop(drain_s=10)
    return turns


def describe(turns: dict[DiagnosticsLevel, list[Turn]]) -> list[str]:
    """Return a line for each level and clock: the median ratio to the turns of ``none``, and its standard error."""
    lines = []
    for level in LEVELS[1:]:
        for clock in ("processor_s", "wall_s"):
            own, none = (np.array([getattr(turn, clock) for turn in turns[name]]) for name in (level, "none"))
            ratios = own / none
            medians = [np.median(np.random.default_rng(n).choice(ratios, len(ratios))) for n in range(500)]
            lines.append(
                f"{level}: {np.median(ratios) - 1:+.2%} ± {np.std(medians):.2%} {clock.removesuffix('_s')} time "
                f"({len(ratios)} turns of {ITEMS_PER_REQUEST * REQUESTS_PER_TURN} items)"
            )
    return lines


def direct_costs(served: ServedModel, items: Sequence[Item]) -> list[str]:
    """Return a line for each level: the time for texts, states and siblings alone, relative to the forward pass.

    It is measured in one thread, which resolves a tenth of a percent. The cost of reading the states within the forward
    pass is not included; the turns include it. The items are diagnosed twice, because the first time reads tables into
    the caches and compiles patterns; the second one counts.
    """
    pipeline = served.scorer.pipeline
    encoded = served.tokenization.encode(items, Encoding(truncation="prompt_left"))
    scorable = [(item, one) for item, one in zip(items, encoded, strict=True) if isinstance(one, TokenSequence)]
    sequences = [sequence for _, sequence in scorable]
    lines = []
    for level in LEVELS[1:]:
        for _ in range(2):
            batch = pipeline.run(sequences, [level] * len(sequences))
            states = [
                ItemState(item, sequence, outcome=outcome)
                for (item, sequence), outcome in zip(scorable, batch.outcomes, strict=True)
            ]
            begin = time.thread_time()
            pipeline.diagnostician.diagnose(states, level)
            own_s = time.thread_time() - begin + batch.diagnose_s
        lines.append(
            f"{level}: {own_s / len(sequences) * 1e6:.0f} microseconds an item, {own_s / batch.forward_s:.2%} of the "
            f"{batch.forward_s / len(sequences) * 1e3:.1f} milliseconds of its forward pass"
        )
    return lines


def _request(items: Sequence[Item], level: DiagnosticsLevel) -> ScoreRequest:
    return ScoreRequest(tuple(items), Encoding(truncation="prompt_left"), level, 600.0)


def run(items: Sequence[Item], *, model: str | None, threads: int | None, num_turns: int) -> int:
    """Measure on the items and print the costs; return the exit status.

    Raises:
        StartupError: the model cannot be loaded.
    """
    console = Console(soft_wrap=True)
    # All levels score the same texts, and none may find cached prompts of another.
    tree = {"model": {"path": model, "num_threads": threads}, "batching": {"prefix_cache_mib": 0}}
    served = assemble(read_settings(tree))
    if served.lookup.calibration is None:
        console.print(f"Level full is measured without a calibration. {served.lookup.reason}")
    for line in direct_costs(served, items[:DIRECT_ITEMS]):
        console.print(line, highlight=False)
    for line in describe(asyncio.run(measure(served, items, num_turns))):
        console.print(line, highlight=False)
    return 0
