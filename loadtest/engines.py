"""Measures every way of scoring with one checkpoint, and the speed of its matrix products alone, in one run.

This module opens the model and prints the findings; work, ways, rounds and report have modules of their own. It needs
no server, no Ray and no network.

    python -m loadtest.engines [--model DIR | --shape 135M] [--workloads "groups of 8"] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version as distribution_version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from loadtest.console import report_console
from loadtest.contenders import CLOCKS, REFERENCE, Contender, Setup, changed, exported, limit, ours, plain, synchronous
from loadtest.engine_report import Finding, as_data, draw_plot, findings, speed_ups, table
from loadtest.engine_rounds import Run, run_rounds
from loadtest.engine_work import Work, read_groups, tokenize
from loadtest.random_checkpoint import SHAPES, write_random_checkpoint
from loadtest.reward_comparison import compare_rewards
from loadtest.workload import WORKLOADS
from service.checkpoints.checkpoint import Checkpoint, open_checkpoint
from service.engines.devices.device import resolve_device, resolve_threads
from service.engines.kernels.bindings import kernels_for
from service.engines.plan import default_batch_tokens
from service.errors import DatasetError, StartupError
from service.settings import ModelSettings

CONTENDERS: dict[str, Contender] = {"limit": limit, "plain": plain, "ours": ours}

GPU_OPTIONS = {
    "--synchronous": "with each pass complete before the next one is launched",
    "--cuda-graphs": "with CUDA graphs for short batches",
    "--cascade": "with cascade attention to shared prefixes",
    "--fp8": "with linear layers in fp8",
}

DEFAULT_ITEMS = {"cpu": 128, "cuda": 1024}
"""Items of a workload, enough for several batches."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if the model cannot be opened or a way fails."""
    options = _parser().parse_args(arguments)
    console = report_console()
    try:
        with tempfile.TemporaryDirectory(prefix="reward-engines-") as folder:
            report = _compare(options, Path(folder), console)
    except (StartupError, DatasetError, OSError) as error:
        console.print(f"loadtest.engines: {type(error).__name__}: {error}", markup=False, style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def evaluate(run: Run, baseline: str) -> list[Finding]:
    """Return the findings of a run; rewards are compared with those of the reference on the same work."""
    comparisons = {
        (workload, way): compare_rewards(run.rewards[workload, REFERENCE], rewards)
        for (workload, way), rewards in run.rewards.items()
    }
    return findings(run.measurements, comparisons, baseline, run.busy_shares)


def _compare(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    device = resolve_device(options.device)
    model = options.model or write_random_checkpoint(
        folder / "random", SHAPES[options.shape], options.dtype, device=str(device)
    )
    checkpoint = open_checkpoint(model, ModelSettings())
    kernels, _ = kernels_for("auto", device, getattr(torch, options.dtype))
    setup = Setup(
        folder=checkpoint.path,
        device=str(device),
        dtype=options.dtype,
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
        max_batch_tokens=options.batch_tokens or default_batch_tokens(device, kernels),
        padded_items=options.padded_items,
        num_threads=resolve_threads(options.threads),
        clock=options.clock,
    )
    works = _works(options, checkpoint, options.items or DEFAULT_ITEMS[device.type])
    with Progress(console=console) as progress:
        task = progress.add_task("Loading")
        run = run_rounds(
            CONTENDERS
            | _requested(options)
            | {str(bundle): partial(exported, bundle=bundle) for bundle in options.onnx},
            setup,
            works,
            options.rounds,
            tell=lambda doing, step, total: progress.update(task, description=doing, completed=step, total=total),
        )
    return _report(options, checkpoint, setup, works, run, console)


def _requested(options: argparse.Namespace) -> dict[str, Contender]:
    """Return the contenders that are measured on request only."""
    contenders: dict[str, tuple[bool, Contender]] = {
        "compiled": (options.compile, partial(changed, compile=True)),
        "synchronous": (options.synchronous, synchronous),
        "graphs": (options.cuda_graphs, partial(changed, cuda_graphs=True)),
        "cascade": (options.cascade, partial(changed, cascade_attention=True)),
        "fp8": (options.fp8, partial(changed, quantization="fp8")),
        "int8": (options.int8, partial(changed, quantization="int8")),
    }
    return {name: contender for name, (is_requested, contender) in contenders.items() if is_requested}


def _works(options: argparse.Namespace, checkpoint: Checkpoint, num_items: int) -> dict[str, Work]:
    if options.rows is not None:
        return {options.rows.name: tokenize(list(islice(read_groups(options.rows), num_items)), checkpoint)}
    return {name: tokenize(WORKLOADS[name].draw(num_items, options.seed), checkpoint) for name in options.workloads}


def _report(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    setup: Setup,
    works: dict[str, Work],
    run: Run,
    console: Console,
) -> dict[str, Any]:
    """Print the findings, draw them on request, and return them JSON-ready."""
    name = str(options.model) if options.model else f"random, {options.shape}"
    machine = f"{setup.num_threads} CPU threads"
    if setup.device.startswith("cuda"):
        machine = torch.cuda.get_device_name(setup.device)
    baseline = f"plain, padded {setup.padded_items}"
    found = evaluate(run, baseline)
    limits = {
        workload: median(one for (name_, _), one in run.limits.items() if name_ == workload) for workload in works
    }
    console.print(f"{name} ({checkpoint.architecture}), {setup.dtype}, {machine}", markup=False)
    console.print(table(found, baseline))
    for line in speed_ups(found):
        console.print(f"speed-up, {line}", markup=False)
    for workload, work in works.items():
        console.print(
            f"{workload}: {len(work.sequences)} items with {work.num_tokens:,} tokens, {work.num_refused} refused; "
            f"the limit is {limits[workload]:,.0f} tokens/s "
            f"({limits[workload] * run.flops_per_token / 1e12:,.2f} TFLOP/s)"
        )
    if options.plot is not None:
        draw_plot(found, limits, f"{name}, {setup.dtype}, {machine}", options.plot)
    return {
        "model": name,
        "architecture": checkpoint.architecture,
        "num_parameters": checkpoint.num_parameters,
        "flops_per_token": run.flops_per_token,
        "machine": machine,
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": distribution_version("transformers")},
        "setup": asdict(setup) | {"folder": str(setup.folder)},
        "seed": options.seed,
        "limits": limits,
        **as_data(found, run.measurements),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.engines", description=__doc__.partition("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: a random model)")
    model.add_argument("--shape", choices=SHAPES, default="24M", help="size of the random model (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    _add_ways(parser.add_argument_group("further ways of scoring"))
    _add_work(parser)
    _add_machine(parser.add_argument_group("machine and batches"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write findings and measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the findings; the suffix determines the format")
    return parser


def _add_ways(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--onnx", type=Path, nargs="+", default=[], metavar="DIR", help="bundles exported from the same checkpoint")
    add("--compile", action="store_true", help="also measure the engine with compiled blocks")
    for option, meaning in GPU_OPTIONS.items():
        add(option, action="store_true", help=f"on a GPU, also measure the engine {meaning}")
    add("--int8", action="store_true", help="on a CPU, also measure the engine with linear layers in int8")


def _add_work(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(WORKLOADS)
    work = parser.add_mutually_exclusive_group()
    work.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="NAME",
        help=f"any of: {names} (default: all)",
    )
    work.add_argument(
        "--rows", type=Path, metavar="FILE", help="score the items or pairs of a data file instead of a workload"
    )
    add = parser.add_argument
    add("--items", type=int, help="items of each workload (default: 128 on CPU, 1,024 on CUDA)")
    add("--rounds", type=int, default=3, help="interleaved rounds (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of the texts (default: %(default)s)")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: all cores)")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU seconds, for a CPU that other processes use too; with --threads 1 (default: %(default)s)",
    )
    add("--batch-tokens", type=int, help="batch budget of the engine (default: as the service)")
    add("--padded-items", type=int, default=16, help="items of a padded batch of transformers (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
