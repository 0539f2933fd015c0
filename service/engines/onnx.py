"""The ONNX engine: an exported graph run by ONNX Runtime, on batches padded on the right.

This module converts a batch to the graph's inputs and runs the graph on a device. The graph itself was made by
``reward-export``; a comparison at start verifies that this machine computes the same rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.checkpoints.bundle import DTYPES, Bundle, Manifest, Precision
from service.engines.base import EngineInfo, EngineOutput
from service.engines.deduplication import Reading, UniquePass, scatter, unique_readings
from service.engines.model.classifier import gate_position, pooled_position
from service.engines.onnx_session import is_out_of_memory, open_session
from service.errors import EngineOutOfMemory, ParityError, SettingsError
from service.records import Pooling, StateTap, TokenSequence
from service.settings import BatchingSettings, ModelSettings

logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Default batch budget, the same as the torch engine's; here padding counts too."""

CUDA_LENGTH_STEP = 8
"""On GPUs batches are padded to a multiple of this length, because matrix units work on multiples of eight."""

INPUTS = ("input_ids", "attention_mask", "position_ids", "pooled_position", "mean_weights")
GATE_INPUT = "gate_position"
"""A further input of the graph of a model whose head has a gate."""

REWARD, STATES = "reward", "states"

Feed: TypeAlias = dict[str, NDArray[Any]]
"""The graph's inputs by name."""


@dataclass(frozen=True, slots=True)
class Padding:
    """How sequences become a padded batch."""

    pooling: Pooling
    """Which token's state a linear head reads."""

    pad_token_id: int
    """The id of padding tokens, whose states are never read."""

    reads_first: bool
    """Whether the model's own head reads the first token, as encoders' heads do."""

    gate_pattern: tuple[int, ...] = ()
    """Token ids of which the gate of the head reads the first one; empty where it has none."""

    length_step: int = 1
    """Batches are padded to a multiple of it."""

    def feed(self, readings: Sequence[Reading]) -> Feed:
        """Return the graph's inputs: int64 [batch, length], positions int64 [batch], weights float32.

        Raises:
            ValueError: a sequence lacks the tokens that a gate reads, or has no tokens.
        """
        lengths = [len(ids) for ids, _ in readings]
        longest = -(-max(lengths) // self.length_step) * self.length_step
        shape = (len(readings), longest)
        # States of padding are never read, but its id must be a row of the embedding.
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        for row, (ids, mean_start) in enumerate(readings):
            input_ids[row, : len(ids)] = ids
            first = mean_start if mean_start < len(ids) else 0
            weights[row, first : len(ids)] = 1.0 / (len(ids) - first)
        columns = np.arange(longest, dtype=np.int64)
        gates = {} if not self.gate_pattern else {GATE_INPUT: self._gate_positions(readings)}
        return gates | {
            "input_ids": input_ids,
            "attention_mask": (columns < np.array(lengths)[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(np.broadcast_to(columns, shape)),
            "pooled_position": np.array([self._position(ids) for ids, _ in readings], dtype=np.int64),
            "mean_weights": weights,
        }

    def _gate_positions(self, readings: Sequence[Reading]) -> NDArray[np.int64]:
        return np.array([gate_position(ids, self.gate_pattern) for ids, _ in readings], dtype=np.int64)

    def _position(self, ids: tuple[int, ...]) -> int:
        return 0 if self.reads_first else pooled_position(ids, self.pooling, self.pad_token_id)


class OnnxEngine:
    """An Engine over ONNX Runtime.

    Equal sequences of a batch are computed once, so their rewards are equal bit for bit.

    Args:
        session: ONNX Runtime's.
        padding: makes the graph's inputs.
        info: describes the engine.
        tap_indices: for each tap of ``info``, its index among the graph's taps.
        deterministic: whether every sequence runs in a pass of its own, so that the batch composition cannot change a
            bit of its reward.
    """

    def __init__(
        self,
        session: Any,
        padding: Padding,
        info: EngineInfo,
        tap_indices: Sequence[int],
        *,
        deterministic: bool = False,
    ) -> None:
        self._session = session
        self._padding = padding
        self._info = info
        self._tap_indices = list(tap_indices)
        self._deterministic = deterministic
        self._graph_inputs = [graph_input.name for graph_input in session.get_inputs()]

    @property
    def info(self) -> EngineInfo:
        """How this engine computes rewards; constant after construction."""
        return self._info

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        """Score the sequences; see ``Engine.forward``.

        Raises:
            EngineOutOfMemory: the device ran out of memory; the engine is usable again, a smaller batch may fit.
            ValueError: a sequence has no tokens, or has steps, which the graph does not read.
        """
        if any(sequence.step_positions for sequence in sequences):
            raise ValueError("The graph reads the head at one token of a sequence")
        passes = passes_over(unique_readings(sequences), one_by_one=self._deterministic, states=states)
        outputs = (self._run_pass(readings, states=states) for readings in passes)
        return scatter(sequences, outputs, states=states)

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return zero: nothing is cached."""
        del sequence
        return 0

    def close(self) -> None:
        """Free the device's memory. The engine is not used afterwards."""
        self._session = None

    def _run_pass(self, readings: list[Reading], *, states: bool) -> tuple[UniquePass, EngineOutput]:
        feed = self._padding.feed(readings)
        outputs, all_states = self._run({name: feed[name] for name in self._graph_inputs})
        found = all_states[:, self._tap_indices] if states else None
        computed = UniquePass([reading.token_ids for reading in readings], readings if states else [])
        shared_tokens = [0] * len(readings)
        if outputs.ndim == 1:  # of a head with one output
            return computed, EngineOutput(outputs.tolist(), shared_tokens, found)
        values = [row[None] for row in outputs]
        return computed, EngineOutput(outputs[:, 0].tolist(), shared_tokens, found, outputs=values)

    def _run(self, feed: Feed) -> list[NDArray[np.float32]]:
        if self._session is None:
            raise RuntimeError("The engine is closed")
        try:
            if self._info.device == "cpu":
                outputs: list[NDArray[np.float32]] = self._session.run([REWARD, STATES], feed)
                return outputs
            return self._run_bound(feed)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        rows, longest = feed["input_ids"].shape
        raise EngineOutOfMemory(f"{rows} x {longest} tokens do not fit into the memory of {self._info.device}")

    def _run_bound(self, feed: Feed) -> list[NDArray[np.float32]]:
        """Run on a GPU: inputs are copied to it once, and outputs into preallocated host memory."""
        import onnxruntime

        device, _, number = self._info.device.partition(":")
        binding = self._session.io_binding()
        for name, values in feed.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values, device, int(number)))
        rows = len(feed["input_ids"])
        results = []
        for output in self._session.get_outputs():
            # Only the batch dimension of an output is dynamic.
            result = np.empty([rows, *output.shape[1:]], dtype=np.float32)
            binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(result))
            results.append(result)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return results


