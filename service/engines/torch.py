"""The torch engine: a transformers classifier on one device, run by the forward path that the parity probe chose.

It decides what shares a pass and translates a lack of memory; how a pass runs is the path's, what a batch holds the
queue's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from service.engines.base import Deferred, EngineInfo, EngineOutput, Pending, Ready, StateTap
from service.engines.compilation import check_compiler
from service.engines.devices.device import (
    is_lost,
    is_out_of_memory,
    keep_freed_memory,
    release_memory,
    resolve_device,
    resolve_dtype,
    resolve_threads,
)
from service.engines.kernels import bindings
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.patching import drop_plain_weights
from service.engines.linear.float8 import check_float8, quantize_float8
from service.engines.linear.int8 import quantize_int8
from service.engines.model.classifier import Classifier, load_classifier, read_config, stored_dtype
from service.engines.model.rotary import length_border
from service.engines.model.taps import StateQuery, check_taps
from service.engines.parity import Parity, choose_path
from service.engines.paths.base import ForwardPath, LaunchingPath
from service.engines.paths.cuda_graphs import record_library, wants_graphs
from service.engines.paths.packed import PackedForward
from service.errors import EngineOutOfMemory, EngineUnavailable, SettingsError
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings

logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Enough to keep the device busy; more would only make the next request wait longer."""

TILES_BATCH_TOKENS = 4096
"""The same on kernels with matrix tiles: such a pass takes no longer than one over half as many without them."""

DEFAULT_PREFIX_CACHE_MIB = {"cpu": 512, "cuda": 0}
"""On a CPU a kept prompt cannot change a bit of a reward, and memory is taken as prompts come; on CUDA nothing was
measured yet."""
_Found = TypeVar("_Found")

_Reading: TypeAlias = tuple[tuple[int, ...], int]
"""Token ids, and the first of their tokens that belongs to the completion."""


