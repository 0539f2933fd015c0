"""The cost of steps: passes over items with 16 steps and with none, alternately, and the ratio of their times.

Items of one pass share prompts, and prompts are seen twice, so that shared prefixes and the prefix cache are active.
Both kinds of passes read texts of the same lengths, and none may find the cached prompts of the other. Run it with
``python -m loadtest.step_cost``.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from loadtest.console import report_console
from loadtest.random_checkpoint import SHAPES, write_random_checkpoint
from service.checkpoints.configuration import read_config
from service.engines.base import Engine
from service.engines.torch import load_torch_engine
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings

NUM_STEPS = 16
PROMPT_TOKENS = 128
COMPLETION_TOKENS = 256
NUM_PROMPTS = 2
COMPLETIONS = 2
"""Completions of each prompt in a pass."""

FIRST_ID = 10
"""Smaller ids may be special tokens."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """What reading steps costs."""

    ratio: float
    """Median ratio of the CPU time of a pass with steps to that of a pass without."""

    computed_tokens: tuple[int, int]
    """Tokens that the passes computed, with steps and without."""

    cached_tokens: tuple[int, int]
    """Tokens that they took from the prefix cache."""

    num_turns: int


def sequences_of_turn(vocab_size: int, seed: int, *, new_completions: int = 0) -> list[TokenSequence]:
    """Return items without steps: the same prompts for the same seed, with other completions for another number."""
    prompts, texts = random.Random(seed), random.Random(f"{seed} {new_completions}")  # noqa: S311 - texts, not secrets
    found = []
    for _ in range(NUM_PROMPTS):
        prompt = tuple(prompts.randrange(FIRST_ID, vocab_size) for _ in range(PROMPT_TOKENS))
        for _ in range(COMPLETIONS):
            completion = tuple(texts.randrange(FIRST_ID, vocab_size) for _ in range(COMPLETION_TOKENS))
            found.append(TokenSequence(prompt + completion, PROMPT_TOKENS))
    return found


def with_steps(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Return the items with evenly spaced steps in their completions."""
    width = COMPLETION_TOKENS // NUM_STEPS
    positions = tuple(PROMPT_TOKENS + width * number - 1 for number in range(1, NUM_STEPS + 1))
    return [replace(sequence, step_positions=positions) for sequence in sequences]


def measure(engine: Engine, vocab_size: int, num_turns: int) -> StepCost:
    """Run pairs of passes in alternating order; the first turn warms up."""
    ratios: list[float] = []
    computed, cached = [0, 0], [0, 0]
    for turn in range(num_turns + 1):
        seconds = [0.0, 0.0]
        for kind in (0, 1) if turn % 2 else (1, 0):
            for part in (0, 1):  # the second pass finds the prompts of the first one in the cache
                sequences = sequences_of_turn(vocab_size, 2 * turn + kind, new_completions=part)
                batch = sequences if kind else with_steps(sequences)
                begin = time.process_time()
                output = engine.forward(batch)
                seconds[kind] += time.process_time() - begin
                if turn:
                    shared = sum(output.shared_tokens)
                    computed[kind] += sum(sequence.num_tokens for sequence in batch) - shared
                    cached[kind] += output.cached_tokens
        if turn:
            ratios.append(seconds[0] / seconds[1])
    return StepCost(median(ratios), (computed[0], computed[1]), (cached[0], cached[1]), num_turns)


def run(options: argparse.Namespace) -> int:
    """Measure as the command's options say; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="reward-steps-") as folder:
        checkpoint = write_random_checkpoint(Path(folder), SHAPES[options.size], options.dtype)
        settings = ModelSettings.model_validate(
            {"device": options.device, "dtype": options.dtype, "num_threads": options.threads}
        )
        config = read_config(checkpoint)
        engine = load_torch_engine(
            checkpoint, settings, BatchingSettings(), pad_token_id=config.pad_token_id, max_input_tokens=2048
        )
        cost = measure(engine, config.vocab_size, options.turns)
        info = engine.info
    console = report_console()
    console.print(
        f"{NUM_STEPS} steps in each item: {cost.ratio - 1:+.2%} CPU time (median of {cost.num_turns} turns; "
        f"{info.forward}, {info.dtype}, kernels {info.kernels}, prefix cache {info.prefix_cache_mib} MiB)",
        highlight=False,
    )
    console.print(
        f"Tokens computed with and without steps: {cost.computed_tokens[0]:,} and {cost.computed_tokens[1]:,}; taken "
        f"from the cache: {cost.cached_tokens[0]:,} and {cost.cached_tokens[1]:,}",
        highlight=False,
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cost of steps, and print it."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.step_cost", description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="24M", help="of a random model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=20)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