def passes_over(readings: Sequence[Reading], *, one_by_one: bool, states: bool) -> Iterator[list[Reading]]:
    """Distribute the readings over passes in which no token ids are repeated.

    The first pass is the same whether states are requested or not, so that requesting them changes no reward. The same
    ids with another start of the mean follow in passes of their own, for their states alone.

    Args:
        readings: all different.
        one_by_one: whether every reading gets a pass of its own.
        states: whether states are requested.
    """
    left = list(readings)
    while left:
        first_of = {reading.token_ids: reading for reading in reversed(left)}
        taken = [reading for reading in left if first_of[reading.token_ids] == reading]
        left = [reading for reading in left if first_of[reading.token_ids] != reading] if states else []
        if one_by_one:
            yield from ([reading] for reading in taken)
        else:
            yield taken


def load_onnx_engine(
    bundle: Bundle,
    model: ModelSettings,
    batching: BatchingSettings,
    *,
    taps: tuple[StateTap, ...] | None = None,
    check: bool = True,
) -> OnnxEngine:
    """Load a validated bundle and return an engine that gives the rewards its export recorded.

    Args:
        bundle: graph and manifest.
        model: device, pooling and threads; dtype and path are only compared with the bundle, to refuse contradictions.
        batching: budget and determinism.
        taps: where states are read; None: wherever the graph reads them.
        check: whether to compare with the recorded rewards; not while the export records them.

    Raises:
        ParityError: this machine's ONNX Runtime computes other rewards.
        SettingsError: a setting does not fit this machine or this bundle.
    """
    if batching.batch_invariant:
        raise SettingsError(
            "batching.batch_invariant is for checkpoints, which the torch engine runs: with an ONNX bundle use "
            "batching.deterministic"
        )
    manifest = bundle.manifest
    refuse_contradictions(manifest, model, bundle.checkpoint.pooling)
    refuse_missing_taps(manifest, taps or ())
    device = resolve_bundle_device(manifest.precision, model.device)
    session = open_session(bundle.graph, device, model.num_threads)
    padding = Padding(
        pooling=bundle.checkpoint.pooling,
        pad_token_id=manifest.pad_token_id,
        reads_first=not manifest.has_linear_head,
        gate_pattern=bundle.checkpoint.gate_pattern,
        length_step=1 if device == "cpu" else CUDA_LENGTH_STEP,
    )
    info = _describe(bundle, batching, device, session.get_providers(), taps)
    tap_indices = [manifest.taps.index(tap) for tap in info.taps]
    engine = OnnxEngine(session, padding, info, tap_indices, deterministic=batching.deterministic)
    # For another pooling than that of the export there is nothing to compare with.
    if check and bundle.checkpoint.pooling == bundle.recorded_pooling:
        check_probes(engine, manifest)
    return engine