class TorchEngine:
    """An Engine over transformers.

    Equal sequences of a batch are computed once, so their rewards are equal bit for bit. ``deterministic`` gives every
    sequence a pass of its own: no neighbour can change a bit of its reward. ``border``: sequences up to that many
    tokens and longer ones never share a pass, nor a beginning, and of the longer ones none is kept; None: all may.
    """

    def __init__(
        self, path: ForwardPath, info: EngineInfo, *, deterministic: bool = False, border: int | None = None
    ) -> None:
        self._path: ForwardPath | None = path
        self._info = info
        self._deterministic = deterministic
        self._border = border

    @property
    def info(self) -> EngineInfo:
        """How this engine computes rewards; constant after construction."""
        return self._info

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        """Score the sequences; see ``Engine.forward``.

        Raises:
            EngineOutOfMemory: the device had no room; the engine is usable again, a smaller batch may fit.
            EngineUnavailable: the device is lost.
            ValueError: a sequence has no tokens.
        """
        return self.launch(sequences, states=states).result()

    def launch(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> Pending[EngineOutput]:
        """Hand the sequences to the device; see ``LaunchingEngine.launch``. On a CPU they are computed at once.

        Raises:
            EngineOutOfMemory, EngineUnavailable, ValueError: as ``forward``.
        """
        taps = self._info.taps if states else ()
        parts = []
        prompts = {sequence.token_ids: sequence.num_prompt_tokens for sequence in sequences}
        for rows in self._passes(list(dict.fromkeys(sequence.token_ids for sequence in sequences))):
            wanted = _readings_of(rows, sequences) if taps else []
            places = {row: place for place, row in enumerate(rows)}
            query = StateQuery(taps, tuple((places[ids], start) for ids, start in wanted))
            keeping = [prompts[row] for row in rows] if self._keeps(rows[0]) else None
            parts.append(_Part(rows, wanted, self._try(rows, partial(self._launch, rows, query, keeping))))
        return Deferred(partial(self._complete, sequences, parts, reads_states=bool(taps)))

    def _complete(self, sequences: Sequence[TokenSequence], parts: list[_Part], *, reads_states: bool) -> EngineOutput:
        first = {sequence.token_ids: place for place, sequence in reversed(list(enumerate(sequences)))}
        rewards: dict[tuple[int, ...], float] = {}
        shared = [sequence.num_tokens for sequence in sequences]
        num_cached_tokens = 0
        found: dict[_Reading, NDArray[np.float32]] = {}
        for part in parts:
            output = self._try(part.rows, part.pending.result)
            num_cached_tokens += output.cached_tokens
            rewards.update(zip(part.rows, output.rewards, strict=True))
            for row, num_shared in zip(part.rows, output.shared_tokens, strict=True):
                shared[first[row]] = num_shared
            if output.states is not None:
                found.update(zip(part.wanted, output.states, strict=True))
        return EngineOutput(
            [rewards[sequence.token_ids] for sequence in sequences],
            shared,
            np.stack([found[_reading_of(sequence)] for sequence in sequences]) if reads_states else None,
            num_cached_tokens,
        )

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return how many leading tokens the next pass need not compute; see ``Engine.num_cached_tokens``."""
        if self._path is None or not self._keeps(sequence.token_ids):
            return 0
        first_wanted = _reading_of(sequence)[1] if any(tap.pooling == "mean" for tap in self._info.taps) else None
        return self._path.num_cached_tokens(sequence.token_ids, first_wanted)

    def close(self) -> None:
        """Free the device's memory. The engine is not used afterwards."""
        self._path = None
        release_memory(torch.device(self._info.device))

    def _passes(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Share the rows out over as few passes as keep them from changing each other."""
        if self._deterministic:
            return [[row] for row in rows]
        if self._border is None:
            return [rows]
        short = [row for row in rows if len(row) <= self._border]
        long = [row for row in rows if len(row) > self._border]
        return [part for part in (short, long) if part]

    def _keeps(self, row: tuple[int, ...]) -> bool:
        """Whether the row's pass may use what is kept, which has the frequencies of sequences up to the border."""
        return self._border is None or len(row) <= self._border

    def _launch(
        self, rows: list[tuple[int, ...]], query: StateQuery, prompts: list[int | None] | None
    ) -> Pending[EngineOutput]:
        if self._path is None:
            raise RuntimeError("The engine is closed")
        if isinstance(self._path, LaunchingPath) and not self._path.keeps:
            return self._path.launch(rows, query)
        return Ready(self._path.run(rows, query, prompts))

    def _try(self, rows: list[tuple[int, ...]], step: Callable[[], _Found]) -> _Found:
        """Return what a step of a pass over the rows returns; say it in our words where the device fails."""
        try:
            return step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                if is_lost(torch.device(self._info.device)):
                    raise EngineUnavailable(f"{self._info.device} is lost: {error}") from error
                raise
        # Outside of the except clause the traceback no longer holds the tensors of the failed pass.
        release_memory(torch.device(self._info.device))
        raise EngineOutOfMemory(
            f"{len(rows)} sequences with {sum(map(len, rows))} tokens do not fit into the memory of {self._info.device}"
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a batch that share a pass, and whose states are read off it."""

    rows: list[tuple[int, ...]]
    wanted: list[_Reading]
    pending: Pending[EngineOutput]


def _reading_of(sequence: TokenSequence) -> _Reading:
    return sequence.token_ids, sequence.num_prompt_tokens or 0


def _readings_of(rows: list[tuple[int, ...]], sequences: Sequence[TokenSequence]) -> list[_Reading]:
    """Return what must be read for these rows: of equal ids once for each border between prompt and completion."""
    present = set(rows)
    return list(dict.fromkeys(_reading_of(sequence) for sequence in sequences if sequence.token_ids in present))


def load_torch_engine(
    folder: Path,
    model: ModelSettings,
    batching: BatchingSettings,
    *,
    pad_token_id: int | None,
    max_input_tokens: int,
    taps: Sequence[StateTap] = (),
) -> TorchEngine:
    """Load a judged checkpoint folder and return an engine whose rewards were compared with plain transformers.

    Args:
        folder: weights (safetensors) and configuration.
        model: device, arithmetic, pooling, forward path and threads; the rest is not read.
        batching: budget and determinism.
        pad_token_id: the checkpoint's own, which decides what the head reads.
        max_input_tokens: longest sequence that will be scored.
        taps: where states can be read.

    Raises:
        ParityError: no forward path agrees with plain transformers.
        SettingsError: a setting does not fit this machine or this model, or a tap is out of its depth.
    """
    device = resolve_device(model.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_num_threads(resolve_threads(model.num_threads))
    config = read_config(folder)
    wanted = "bfloat16" if model.quantization == "int8" and model.dtype == "auto" else model.dtype
    dtype = resolve_dtype(wanted, stored_dtype(config), device)
    if model.compile:
        check_compiler(device)
    wants_graphs(model.cuda_graphs, device, num_parameters=0, deterministic=batching.deterministic)
    if model.cascade_attention and device.type != "cuda":
        raise SettingsError(f"model.cascade_attention needs a CUDA device and model.device is {device}: leave it out")
    kernels = _kernels_of(model, device, dtype)
    border = length_border(config.get_text_config(), max_input_tokens)
    classifier = load_classifier(
        folder,
        dtype=dtype,
        device=device,
        pooling=model.pooling,
        pad_token_id=pad_token_id,
    )
    if model.quantization == "fp8":
        check_float8(device, classifier.dtype)
    check_taps(classifier.body, classifier.config.num_hidden_layers, taps)
    shares = batching.share_prefixes and not batching.deterministic
    prefix_cache_mib = batching.prefix_cache_mib
    if prefix_cache_mib is None:
        prefix_cache_mib = DEFAULT_PREFIX_CACHE_MIB[device.type]
    path, parity = choose_path(
        classifier,
        model.forward,
        border or max_input_tokens,
        share_prefixes=shares,
        compiled=model.compile,
        kernels=kernels,
        cache_bytes=prefix_cache_mib * 2**20 if shares else 0,
        cascade=model.cascade_attention,
        quantize=_quantizing(model, classifier),
    )
    if kernels is not None:
        _settle_kernels(classifier, path, model)
    max_batch_tokens = batching.max_batch_tokens or default_batch_tokens(device, path.kernels)
    info = _describe(classifier, path, parity, max_input_tokens, max_batch_tokens, tuple(taps))
    graph_failure = ""
    num_parameters = sum(weight.numel() for weight in classifier.model.parameters())
    if wants_graphs(model.cuda_graphs, device, num_parameters, deterministic=batching.deterministic):
        graph_failure = _record_graphs(classifier, path, parity, max_batch_tokens, border)
    info = replace(
        info,
        compiled=model.compile,
        prefix_cache_mib=prefix_cache_mib if path.keeps else 0,
        launches_ahead=device.type == "cuda" and isinstance(path, LaunchingPath) and not path.keeps,
        graph_tokens=path.library.longest_row if isinstance(path, PackedForward) else 0,
        graph_failure=graph_failure,
        cascade_attention=model.cascade_attention and path.shared_from is not None,
        quantization=model.quantization,
        quantization_loss=dict(parity.quantization_loss),
    )
    return TorchEngine(path, info, deterministic=batching.deterministic, border=border)


def _quantizing(model: ModelSettings, classifier: Classifier) -> Callable[[], object] | None:
    """Return what changes the body's linear layers as the settings want it."""
    functions = {"fp8": quantize_float8, "int8": quantize_int8}
    chosen = functions.get(model.quantization)
    return None if chosen is None else partial(chosen, classifier.body)


def default_batch_tokens(device: torch.device, kernels: Kernels | None) -> int:
    """Return how many tokens a pass on this device holds where the settings do not say."""
    return TILES_BATCH_TOKENS if kernels is not None and kernels.has_amx else DEFAULT_BATCH_TOKENS[device.type]


def _kernels_of(model: ModelSettings, device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """Return the kernels that the settings want and this machine has; says in the log why it has none.

    Raises:
        SettingsError: the settings want them, and this machine or another setting does not.
    """
    without = model.compile or model.forward == "padded"
    if model.quantization == "int8":
        if without or model.kernels == "off":
            raise SettingsError(
                "model.quantization is int8, which runs on our kernels alone: they run neither in compiled blocks nor "
                "in padded batches, and must not be off"
            )
        return bindings.int8_kernels(device, dtype)
    if without:
        if model.kernels == "on":
            raise SettingsError("model.kernels is on, but compiled blocks and padded batches do not run on them")
        return None
    kernels, reason = bindings.kernels_for(model.kernels, device, dtype)
    if kernels is None and model.kernels == "auto" and device.type == "cpu" and dtype == torch.bfloat16:
        logger.warning("Passes run without kernels of our own, which are much faster: %s.", reason)
    return kernels


def _settle_kernels(classifier: Classifier, path: ForwardPath, model: ModelSettings) -> None:
    """Free what a path on kernels does not need; complain where the model does not run on them.

    Raises:
        SettingsError: the settings want them all the same.
    """
    if path.kernels is not None:
        drop_plain_weights(classifier.body)
    elif model.kernels == "on" or model.quantization == "int8":
        wish = "quantization is int8" if model.quantization == "int8" else "kernels is on"
        raise SettingsError(f"model.{wish}, but {classifier.architecture} does not run on our kernels")
    else:
        logger.warning("%s does not run on kernels of our own.", classifier.architecture)


def _record_graphs(
    classifier: Classifier, path: ForwardPath, parity: Parity, max_batch_tokens: int, border: int | None
) -> str:
    """Let the path replay short rows; return why it does not, empty where it does."""
    if not isinstance(path, PackedForward):
        return f"{path.name} batches have no fixed shapes"
    if border is not None:
        return "the rotary frequencies depend on the longest sequence of a pass"
    path.library, failure = record_library(
        classifier, lambda rows: path.run(rows).rewards, max_batch_tokens, parity.tolerance
    )
    return failure


def _describe(
    classifier: Classifier,
    path: ForwardPath,
    parity: Parity,
    max_input_tokens: int,
    max_batch_tokens: int,
    taps: tuple[StateTap, ...],
) -> EngineInfo:
    return EngineInfo(
        engine="torch",
        architecture=classifier.architecture,
        forward=path.name,
        device=str(classifier.device),
        dtype=str(classifier.dtype).removeprefix("torch."),
        cost=path.cost,
        max_input_tokens=max_input_tokens,
        max_batch_tokens=max_batch_tokens,
        parity={name: value for name, value in asdict(parity).items() if name != "quantization_loss"},
        taps=taps,
        shared_from=path.shared_from,
        kernels=path.kernels.name if path.kernels else None,
    )
