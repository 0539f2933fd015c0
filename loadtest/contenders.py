"""The ways of scoring that are compared: plain transformers, the service's engines, and matrix products alone.

Each contender runs in a process of its own, so that threads, allocators and replaced layers of one do not affect the
others. The caller decides what is measured, how often and in which order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from loadtest.device_busy import busy_share
from loadtest.engine_work import Work
from loadtest.matmul_limit import layer_shapes, measure_limit
from service.engines.base import Engine
from service.engines.devices.device import release_memory
from service.engines.torch import load_torch_engine
from service.errors import HttpError
from service.offline import score_batches
from service.pipeline import Pipeline
from service.settings import BatchingSettings, ModelSettings
from service.transformers_logging import transformers_silenced

REFERENCE = "fp32"
"""The way whose rewards are the reference: plain transformers in fp32, one sequence a pass."""

LIMIT = "limit"
"""The way that only multiplies matrices and computes no reward."""

Clock: TypeAlias = Literal["wall", "cpu"]

CLOCKS: Mapping[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu``: CPU seconds of one process, which other processes disturb far less; meaningful with one thread."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all contenders have in common."""

    folder: Path
    """The checkpoint."""

    device: str
    """Resolved, never ``auto``."""

    dtype: str
    """Of the model's body; resolved."""

    pad_token_id: int
    max_input_tokens: int

    max_batch_tokens: int
    """Budget of a batch of the service's engines."""

    padded_items: int
    """Items of a padded batch of plain transformers."""

    num_threads: int
    """CPU threads."""

    clock: Clock = "wall"
    """Whose seconds count."""

    @property
    def now(self) -> Callable[[], float]:
        """The clock that is read before and after a measurement, in seconds."""
        return CLOCKS[self.clock]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of scoring some work once."""

    seconds: float
    """Of the setup's clock."""

    rewards: tuple[float, ...] = field(default=(), repr=False)
    """In the order of the work; none from the limit."""

    num_shared: int = 0
    """Tokens that were computed once for several sequences, counted for all but the first."""

    limit_tokens_per_s: float = 0.0
    """From the limit only."""

    flops_per_token: int = 0
    """From the limit only."""

    busy_share: float | None = None
    """Share of the time in which the device ran some kernel, where that was measured."""


Way: TypeAlias = Callable[[Work], Outcome]

Contender: TypeAlias = Callable[[Setup], Mapping[str, Way]]
"""Loads what it needs and returns its ways by name; called in the process that will call them."""


# --- Plain transformers ----------------------------------------------------------------------------------------------


def plain(setup: Setup) -> Mapping[str, Way]:
    """Transformers' own classifier, as it is usually run."""
    forward = _PlainForward(setup, setup.dtype)
    size = setup.padded_items
    return {
        REFERENCE: partial(_reference, setup),
        "plain, one by one": partial(forward.score, size=1),
        f"plain, padded {size}": partial(forward.score, size=size),
        f"plain, padded {size}, sorted": partial(forward.score, size=size, by_length=True),
    }


def _reference(setup: Setup, work: Work) -> Outcome:
    """Score in fp32, and return the memory of the fp32 weights, which other processes need on a GPU."""
    outcome = _PlainForward(setup, "float32").score(work, size=1)
    release_memory(torch.device(setup.device))
    return outcome