def _describe(
    bundle: Bundle,
    batching: BatchingSettings,
    device: str,
    providers: Sequence[str],
    taps: tuple[StateTap, ...] | None,
) -> EngineInfo:
    manifest = bundle.manifest
    return EngineInfo(
        engine="onnx",
        architecture=manifest.architecture,
        forward="padded",
        device=device,
        dtype=DTYPES[manifest.precision],
        cost="padded",
        max_input_tokens=bundle.checkpoint.max_input_tokens,
        max_batch_tokens=batching.max_batch_tokens or BATCH_TOKENS["cpu" if device == "cpu" else "cuda"],
        parity={**asdict(manifest.parity), "compared_to": "plain transformers in float32, at export"},
        taps=manifest.taps if taps is None else taps,
        attention_heads=getattr(bundle.checkpoint.config, "num_attention_heads", None),
        outputs=bundle.checkpoint.outputs,
        gate_pattern=bundle.checkpoint.gate_pattern,
        reads_steps=False,
        providers=tuple(providers),
    )


def check_probes(engine: OnnxEngine, manifest: Manifest) -> None:
    """Verify that the engine gives the probes of the manifest the rewards that were recorded with them.

    Raises:
        ParityError: it does not, for example with another build of ONNX Runtime.
    """
    limit = engine.info.max_input_tokens
    probes = [probe for probe in manifest.probes if len(probe.token_ids) <= limit]
    outputs = engine.forward([TokenSequence(probe.token_ids) for probe in probes]).at_pooled if probes else []
    gaps = [
        abs(value - recorded)
        for values, probe in zip(outputs, probes, strict=True)
        for value, recorded in zip(values, probe.outputs or (probe.reward,), strict=True)
    ]
    gap = max((inf if isnan(gap) else gap for gap in gaps), default=0.0)
    if gap > manifest.probe_tolerance:
        raise ParityError(
            f"This machine's ONNX Runtime gives rewards that differ by {gap:.3g} from those recorded at export, more "
            f"than {manifest.probe_tolerance:.3g}: export the bundle on this machine, or as fp32."
        )
    logger.info("The graph gives its recorded rewards within %.3g, limit %.3g", gap, manifest.probe_tolerance)


def refuse_missing_taps(manifest: Manifest, taps: tuple[StateTap, ...]) -> None:
    """Verify that the graph reads states at all these taps.

    Raises:
        SettingsError: it does not.
    """
    for tap in taps:
        if tap not in manifest.taps:
            raise SettingsError(
                f"The bundle's graph reads no {tap.pooling} state at layer {tap.layer}: "
                f"run `reward-export` with --taps {tap.layer}:{tap.pooling} and the others that are needed."
            )


def refuse_contradictions(manifest: Manifest, model: ModelSettings, pooling: Pooling) -> None:
    """Verify that the settings do not contradict the export.

    Raises:
        SettingsError: they do.
    """
    dtype = DTYPES[manifest.precision]
    if model.dtype not in {"auto", dtype}:
        raise SettingsError(
            f"model.dtype is {model.dtype}, but the bundle was exported as {manifest.precision}: leave the setting "
            "out, or run `reward-export` with another --precision."
        )
    if model.forward == "packed":
        raise SettingsError("model.forward is packed, but an ONNX graph is run padded: leave the setting out.")
    if model.compile:
        raise SettingsError(
            "model.compile is for the torch engine, and a bundle is run by ONNX: leave the setting out."
        )
    if pooling != "hf" and not manifest.has_linear_head:
        raise SettingsError(
            f"model.pooling is {pooling}, but {manifest.architecture} pools in its own head: leave it out."
        )


def resolve_bundle_device(precision: Precision, choice: str) -> str:
    """Return where a bundle runs: ``cpu`` or ``cuda:N``. ``auto`` prefers CUDA, but never for int8.

    Raises:
        SettingsError: the name is no device, this machine lacks it, or it cannot run this precision.
    """
    if precision == "int8":
        if choice not in {"auto", "cpu"}:
            raise SettingsError(
                f"model.device is {choice}, but ONNX Runtime multiplies int8 on CPUs only: export fp16 for a GPU."
            )
        return "cpu"
    from service.engines.devices.device import resolve_device

    device = resolve_device(choice)
    return "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
