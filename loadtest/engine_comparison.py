"""A comparison of engines and other ways of scoring on the same work, in interleaved rounds."""

from __future__ import annotations

import argparse
import json
import platform
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

from loadtest.console import report_console
from loadtest.contenders import (
    REFERENCE,
    Contender,
    Setup,
    batch_invariant,
    changed,
    deterministic,
    exported,
    limit,
    ours,
    plain,
    synchronous,
)
from loadtest.engine_report import Finding, as_data, draw_plot, findings, speed_ups, table
from loadtest.engine_rounds import Run, run_rounds
from loadtest.engine_work import Work, read_groups, tokenize
from loadtest.measuring_process import ContenderFailedError
from loadtest.random_checkpoint import SHAPES, write_random_checkpoint
from loadtest.reward_comparison import compare_rewards
from loadtest.run_progress import RunProgress
from loadtest.served_dtype import served_dtype
from loadtest.workload import WORKLOADS
from service.checkpoints.checkpoint import Checkpoint, open_checkpoint
from service.engines.devices.device import resolve_device, resolve_threads
from service.engines.kernels.choice import kernels_for
from service.engines.plan import default_batch_tokens
from service.errors import DatasetError, StartupError
from service.outputs import write_text
from service.settings import ModelSettings

CONTENDERS: dict[str, Contender] = {"limit": limit, "plain": plain, "ours": ours}

REQUIRED = frozenset({"limit", "plain"})
"""Contenders without which there is nothing to compare with."""

DEFAULT_ITEMS = {"cpu": 128, "cuda": 1024}
"""Items of a workload, enough for several batches."""


