"""The ways of scoring that are measured against each other: plain transformers, our engines, and bare matrix products.

Each is made in a process of its own, so that nobody's threads, allocator or changed layers help or harm the others.
What is measured, how often and in which order is decided elsewhere.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from loadtest.device_busy import busy_share
from loadtest.engine_work import Work
from loadtest.matmul_limit import layer_shapes, measure_limit
from service.engines.base import Engine, EngineOutput, LaunchingEngine, Pending
from service.engines.torch import load_torch_engine
from service.scheduling.budget import BatchBudget
from service.scheduling.queue import Queue
from service.settings import BatchingSettings, ModelSettings
from service.transformers_logging import transformers_silenced

REFERENCE = "fp32"
"""The way that says what the rewards are: plain transformers in fp32, one by one."""

LIMIT = "limit"
"""The way that only multiplies matrices and scores nothing."""

Clock: TypeAlias = Literal["wall", "cpu"]

CLOCKS: Mapping[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu``: the processor seconds of one process, which neighbours disturb far less; sensible with one thread."""

MAX_BATCH_SEQUENCES = 512
"""As the service's settings have it."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all contenders score with.

    ``device`` and ``dtype``: resolved. ``max_batch_tokens``: of our batches. ``padded_items``: of a padded batch of
    plain transformers. ``num_threads``: of the CPU. ``clock``: whose seconds count.
    """

    folder: Path
    device: str
    dtype: str
    pad_token_id: int
    max_input_tokens: int
    max_batch_tokens: int
    padded_items: int
    num_threads: int
    clock: Clock = "wall"

    @property
    def now(self) -> Callable[[], float]:
        """The clock to read before and after, in seconds."""
        return CLOCKS[self.clock]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a way made of some work in so many seconds of the setup's clock.

    ``rewards``: in the order of the work; none from the limit. ``num_shared``: tokens that were computed once for
    several sequences. ``busy_share``: of the time in which the device ran some kernel, where that was looked at.
    ``limit_tokens_per_s`` and ``flops_per_token``: from the limit only.
    """

    seconds: float
    rewards: tuple[float, ...] = field(default=(), repr=False)
    num_shared: int = 0
    limit_tokens_per_s: float = 0.0
    flops_per_token: int = 0
    busy_share: float | None = None


Way: TypeAlias = Callable[[Work], Outcome]

Contender: TypeAlias = Callable[[Setup], Mapping[str, Way]]
"""Loads what it needs and returns its ways by name; run in the process where they will be called."""


# --- Plain transformers ----------------------------------------------------------------------------------------------


def plain(setup: Setup) -> Mapping[str, Way]:
    """Transformers' own classifier, as everybody runs it."""
    forward = _PlainForward(setup, setup.dtype)
    size = setup.padded_items
    return {
        REFERENCE: lambda work: _PlainForward(setup, "float32").score(work, size=1),
        "plain, one by one": partial(forward.score, size=1),
        f"plain, padded {size}": partial(forward.score, size=size),
        f"plain, padded {size}, sorted": partial(forward.score, size=size, by_length=True),
    }


class _PlainForward:
    """A classifier with padded batches. Nothing of the service takes part."""

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
        rows = [sequence.token_ids for sequence in work.sequences]
        rewards = [0.0] * len(rows)
        for places in padded_batches([len(row) for row in rows], size, by_length=by_length):
            for place, reward in zip(places, self._rewards([rows[place] for place in places]), strict=True):
                rewards[place] = reward
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
    """Return the places of batches of ``size`` sequences, in order of arrival or, longest first, of length."""
    places = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True) if by_length else range(len(lengths))
    return [list(places[first : first + size]) for first in range(0, len(lengths), size)]


# --- Ours ------------------------------------------------------------------------------------------------------------


def ours(setup: Setup) -> Mapping[str, Way]:
    """Our torch engine without and with shared prefixes, with batches formed by the service's own queue."""
    return _ways(setup, [_torch_engine(setup, share_prefixes=share) for share in (False, True)])


def changed(setup: Setup, **changes: object) -> Mapping[str, Way]:
    """Our torch engine with shared prefixes and some settings of the model changed."""
    return _ways(setup, [_torch_engine(setup, share_prefixes=True, **changes)])


