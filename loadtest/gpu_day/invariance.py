"""Compares rewards alone and in batches bit by bit at the size of a real model, by default and in exact modes.

Of each way it also reports the time of a sequence alone and of all of them in batches; the cost at every size is in the
sections of the engines.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.batch_effect import measure_batch_effect
from loadtest.engine_work import Work, batches_in_order, tokenize
from loadtest.served_dtype import served_dtype
from loadtest.workload import WORKLOADS
from service.checkpoints.checkpoint import Checkpoint, open_checkpoint
from service.engines.base import Engine
from service.engines.devices.device import resolve_device
from service.engines.torch import load_torch_engine
from service.outputs import write_text
from service.settings import BatchingSettings, ModelSettings

SEED = 1
WORKLOAD = "groups of 8"

ALONE = 16
"""Sequences of which each is scored alone for the time."""


@dataclass(frozen=True, slots=True)
class Mode:
    """Settings of the engine under which rewards are compared."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    batching: dict[str, Any] = field(default_factory=dict)

    is_exact: bool = True
    """Whether a reward that changes with the batch is a failure, and not only a fact."""


INVARIANT = {"batch_invariant": True}

MODES = (
    Mode("default", is_exact=False),
    Mode("deterministic", batching={"deterministic": True}),
    Mode("batch-invariant", batching=INVARIANT),
    Mode("batch-invariant, prefixes not shared", batching=INVARIANT | {"share_prefixes": False}),
    Mode("batch-invariant, padded", {"forward": "padded"}, INVARIANT),
)
"""The default first: what batch-invariant engines change in the process stays."""

CUDA_MODES = (Mode("batch-invariant, graphs", {"cuda_graphs": True}, INVARIANT),)


def main() -> int:
    """Compare; what fails is recorded, and the exit status is 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model, ModelSettings())
    work = tokenize(WORKLOADS[WORKLOAD].draw(options.items, SEED), checkpoint)
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for dtype, mode in plan(options.device, served_dtype("auto", None, resolve_device(options.device))):
        name = f"{mode.name}, {dtype}"
        try:
            rows.append(measure(checkpoint, options.device, dtype, mode, work))
            if mode.is_exact and rows[-1]["changed"]:
                failures[name] = f"{rows[-1]['changed']} of {rows[-1]['items']} rewards change with the batch"
        except Exception:  # noqa: BLE001 - the other ways are measured all the same
            failures[name] = traceback.format_exc()
        write_text(options.json, json.dumps({"rows": rows, "failures": failures}))
        print(f"{name}: {failures.get(name, 'no failure').splitlines()[-1]}", flush=True)
    return 0


def plan(device: str, dtype: str) -> Iterator[tuple[str, Mode]]:
    """Yield dtypes and modes: all in the served dtype, and in float32 those without CUDA graphs."""
    modes = MODES if device == "cpu" else (*MODES, *CUDA_MODES)
    yield from ((dtype, mode) for mode in modes)
    if dtype != "float32":
        yield from (("float32", mode) for mode in MODES)


def measure(checkpoint: Checkpoint, device: str, dtype: str, mode: Mode, work: Work) -> dict[str, Any]:
    """Load an engine, compare its rewards, and time it; its memory is freed afterwards."""
    settings = {"device": device, "dtype": dtype, "cuda_graphs": False, **mode.model}
    engine = load_torch_engine(
        checkpoint.path,
        ModelSettings.model_validate(settings),
        BatchingSettings.model_validate({"prefix_cache_mib": 0, **mode.batching}),
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
    )
    try:
        effect = measure_batch_effect(engine, work, SEED)
        return {
            "way": mode.name,
            "dtype": dtype,
            "path": engine.info.forward,
            "shares prefixes": engine.info.min_shared_prefix_tokens is not None,
            "block rows": engine.info.batch_invariance.get("min_block_rows"),
            "graphs": engine.info.cuda_graph_failure or engine.info.cuda_graph_max_tokens,
            "items": effect.num_items,
            "changed": effect.num_changed,
            "largest_change": effect.max_difference,
            "alone_ms": _alone_ms(engine, work),
            "tokens_per_s": _tokens_per_s(engine, work),
        }
    finally:
        engine.close()


def _alone_ms(engine: Engine, work: Work) -> float:
    """Return the median time of a sequence in a pass of its own; every shape has run before."""
    durations = []
    for sequence in work.sequences[:ALONE]:
        started = time.perf_counter()
        engine.forward([sequence])
        durations.append(1000 * (time.perf_counter() - started))
    return median(durations)


def _tokens_per_s(engine: Engine, work: Work) -> float:
    """Return the rate in batches, the better of two; each pass is complete before the next one starts."""
    rates = []
    for _ in range(2):
        started = time.perf_counter()
        for batch in batches_in_order(work.sequences, engine.info):
            engine.forward(work.sequences[batch.start : batch.stop])
        rates.append(work.num_tokens / (time.perf_counter() - started))
    return max(rates)


if __name__ == "__main__":
    sys.exit(main())