def run(options: argparse.Namespace) -> int:
    """Compare as the command's options say; return the exit status."""
    console = report_console()
    try:
        with tempfile.TemporaryDirectory(prefix="reward-engines-") as folder:
            _compare(options, Path(folder), console)
    except (StartupError, DatasetError, OSError) as error:
        console.print(f"loadtest.engines: {type(error).__name__}: {error}", markup=False, style="red")
        if isinstance(error, ContenderFailedError):
            console.print(error.details, markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def evaluate(run: Run, baseline: str) -> list[Finding]:
    """Return the findings of a run; rewards are compared with those of the reference on the same work."""
    comparisons = {
        (workload, way): compare_rewards(run.rewards[workload, REFERENCE], rewards)
        for (workload, way), rewards in run.rewards.items()
    }
    return findings(run.measurements, comparisons, baseline, run.busy_shares)


def _compare(options: argparse.Namespace, folder: Path, console: Console) -> None:
    """Measure, print, draw and write; the file of ``--json`` is written after each workload."""
    with RunProgress(console) as progress:
        checkpoint, setup = _set_up(options, folder, progress)
        works = _works(options, checkpoint, options.items or DEFAULT_ITEMS[torch.device(setup.device).type])
        report = partial(_as_data, options, checkpoint, setup)
        run = run_rounds(
            contenders := _contenders(options),
            setup,
            works,
            options.rounds,
            progress.tell,
            optional=contenders.keys() - REQUIRED if options.keep_going else (),
            completed=None if options.json is None else lambda run: _write(options.json, report(run)),
        )
    _print(options, report(run), works, evaluate(run, _baseline(setup)), console)


def _contenders(options: argparse.Namespace) -> dict[str, Contender]:
    bundles = {str(bundle): partial(exported, bundle=bundle) for bundle in options.onnx}
    return CONTENDERS | _requested(options) | bundles


def _baseline(setup: Setup) -> str:
    return f"plain, padded {setup.padded_items}"


def _write(file: Path, report: dict[str, Any]) -> None:
    write_text(file, json.dumps(report, indent=2) + "\n")


def _set_up(options: argparse.Namespace, folder: Path, progress: RunProgress) -> tuple[Checkpoint, Setup]:
    """Open the checkpoint, written where none is given, and resolve what all contenders have in common."""
    device = resolve_device(options.device)
    dtype = served_dtype(options.dtype, options.model, device, int8=options.int8)
    progress.tell("Opening the model" if options.model else "Writing a random model")
    model = options.model or write_random_checkpoint(
        folder / "random", SHAPES[options.shape], dtype, device=str(device)
    )
    checkpoint = open_checkpoint(model, ModelSettings())
    kernels, _ = kernels_for("auto", device, getattr(torch, dtype))
    setup = Setup(
        folder=checkpoint.path,
        device=str(device),
        dtype=dtype,
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
        max_batch_tokens=options.batch_tokens or default_batch_tokens(device, kernels),
        padded_items=options.padded_items,
        num_threads=resolve_threads(options.threads),
        clock=options.clock,
    )
    return checkpoint, setup


def _requested(options: argparse.Namespace) -> dict[str, Contender]:
    """Return the contenders that are measured on request only."""
    contenders: dict[str, tuple[bool, Contender]] = {
        "compiled": (options.compile, partial(changed, compile=True)),
        "synchronous": (options.synchronous, synchronous),
        "graphs": (options.cuda_graphs, partial(changed, cuda_graphs=True)),
        "cascade": (options.cascade, partial(changed, cascade_attention=True)),
        "fp8": (options.fp8, partial(changed, quantization="fp8")),
        "batch-invariant": (options.batch_invariant, batch_invariant),
        "deterministic": (options.deterministic, deterministic),
        "int8": (options.int8, partial(changed, quantization="int8")),
    }
    return {name: contender for name, (is_requested, contender) in contenders.items() if is_requested}


def _works(options: argparse.Namespace, checkpoint: Checkpoint, num_items: int) -> dict[str, Work]:
    if options.rows is not None:
        return {options.rows.name: tokenize(list(islice(read_groups(options.rows), num_items)), checkpoint)}
    return {name: tokenize(WORKLOADS[name].draw(num_items, options.seed), checkpoint) for name in options.workloads}


def _as_data(options: argparse.Namespace, checkpoint: Checkpoint, setup: Setup, run: Run) -> dict[str, Any]:
    """Return what has been measured so far, JSON-ready."""
    machine = f"{setup.num_threads} CPU threads"
    if setup.device.startswith("cuda"):
        machine = torch.cuda.get_device_name(setup.device)
    workloads = dict.fromkeys(workload for workload, _ in run.limits)
    return {
        "model": str(options.model) if options.model else f"random, {options.shape}",
        "architecture": checkpoint.architecture,
        "num_parameters": checkpoint.num_parameters,
        "flops_per_token": run.flops_per_token,
        "machine": machine,
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": distribution_version("transformers")},
        "setup": asdict(setup) | {"folder": str(setup.folder)},
        "seed": options.seed,
        "limits": {
            workload: median(one for (name, _), one in run.limits.items() if name == workload) for workload in workloads
        },
        "failures": dict(run.failures),
        **as_data(evaluate(run, _baseline(setup)), run.measurements),
    }


def _print(
    options: argparse.Namespace,
    report: dict[str, Any],
    works: dict[str, Work],
    found: Sequence[Finding],
    console: Console,
) -> None:
    """Print the findings, and draw them on request."""
    name, dtype, limits = report["model"], report["setup"]["dtype"], report["limits"]
    console.print(f"{name} ({report['architecture']}), {dtype}, {report['machine']}", markup=False)
    console.print(table(found, f"plain, padded {report['setup']['padded_items']}"))
    for line in speed_ups(found):
        console.print(f"speed-up, {line}", markup=False)
    for workload, work in works.items():
        console.print(
            f"{workload}: {len(work.sequences)} items with {work.num_tokens:,} tokens, {work.num_refused} refused; "
            f"the limit is {limits[workload]:,.0f} tokens/s "
            f"({limits[workload] * report['flops_per_token'] / 1e12:,.2f} TFLOP/s)"
        )
    for way, details in report["failures"].items():
        console.print(f"left out, {way}: {details.splitlines()[-1]}", markup=False, style="red")
    if options.plot is not None:
        draw_plot(found, limits, f"{name}, {dtype}, {report['machine']}", options.plot)