def in_order(setup: Setup) -> Mapping[str, Way]:
    """Our torch engine with shared prefixes, each pass awaited before the next one is prepared."""
    engine = _torch_engine(setup, share_prefixes=True)
    score = partial(score_in_batches, engine, now=setup.now, ahead=False)
    return {f"{_way_of(engine)}, in order": with_busy_share(score, setup.device)}


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
        "merged": info.cascade_attention,
        info.quantization: info.quantization != "none",
    }
    return ", ".join([f"ours, {info.forward}", *(name for name, is_on in extras.items() if is_on)])


def _torch_engine(setup: Setup, *, share_prefixes: bool, **changes: object) -> Engine:
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
        # The same texts are scored in every round, and no round may find what an earlier one has left.
        BatchingSettings(max_batch_tokens=setup.max_batch_tokens, share_prefixes=share_prefixes, prefix_cache_mib=0),
        pad_token_id=setup.pad_token_id,
        max_input_tokens=setup.max_input_tokens,
    )


def exported(setup: Setup, bundle: Path) -> Mapping[str, Way]:
    """Our ONNX engine on a bundle that was exported from the same checkpoint, with the same batches."""
    from service.checkpoints.bundle import open_bundle
    from service.engines.onnx import load_onnx_engine

    settings = ModelSettings(device=setup.device, num_threads=setup.num_threads)
    judged = open_bundle(bundle, settings)
    engine = load_onnx_engine(judged, settings, BatchingSettings(max_batch_tokens=setup.max_batch_tokens))
    return {f"ONNX, {engine.info.dtype}": partial(score_in_batches, engine, now=setup.now)}


def score_in_batches(engine: Engine, work: Work, now: Callable[[], float], *, ahead: bool = True) -> Outcome:
    """Score the work as a busy service would that got each group as a request, all at once.

    Where the engine launches ahead, one pass is launched before the one before it is awaited, unless told otherwise.
    """
    started = now()
    rewards = [0.0] * len(work.sequences)
    num_shared = 0
    for places, output in _outputs(engine, work, ahead=ahead):
        num_shared += sum(output.shared_tokens)
        for place, reward in zip(places, output.rewards, strict=True):
            rewards[place] = reward
    return Outcome(now() - started, tuple(rewards), num_shared)


def _outputs(engine: Engine, work: Work, *, ahead: bool) -> Iterator[tuple[list[int], EngineOutput]]:
    in_flight: deque[tuple[list[int], Pending[EngineOutput]]] = deque()
    for places in budget_batches(work, engine):
        sequences = [work.sequences[place] for place in places]
        if not (ahead and engine.info.async_launch and isinstance(engine, LaunchingEngine)):
            yield places, engine.forward(sequences)
            continue
        in_flight.append((places, engine.launch(sequences)))
        if len(in_flight) > 1:
            landed, pending = in_flight.popleft()
            yield landed, pending.result()
    for landed, pending in in_flight:
        yield landed, pending.result()


def with_busy_share(way: Way, device: str) -> Way:
    """Return a way that, on CUDA, also says of each work's first scoring how long the device was at it.

    That scoring is done twice, once under the profiler; it is the one that no round counts.
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


def budget_batches(work: Work, engine: Engine) -> Iterator[list[int]]:
    """Yield the places of the batches that the service's queue forms within the engine's budget."""
    queue = Queue(work.num_tokens, engine.info.min_shared_prefix_tokens)
    requests: dict[int, list[int]] = {}
    for place, group in enumerate(work.groups):
        requests.setdefault(group, []).append(place)
    for group, places in requests.items():
        sequences = [work.sequences[place] for place in places]
        queue.put(group, sequences, [group] * len(places), now=0.0, deadline=inf)
    budget = BatchBudget(engine.info.cost, engine.info.max_batch_tokens, MAX_BATCH_SEQUENCES)
    while len(queue):
        entries = queue.take_batch(0.0, budget).entries
        yield [requests[entry.request][entry.index] for entry in entries]  # type: ignore[index]


# --- The limit -------------------------------------------------------------------------------------------------------


def limit(setup: Setup) -> Mapping[str, Way]:
    """The matrix products of the model's layers, with as many rows as our batches have tokens."""
    torch.set_num_threads(setup.num_threads)
    shapes = layer_shapes(setup.folder)

    def multiply(_: Work) -> Outcome:
        found = measure_limit(
            shapes, setup.max_batch_tokens, getattr(torch, setup.dtype), torch.device(setup.device), setup.now
        )
        return Outcome(0.0, limit_tokens_per_s=found.tokens_per_s, flops_per_token=found.flops_per_token)

    return {LIMIT: multiply}