class _PlainForward:
    """A classifier with padded batches, without any code of the service."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(setup.num_threads)
        with transformers_silenced():
            model: Any = AutoModelForSequenceClassification.from_pretrained(setup.folder, dtype=getattr(torch, dtype))
        model.config.get_text_config().pad_token_id = setup.pad_token_id
        self._model = model.eval().to(setup.device)
        self._pad_token_id = setup.pad_token_id
        self._now = setup.now

    def score(self, work: Work, *, size: int, by_length: bool = False) -> Outcome:
        started = self._now()
        token_ids = [sequence.token_ids for sequence in work.sequences]
        rewards = [0.0] * len(token_ids)
        for indices in padded_batches([len(ids) for ids in token_ids], size, by_length=by_length):
            for index, reward in zip(indices, self._rewards([token_ids[index] for index in indices]), strict=True):
                rewards[index] = reward
        return Outcome(self._now() - started, tuple(rewards))

    @torch.inference_mode()
    def _rewards(self, rows: Sequence[Sequence[int]]) -> list[float]:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self._pad_token_id] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        output = self._model(input_ids=ids.to(self._model.device), attention_mask=mask.to(self._model.device))
        rewards: list[float] = output.logits[:, 0].float().tolist()
        return rewards


def padded_batches(lengths: Sequence[int], size: int, *, by_length: bool) -> list[list[int]]:
    """Return the indices in batches of ``size`` sequences, in order of arrival or by length, longest first."""
    indices = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True) if by_length else range(len(lengths))
    return [list(indices[first : first + size]) for first in range(0, len(lengths), size)]


# --- The service -----------------------------------------------------------------------------------------------------


def ours(setup: Setup) -> Mapping[str, Way]:
    """The service's torch engine without and with shared prefixes, in batches that the service's queue forms."""
    return _ways(setup, [_torch_engine(setup, share_prefixes=share) for share in (False, True)])


def changed(setup: Setup, **changes: Any) -> Mapping[str, Way]:
    """The torch engine with shared prefixes and some settings of the model changed."""
    return _ways(setup, [_torch_engine(setup, share_prefixes=True, **changes)])


def synchronous(setup: Setup) -> Mapping[str, Way]:
    """The torch engine with shared prefixes, each pass complete before the next one is prepared."""
    engine = _torch_engine(setup, share_prefixes=True)
    score = partial(score_in_batches, engine, now=setup.now, ahead=False)
    return {f"{_way_of(engine)}, synchronous": with_busy_share(score, setup.device)}


def batch_invariant(setup: Setup) -> Mapping[str, Way]:
    """The torch engine with shared prefixes where they change no bit, and batch-invariant rewards."""
    return _ways(setup, [_torch_engine(setup, share_prefixes=True, batching={"batch_invariant": True})])


def deterministic(setup: Setup) -> Mapping[str, Way]:
    """The torch engine with a pass for every sequence, in the batches of the queue."""
    engine = _torch_engine(setup, share_prefixes=False, batching={"deterministic": True})
    score = partial(score_in_batches, engine, now=setup.now)
    return {f"{_way_of(engine)}, deterministic": with_busy_share(score, setup.device)}


def without_prefixes(setup: Setup, **changes: Any) -> Way:
    """The torch engine without shared prefixes and some settings of the model changed."""
    return partial(score_in_batches, _torch_engine(setup, share_prefixes=False, **changes), now=setup.now)


def _ways(setup: Setup, engines: Sequence[Engine]) -> dict[str, Way]:
    return {
        _way_of(engine): with_busy_share(partial(score_in_batches, engine, now=setup.now), setup.device)
        for engine in engines
    }


def _way_of(engine: Engine) -> str:
    info = engine.info
    extras = {
        "shared prefixes": info.min_shared_prefix_tokens is not None,
        "compiled": info.compiled,
        "graphs": info.cuda_graph_max_tokens > 0,
        "graphs failed": bool(info.cuda_graph_failure),
        "cascade": info.cascade_attention,
        "batch-invariant": bool(info.batch_invariance),
        info.quantization: info.quantization != "none",
    }
    return ", ".join([f"ours, {info.forward}", *(name for name, is_on in extras.items() if is_on)])


def _torch_engine(
    setup: Setup, *, share_prefixes: bool, batching: Mapping[str, Any] | None = None, **changes: Any
) -> Engine:
    computation = {
        "device": setup.device,
        "dtype": setup.dtype,
        "num_threads": setup.num_threads,
        "cuda_graphs": False,
        **changes,
    }
    return load_torch_engine(
        setup.folder,
        ModelSettings.model_validate(computation),
        # The same texts are scored in every round, and no round may find prompts that an earlier one has cached.
        BatchingSettings(
            max_batch_tokens=setup.max_batch_tokens,
            share_prefixes=share_prefixes,
            prefix_cache_mib=0,
            **(batching or {}),
        ),
        pad_token_id=setup.pad_token_id,
        max_input_tokens=setup.max_input_tokens,
    )


def exported(setup: Setup, bundle: Path) -> Mapping[str, Way]:
    """The ONNX engine on a bundle that was exported from the same checkpoint, with the same budget."""
    from service.checkpoints.bundle import open_bundle
    from service.engines.onnx import load_onnx_engine

    settings = ModelSettings(device=setup.device, num_threads=setup.num_threads)
    opened = open_bundle(bundle, settings)
    engine = load_onnx_engine(opened, settings, BatchingSettings(max_batch_tokens=setup.max_batch_tokens))
    return {f"ONNX, {engine.info.dtype}": partial(score_in_batches, engine, now=setup.now)}


def score_in_batches(engine: Engine, work: Work, now: Callable[[], float], *, ahead: bool = True) -> Outcome:
    """Score the work as the service's pipeline does, in batches that its queue forms.

    Args:
        engine: to measure.
        work: to score; equal sequences are computed once.
        now: the clock, in seconds.
        ahead: whether the next pass is launched before the previous one is complete, where the engine can do that.

    Raises:
        HttpError: a sequence could not be scored; a measurement without it would be of other work.
    """
    started = now()
    rewards = [0.0] * len(work.sequences)
    num_shared = 0
    for batch in score_batches(Pipeline(engine), work.sequences, launch_ahead=ahead):
        num_shared += batch.shared_tokens
        for index, outcome in batch.results:
            if isinstance(outcome, HttpError):
                raise outcome
            if outcome.reward is None:
                raise ValueError("The head has several outputs and no weights, so there is no reward to compare")
            rewards[index] = outcome.reward
    return Outcome(now() - started, tuple(rewards), num_shared)


def with_busy_share(way: Way, device: str) -> Way:
    """Return a way that, on CUDA, also measures the share of time in which the device is busy, once for each work.

    The first scoring of a work, which no round counts, is done twice for that: the second time under the profiler.
    """
    seen: set[tuple[int, int]] = set()

    def score(work: Work) -> Outcome:
        outcome = way(work)
        key = (len(work.sequences), work.num_tokens)
        if key in seen or not device.startswith("cuda"):
            return outcome
        seen.add(key)
        return replace(outcome, busy_share=busy_share(lambda: way(work)))

    return score


# --- The limit -------------------------------------------------------------------------------------------------------


def limit(setup: Setup) -> Mapping[str, Way]:
    """The matrix products of the model's layers, with as many rows as a full batch has tokens."""
    torch.set_num_threads(setup.num_threads)
    shapes = layer_shapes(setup.folder)

    def multiply(_: Work) -> Outcome:
        found = measure_limit(
            shapes, setup.max_batch_tokens, getattr(torch, setup.dtype), torch.device(setup.device), setup.now
        )
        return Outcome(0.0, limit_tokens_per_s=found.tokens_per_s, flops_per_token=found.flops_per_token)

    return {LIMIT: multiply}
