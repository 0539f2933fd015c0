"""The effect of the batch composition on rewards: each text alone and in shuffled batches, for engines and dtypes."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from loadtest.console import report_console
from loadtest.engine_work import Work, batches_in_order, tokenize
from loadtest.random_checkpoint import SHAPES, write_random_checkpoint
from loadtest.workload import WORKLOADS
from service.checkpoints.bundle import open_bundle
from service.checkpoints.checkpoint import Checkpoint, open_checkpoint
from service.engines.base import Engine
from service.engines.devices.device import resolve_device
from service.engines.onnx import load_onnx_engine
from service.engines.torch import load_torch_engine
from service.outputs import write_text
from service.settings import BatchingSettings, ModelSettings

SHUFFLES = 3


@dataclass(frozen=True, slots=True)
class BatchEffect:
    """The effect of the batch composition on the rewards of an engine."""

    engine: str
    num_items: int

    num_changed: int
    """Items whose reward alone differs from one of their rewards in a batch."""

    max_difference: float
    """Largest absolute difference."""


def measure_batch_effect(engine: Engine, work: Work, seed: int) -> BatchEffect:
    """Score each sequence alone, then all of them in batches, in several random orders."""
    alone = [engine.forward([sequence]).rewards[0] for sequence in work.sequences]
    changed: set[int] = set()
    largest = 0.0
    for order in _orders(len(alone), seed):
        shuffled = [work.sequences[index] for index in order]
        for batch in batches_in_order(shuffled, engine.info):
            rewards = engine.forward(shuffled[batch.start : batch.stop]).rewards
            for index, reward in zip(order[batch.start : batch.stop], rewards, strict=True):
                if reward != alone[index]:
                    changed.add(index)
                    largest = max(largest, abs(reward - alone[index]))
    return BatchEffect(describe(engine), len(alone), len(changed), largest)


def describe(engine: Engine) -> str:
    """Return an engine's name with all that determines its rounding."""
    info = engine.info
    kernels = f", kernels {info.kernels}" if info.kernels else ""
    invariant = ", batch-invariant" if info.batch_invariance else ""
    return f"{info.engine}, {info.arithmetic} on {info.device}, {info.forward}{kernels}{invariant}"


def run(options: argparse.Namespace) -> int:
    """Measure as the command's options say; return the exit status.

    Raises:
        StartupError: the checkpoint or an engine cannot be loaded.
    """
    console = report_console()
    with tempfile.TemporaryDirectory(prefix="reward-invariance-") as folder:
        model = options.model or write_random_checkpoint(Path(folder) / "random", SHAPES[options.shape])
        checkpoint = open_checkpoint(model, ModelSettings())
        work = tokenize(WORKLOADS[options.workload].draw(options.items, options.seed), checkpoint)
        found = [measure_batch_effect(engine, work, options.seed) for engine in _engines(options, checkpoint)]
    console.print(table(found))
    if options.json is not None:
        write_text(options.json, json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return 0


def table(found: Sequence[BatchEffect]) -> Table:
    """Return the results for a terminal, one engine a row."""
    drawn = Table()
    for title in ("engine", "items", "changed by batch composition", "largest difference"):
        drawn.add_column(title, justify="left" if title == "engine" else "right")
    for one in found:
        drawn.add_row(one.engine, str(one.num_items), str(one.num_changed), f"{one.max_difference:.2g}")
    return drawn


def _orders(count: int, seed: int) -> Iterator[list[int]]:
    rng = random.Random(seed)  # noqa: S311 - an order of texts, not a secret
    for _ in range(SHUFFLES):
        yield rng.sample(range(count), count)


def _engines(options: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[Engine]:
    device = str(resolve_device(options.device))
    for changes in _model_settings(options, device):
        yield load_torch_engine(
            checkpoint.path,
            ModelSettings.model_validate({"device": device, **changes}),
            BatchingSettings(deterministic=options.deterministic, batch_invariant=options.batch_invariant),
            pad_token_id=checkpoint.pad_token_id,
            max_input_tokens=checkpoint.max_input_tokens,
        )
    for bundle in options.onnx:
        settings = ModelSettings(device=device)
        yield load_onnx_engine(
            open_bundle(bundle, settings), settings, BatchingSettings(deterministic=options.deterministic)
        )


def _model_settings(options: argparse.Namespace, device: str) -> Iterator[dict[str, str]]:
    for dtype in options.dtypes:
        for kernels in ("auto", "off") if device == "cpu" and dtype in {"bfloat16", "float32"} else ("off",):
            yield {"dtype": dtype, "kernels": kernels}
    if options.int8:
        yield {"quantization": "int8"}
