"""Measures reliability goals on servers that the command starts.

    python -m loadtest.reliability.command [EXPERIMENT ...] [--items N] [--out DIR]

Prints every figure with its bound; the exit status is 1 where one is missed.
"""

from __future__ import annotations

import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from loadtest.reliability.options import ExperimentOptions
from service.arguments import CommandParser, number_between, whole_number
from service.commands import run_command
from service.outputs import check_output_folder

PROGRAM = "python -m loadtest.reliability.command"
EXPERIMENTS = {
    "overload": ("traffic_experiments", "overload"),
    "killed-replicas": ("killing", "killed_replicas"),
    "killed-proxy": ("killing", "killed_proxy"),
    "killed-controller": ("killing", "killed_controller"),
    "rolling-update": ("updates", "rolling_update"),
    "faulty-items": ("faulty_items", "faulty_items"),
    "fairness": ("traffic_experiments", "fairness"),
    "cancellations": ("cancellations", "cancellations"),
    "deadlines": ("deadlines", "deadlines"),
    "slow-clients": ("slow_connections", "slow_connections"),
    "out-of-memory": ("out_of_memory", "out_of_memory"),
    "damaged-checkpoints": ("damaged_checkpoints", "damaged_checkpoints"),
    "terminated": ("termination", "terminated"),
    "bulk-cost": ("bulk_cost", "bulk_cost"),
    "memory": ("memory", "memory_growth"),
    "oversized-bodies": ("oversized_bodies", "oversized_bodies"),
}
"""Module and function of each experiment, in the order in which all are run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 where a figure misses its bound, or after one sentence."""
    return run_command(PROGRAM, "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse(arguments)
    for name in options.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment of this name: {name}; there are {', '.join(EXPERIMENTS)}")
    if options.out is not None:
        check_output_folder(options.out, overwrite=True, entries=tuple(f"{name}.json" for name in EXPERIMENTS))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the servers that were started end too
    outcomes = [_measure(name, options) for name in options.experiments or EXPERIMENTS]
    return 0 if all(outcomes) else 1


def _measure(name: str, options: Namespace) -> bool:
    """Run one experiment, print and write its figures, and return whether all keep their bounds."""
    from rich.console import Console

    from loadtest.console import report_console
    from loadtest.reliability.findings import table, write_findings
    from loadtest.traffic.machine import machine_facts

    module, function = EXPERIMENTS[name]
    console = report_console()
    Console(stderr=True).print(f"{name} begins", highlight=False)
    facts = {"measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "arguments": sys.argv[1:], **machine_facts()}
    began = time.monotonic()
    findings = getattr(import_module(f"loadtest.reliability.{module}"), function)(_experiment_options(options))
    seconds = time.monotonic() - began
    console.print(f"{name}, {seconds:.0f} s", style="bold", highlight=False)
    console.print(table(findings))
    if options.out is not None:
        write_findings(options.out / f"{name}.json", name, facts, seconds, findings)
    return all(one.holds for one in findings)


def _experiment_options(options: Namespace) -> ExperimentOptions:
    return ExperimentOptions(
        items=options.items,
        duration_s=options.duration,
        kill_every_s=options.kill_every,
        runtime=options.runtime,
        tokens_per_s=options.tokens_per_s,
        seed=options.seed,
        model=options.model,
    )


def _parser() -> CommandParser:
    defaults = ExperimentOptions()
    parser = CommandParser(prog=PROGRAM, description="Measure reliability goals on servers that the command starts.")
    add = parser.add_argument
    add("experiments", nargs="*", metavar="EXPERIMENT", help=f"any of {', '.join(EXPERIMENTS)} (default: all)")
    add("--items", type=whole_number(1000), default=defaults.items, help="through the client (default: %(default)s)")
    add("--duration", type=number_between(1, 3600), default=defaults.duration_s, metavar="S", help="of each phase of "
        "load (default: %(default)s)")  # fmt: skip
    add("--kill-every", type=number_between(0.5, 3600), default=defaults.kill_every_s, metavar="S", help="between two "
        "kills of a replica (default: %(default)s)")  # fmt: skip
    add("--tokens-per-s", type=number_between(1, 1e9), default=defaults.tokens_per_s, help="of a replica's simulated "
        "forward pass (default: %(default)s)")  # fmt: skip
    add("--runtime", choices=("ray", "local"), default=defaults.runtime, help="of experiments with one replica that do "
        "not need Ray (default: %(default)s)")  # fmt: skip
    add(
        "--model",
        type=Path,
        metavar="DIR",
        help="checkpoint of bulk-cost, terminated and damaged-checkpoints (default: a random one of 24M parameters)",
    )
    add("--seed", type=int, default=defaults.seed, help="(default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="write the figures of each experiment as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
