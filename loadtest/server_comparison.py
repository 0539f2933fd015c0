"""A comparison of the service with another server: starts both, measures them alternately, and compares rewards."""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from loadtest.console import report_console
from loadtest.load_shapes import LoadShape, Pass, passes, shapes_against_plain, shapes_of_prefixes
from loadtest.peers import PEERS, peer_versions
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.reference import reference_rewards
from loadtest.run_progress import RunProgress, RunTimeEstimate
from loadtest.served_dtype import served_dtype
from loadtest.server_report import ServerReport, compare_servers
from loadtest.server_rounds import Measurement, measure_alternately, warm_up
from loadtest.servers import (
    RunningServer,
    running_baseline,
    running_graph_server,
    running_litserve,
    running_service,
    running_vllm,
)
from loadtest.vllm_peer import vllm_environment, vllm_flags
from loadtest.wire import UnexpectedAnswer
from service.errors import StartupError
from service.outputs import write_text

MAX_REFERENCE_ITEMS = 128


def run(options: argparse.Namespace) -> int:
    """Compare the servers as the command's options say; return the exit status."""
    console = report_console()
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    if options.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    try:
        with tempfile.TemporaryDirectory(prefix="reward-compare-") as folder:
            report = _compare(options, Path(folder), console)
    except (StartupError, UnexpectedAnswer, OSError, EOFError) as error:
        console.print(f"loadtest.compare: {type(error).__name__}: {error}", markup=False, style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    report.print(console)
    if options.json is not None:
        write_text(options.json, json.dumps(_conditions(options) | report.as_json(), indent=2) + "\n")
    return 0 if report.rewards_match else 1


def _compare(options: argparse.Namespace, folder: Path, console: Console) -> ServerReport:
    peer = PEERS[options.peer]
    versions = peer_versions(peer, options.peer_python)
    with RunProgress(console) as progress:
        progress.tell("Opening the model" if options.model else "Writing a random model")
        options.dtype = served_dtype(options.dtype, options.model, torch.device("cpu"))
        model = options.model or write_random_checkpoint(folder / "random-24m", dtype=options.dtype)
        shapes = _shapes(options)
        planned = list(passes(shapes, options.rounds, options.seed))
        measurements = _measure(options, model, folder, shapes, planned, progress)
        progress.tell("Computing reference rewards with transformers in fp32")
        comparisons = compare_servers(measurements, options.peer, _reference(model, planned))
    dtypes = options.dtype, peer.dtype or options.dtype
    return ServerReport(options.peer, dtypes, shapes, measurements, comparisons, versions)


def _shapes(options: argparse.Namespace) -> list[LoadShape]:
    choose = shapes_of_prefixes if PEERS[options.peer].shares_prefixes else shapes_against_plain
    return choose(options.single_groups, options.bulk_groups)


def _measure(
    options: argparse.Namespace,
    model: Path,
    folder: Path,
    shapes: Sequence[LoadShape],
    planned: Sequence[Pass],
    progress: RunProgress,
) -> list[Measurement]:
    """Start both servers, measure them, and stop them."""
    bundle = _export(model, folder, progress) if options.peer == "onnxruntime" else model
    progress.tell("Starting the servers")
    with _running_peer(options, bundle, folder) as peer, running_service(model, options.dtype, folder) as ours:
        progress.tell("Warming up")
        estimate = RunTimeEstimate()
        for warmed in warm_up((peer, ours), shapes, seed=options.seed - 1):
            estimate.observe(warmed.shape, warmed.num_items, warmed.seconds)
        sizes = [(one.shape.name, 2 * len(one.items)) for one in planned]
        measurements: list[Measurement] = []
        for number, one_pass in enumerate(planned):
            left_s = estimate.seconds_for(sizes[number:])
            progress.tell(f"Round {one_pass.round + 1}: {one_pass.shape.name}", number, len(planned), left_s)
            started = time.perf_counter()
            measurements += measure_alternately((peer, ours), [one_pass])
            estimate.observe(*sizes[number], time.perf_counter() - started)
    return measurements


def _export(model: Path, folder: Path, progress: RunProgress) -> Path:
    """Export the model to ONNX in float32 without states, which only diagnostics read; return the folder."""
    from export.onnx.bundle_export import ExportPlan, export_bundle

    export_bundle(str(model), folder / "bundle", ExportPlan(taps=()), progress.tell)
    return folder / "bundle"


def _running_peer(options: argparse.Namespace, model: Path, folder: Path) -> AbstractContextManager[RunningServer]:
    peer, python, dtype = PEERS[options.peer], options.peer_python, options.dtype
    match peer.name:
        case "plain":
            return running_baseline(model, dtype, folder)
        case "vllm":
            return running_vllm(python, model, dtype, folder, prefix_cache=options.prefix_cache == "on")
        case "litserve":
            return running_litserve(python, model, dtype, folder)
        case runtime:
            return running_graph_server(runtime, python, model, peer.dtype or dtype, folder)


def _reference(model: Path, planned: Sequence[Pass]) -> dict[int, float]:
    """Return the fp32 rewards of evenly spaced items, by their index among all items that were sent."""
    sent = [item for one_pass in planned for item in one_pass.items]
    indices = range(0, len(sent), -(-len(sent) // MAX_REFERENCE_ITEMS))
    return dict(zip(indices, reference_rewards(model, [sent[index] for index in indices]), strict=True))


def _conditions(options: argparse.Namespace) -> dict[str, object]:
    conditions = {
        "model": str(options.model) if options.model else "random, 24 million parameters",
        "seed": options.seed,
        "cores": len(os.sched_getaffinity(0)),
    }
    if options.peer == "vllm":
        conditions["vllm_flags"] = vllm_flags(options.dtype, prefix_cache=options.prefix_cache == "on")
        conditions["vllm_environment"] = vllm_environment(os.environ, os.sched_getaffinity(0))
    return conditions


def _raise_keyboard_interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
