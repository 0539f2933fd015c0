"""The latency of the forward pass of one item, in a process of its own, without queue, pipeline and server."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from loadtest.contenders import Outcome, Setup, Way
from loadtest.engine_work import Work, tokenize
from loadtest.latency_loads import WARM_UP
from loadtest.measuring_process import MeasuringProcess, running
from loadtest.stage_latencies import FORWARD
from loadtest.workload import WORKLOADS
from service.checkpoints.checkpoint import Checkpoint, open_checkpoint
from service.engines.devices.device import resolve_threads
from service.engines.kernels.choice import kernels_for
from service.engines.plan import default_batch_tokens
from service.engines.torch import load_torch_engine
from service.settings import BatchingSettings, ModelSettings


class ForwardPass:
    """The forward pass of one item of the workload at a time, in a process without a server.

    Args:
        process: that has loaded the engine.
        way: its only way.
        texts: all items of the workload.
    """

    def __init__(self, process: MeasuringProcess, way: str, texts: Work) -> None:
        self._process = process
        self._way = way
        self._texts = texts

    def seconds(self, number: int) -> float:
        """Compute the pass over the item of this number, and return the seconds that it took."""
        return self._process.score(self._way, Work((self._texts.sequences[number],), (0,))).seconds


@contextmanager
def running_forward_pass(options: argparse.Namespace, model: Path, dtype: str) -> Iterator[ForwardPass]:
    """Load the engine in a process of its own, which ends with the block; between passes it is idle."""
    checkpoint = open_checkpoint(model, ModelSettings())
    texts = tokenize(WORKLOADS[options.workload].draw(WARM_UP + options.requests, options.seed), checkpoint)
    with running(_engine_alone, _setup(checkpoint, dtype), "the engine") as process:
        (way,) = process.wait_until_loaded()
        yield ForwardPass(process, way, texts)


def _setup(checkpoint: Checkpoint, dtype: str) -> Setup:
    device = torch.device("cpu")
    kernels, _ = kernels_for("auto", device, getattr(torch, dtype))
    return Setup(
        folder=checkpoint.path,
        device="cpu",
        dtype=dtype,
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
        max_batch_tokens=default_batch_tokens(device, kernels),
        padded_items=1,
        num_threads=resolve_threads(None),
    )


def _engine_alone(setup: Setup) -> Mapping[str, Way]:
    """Load the engine as the service does, and return its forward pass without queue and pipeline.

    It caches no prefixes: the same items are computed beside each runtime, where they are new to the service.
    """
    engine = load_torch_engine(
        setup.folder,
        ModelSettings.model_validate({"device": setup.device, "dtype": setup.dtype, "num_threads": setup.num_threads}),
        BatchingSettings(max_batch_tokens=setup.max_batch_tokens, prefix_cache_mib=0),
        pad_token_id=setup.pad_token_id,
        max_input_tokens=setup.max_input_tokens,
    )

    def forward(work: Work) -> Outcome:
        started = setup.now()
        output = engine.forward(work.sequences)
        return Outcome(setup.now() - started, tuple(output.rewards))

    return {FORWARD: forward}
