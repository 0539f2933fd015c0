"""Measures packed passes on the CPU kernels and without them, alternately in one process, and the limit of the machine.

Both engines have the dtype that the service would choose, or that of ``--dtype``; prefixes are neither shared nor
cached.

    python -m loadtest.kernel_gain [--shape 24M] [--items 8] [--rounds 5] [--threads 1 --clock cpu]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from loadtest.random_checkpoint import SHAPES
from loadtest.served_dtype import DTYPES
from loadtest.workload import WORKLOADS
from service.arguments import CommandParser, whole_number
from service.commands import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 where this machine has no kernels for the dtype."""
    return run_command("python -m loadtest.kernel_gain", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    with tempfile.TemporaryDirectory(prefix="reward-kernels-") as folder:
        return _measure(options, Path(folder))


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.kernel_gain", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="24M", help="size of the random model (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: what the service would choose (default: %(default)s)")
    add("--stored", choices=DTYPES[1:3], default="bfloat16", help="dtype of the checkpoint (default: %(default)s)")
    add("--items", type=whole_number(1), default=8, help="independent items of a round (default: %(default)s)")
    add("--rounds", type=whole_number(1), default=5, help="alternating rounds (default: %(default)s)")
    add("--threads", type=whole_number(1), help="CPU threads (default: all cores)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU seconds, with --threads 1")
    return parser


def _measure(options: argparse.Namespace, folder: Path) -> int:
    import torch

    from loadtest.console import report_console
    from loadtest.contenders import LIMIT, Setup, limit, without_prefixes
    from loadtest.engine_work import tokenize
    from loadtest.random_checkpoint import write_random_checkpoint
    from loadtest.reward_comparison import compare_rewards
    from loadtest.run_progress import RunProgress
    from loadtest.served_dtype import served_dtype
    from service.checkpoints.checkpoint import open_checkpoint
    from service.engines.devices.device import resolve_threads
    from service.engines.kernels.choice import kernels_for
    from service.engines.plan import default_batch_tokens
    from service.settings import ModelSettings

    console, cpu = report_console(), torch.device("cpu")
    dtype = served_dtype(options.dtype, None, cpu)
    kernels, _ = kernels_for("on", cpu, getattr(torch, dtype))
    with RunProgress(console) as progress:
        progress.tell("Writing a random model")
        checkpoint = open_checkpoint(
            write_random_checkpoint(folder / "random", SHAPES[options.shape], options.stored), ModelSettings()
        )
        setup = Setup(
            folder=checkpoint.path,
            device="cpu",
            dtype=dtype,
            pad_token_id=checkpoint.pad_token_id,
            max_input_tokens=checkpoint.max_input_tokens,
            max_batch_tokens=default_batch_tokens(cpu, kernels),
            padded_items=1,
            num_threads=resolve_threads(options.threads),
            clock=options.clock,
        )
        work = tokenize(WORKLOADS["independent"].draw(options.items, seed=1), checkpoint)
        progress.tell("Loading both engines")
        ways = {name: without_prefixes(setup, kernels=choice) for name, choice in (("with", "on"), ("without", "off"))}
        first = {name: way(work) for name, way in ways.items()}  # not counted
        multiply = limit(setup)[LIMIT]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        limits: list[float] = []
        for round_ in range(options.rounds):
            progress.tell("Measuring", round_, options.rounds, None)
            limits.append(work.num_tokens / multiply(work).limit_tokens_per_s)
            for name in list(ways)[:: 1 if round_ % 2 == 0 else -1]:
                seconds[name].append(ways[name](work).seconds)
    gains = [slow / fast for slow, fast in zip(seconds["without"], seconds["with"], strict=True)]
    rewards = compare_rewards(first["without"].rewards, first["with"].rewards)
    console.print(
        f"random, {options.shape}, {dtype}, stored in {options.stored}, kernels {kernels.name if kernels else None}, "
        f"{setup.num_threads} threads, {options.clock} clock, {len(work.sequences)} items, {work.num_tokens:,} tokens",
        markup=False,
    )
    console.print(f"with kernels / without: {median(gains):.2f} ({', '.join(f'{gain:.2f}' for gain in gains)})")
    for name, own in seconds.items():
        shares = [limit_s / one for limit_s, one in zip(limits, own, strict=True)]
        console.print(f"{name}: {work.num_tokens / median(own):,.0f} tokens/s, {median(shares):.0%} of the limit")
    console.print(f"largest difference of a reward {rewards.max_difference:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
