"""The ONNX engine: an exported graph run by ONNX Runtime, a batch as a rectangle filled up on the right.

It decides how a batch becomes the graph's inputs and where the graph runs. What the graph computes was settled by
``reward-export``; whether this machine computes the same is tried once at start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.checkpoints.bundle import DTYPES, Bundle, Manifest, Precision
from service.engines.base import EngineInfo, EngineOutput
from service.engines.model.classifier import pooled_position
from service.errors import EngineOutOfMemory, ParityError, SettingsError
from service.records import Pooling, StateTap, TokenSequence
from service.settings import BatchingSettings, ModelSettings

logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""As of the torch engine; here filling counts too."""

CUDA_LENGTH_STEP = 8
"""A GPU's matrix units take rows by eights, so rectangles there get a length that is a multiple of it."""

INPUTS = ("input_ids", "attention_mask", "position_ids", "pooled_position", "mean_weights")
REWARD, STATES = "reward", "states"

Feed: TypeAlias = dict[str, NDArray[Any]]
_Reading: TypeAlias = tuple[tuple[int, ...], int]
"""Token ids, and the first of their tokens that ``mean`` counts in."""


@dataclass(frozen=True, slots=True)
class Filling:
    """How sequences become a rectangle.

    ``reads_first``: whether the model's own head begins with the first token (encoders). ``length_step``: rectangles
    are filled up to a multiple of it.
    """

    pooling: Pooling
    pad_token_id: int
    reads_first: bool
    length_step: int = 1

    def feed(self, readings: Sequence[_Reading]) -> Feed:
        """Return the graph's inputs: int64 [batch, length], pooled positions int64 [batch], weights float32."""
        lengths = [len(ids) for ids, _ in readings]
        longest = -(-max(lengths) // self.length_step) * self.length_step
        shape = (len(readings), longest)
        # What stands in the filling is never seen, but it must be a row of the embedding.
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        for row, (ids, border) in enumerate(readings):
            input_ids[row, : len(ids)] = ids
            first = border if border < len(ids) else 0
            weights[row, first : len(ids)] = 1.0 / (len(ids) - first)
        columns = np.arange(longest, dtype=np.int64)
        return {
            "input_ids": input_ids,
            "attention_mask": (columns < np.array(lengths)[:, None]).astype(np.int64),
            "position_ids": np.ascontiguousarray(np.broadcast_to(columns, shape)),
            "pooled_position": np.array([self._position(ids) for ids, _ in readings], dtype=np.int64),
            "mean_weights": weights,
        }

    def _position(self, ids: tuple[int, ...]) -> int:
        return 0 if self.reads_first else pooled_position(ids, self.pooling, self.pad_token_id)


class OnnxEngine:
    """An Engine over ONNX Runtime.

    Equal sequences of a batch are computed once, so their rewards are equal bit for bit. ``deterministic`` gives every
    sequence a pass of its own: no neighbour can change a bit of its reward. ``tap_places``: which of the graph's taps
    are those of ``info``.
    """

    def __init__(
        self,
        session: Any,
        filling: Filling,
        info: EngineInfo,
        tap_places: Sequence[int],
        *,
        deterministic: bool = False,
    ) -> None:
        self._session = session
        self._filling = filling
        self._info = info
        self._tap_places = list(tap_places)
        self._deterministic = deterministic
        self._graph_inputs = [graph_input.name for graph_input in session.get_inputs()]

    @property
    def info(self) -> EngineInfo:
        """How this engine computes rewards; constant after construction."""
        return self._info

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        """Score the sequences; see ``Engine.forward``.

        Raises:
            EngineOutOfMemory: the device had no room; the engine is usable again, a smaller batch may fit.
            ValueError: a sequence has no tokens.
        """
        wanted = list(dict.fromkeys((sequence.token_ids, sequence.num_prompt_tokens or 0) for sequence in sequences))
        rewards: dict[tuple[int, ...], float] = {}
        found: dict[_Reading, NDArray[np.float32]] = {}
        for readings in passes_over(wanted, apart=self._deterministic, states=states):
            feed = self._filling.feed(readings)
            answers = self._run({name: feed[name] for name in self._graph_inputs})
            for (ids, _), reward in zip(readings, answers[0].tolist(), strict=True):
                rewards.setdefault(ids, reward)
            if states:
                found.update(zip(readings, answers[1][:, self._tap_places], strict=True))
        return EngineOutput(
            [rewards[sequence.token_ids] for sequence in sequences],
            [0] * len(sequences),
            np.stack([found[sequence.token_ids, sequence.num_prompt_tokens or 0] for sequence in sequences])
            if states
            else None,
        )

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return zero: nothing is kept."""
        del sequence
        return 0

    def close(self) -> None:
        """Free the device's memory. The engine is not used afterwards."""
        self._session = None

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
        """Run on a GPU: inputs go up once, and outputs come down into memory that is there already."""
        import onnxruntime

        device, _, number = self._info.device.partition(":")
        binding = self._session.io_binding()
        for name, values in feed.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values, device, int(number)))
        rows = len(feed["input_ids"])
        results = []
        for output in self._session.get_outputs():
            # Only the batch is dynamic in what comes out.
            result = np.empty([rows, *output.shape[1:]], dtype=np.float32)
            binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(result))
            results.append(result)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return results


def passes_over(wanted: Sequence[_Reading], *, apart: bool, states: bool) -> Iterator[list[_Reading]]:
    """Share the readings out over passes in which no token ids stand twice.

    The first pass is the same whether states are wanted or not, so that asking for them changes no reward. The same
    ids with other borders between prompt and completion follow in passes of their own, for their states alone.
    """
    left = list(wanted)
    while left:
        first_of = {ids: (ids, first) for ids, first in reversed(left)}
        taken = [reading for reading in left if first_of[reading[0]] == reading]
        left = [reading for reading in left if first_of[reading[0]] != reading] if states else []
        if apart:
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
    """Load a judged bundle and return an engine that gives the rewards its export recorded.

    Args:
        bundle: graph and manifest.
        model: device, pooling and threads; arithmetic and path only to refuse what the bundle is not.
        batching: budget and determinism.
        taps: where states are to be read; None: wherever the graph reads them.
        check: whether to compare with the recorded rewards; not while they are being recorded.

    Raises:
        ParityError: this machine's ONNX Runtime computes other rewards.
        SettingsError: a setting does not fit this machine or this bundle.
    """
    manifest = bundle.manifest
    refuse_other_arithmetic(manifest, model)
    refuse_missing_taps(manifest, taps or ())
    device = resolve_bundle_device(manifest.precision, model.device)
    session = open_session(bundle.graph, device, model.num_threads)
    is_on_cpu = device == "cpu"
    filling = Filling(
        pooling=model.pooling,
        pad_token_id=manifest.pad_token_id,
        reads_first=not manifest.has_linear_head,
        length_step=1 if is_on_cpu else CUDA_LENGTH_STEP,
    )
    info = EngineInfo(
        engine="onnx",
        architecture=manifest.architecture,
        forward="padded",
        device=device,
        dtype=DTYPES[manifest.precision],
        cost="padded",
        max_input_tokens=bundle.checkpoint.max_input_tokens,
        max_batch_tokens=batching.max_batch_tokens or DEFAULT_BATCH_TOKENS["cpu" if is_on_cpu else "cuda"],
        parity={**asdict(manifest.parity), "compared_to": "plain transformers in float32, at export"},
        taps=manifest.taps if taps is None else taps,
        providers=tuple(session.get_providers()),
    )
    places = [manifest.taps.index(tap) for tap in info.taps]
    engine = OnnxEngine(session, filling, info, places, deterministic=batching.deterministic)
    # The recorded rewards were pooled by transformers' rule; under another one there is nothing to compare with.
    if check and model.pooling == "hf":
        check_probes(engine, manifest)
    return engine


def check_probes(engine: OnnxEngine, manifest: Manifest) -> None:
    """Return where the engine gives the probes of the manifest the rewards that were recorded with them.

    Raises:
        ParityError: it does not, as with another build of ONNX Runtime.
    """
    limit = engine.info.max_input_tokens
    probes = [probe for probe in manifest.probes if len(probe.token_ids) <= limit]
    rewards = engine.forward([TokenSequence(probe.token_ids) for probe in probes]).rewards
    gaps = [abs(reward - probe.reward) for reward, probe in zip(rewards, probes, strict=True)]
    gap = max((inf if isnan(gap) else gap for gap in gaps), default=0.0)
    if gap > manifest.probe_tolerance:
        raise ParityError(
            f"This machine's ONNX Runtime gives rewards that differ by {gap:.3g} from those recorded at export, more "
            f"than {manifest.probe_tolerance:.3g}: export the bundle on this machine, or as fp32."
        )
    logger.info("The graph gives its recorded rewards within %.3g, limit %.3g", gap, manifest.probe_tolerance)


def refuse_missing_taps(manifest: Manifest, taps: tuple[StateTap, ...]) -> None:
    """Return where the graph reads states at all these taps.

    Raises:
        SettingsError: it does not.
    """
    for tap in taps:
        if tap not in manifest.taps:
            raise SettingsError(
                f"The bundle's graph reads no {tap.pooling} state at layer {tap.layer}: "
                f"run `reward-export` with --taps {tap.layer}:{tap.pooling} and the others that are needed."
            )


def refuse_other_arithmetic(manifest: Manifest, model: ModelSettings) -> None:
    """Return where the settings ask for nothing that was settled otherwise at export.

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
    if model.pooling != "hf" and not manifest.has_linear_head:
        raise SettingsError(
            f"model.pooling is {model.pooling}, but {manifest.architecture} pools in its own head: leave it out."
        )


def resolve_bundle_device(precision: Precision, choice: str) -> str:
    """Return where a bundle runs: ``cpu`` or ``cuda:N``. ``auto`` takes CUDA when there is one, but never for int8.

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


def open_session(graph: Path, device: str, num_threads: int | None) -> Any:
    """Return ONNX Runtime's session on the device, and on no other.

    Raises:
        SettingsError: ONNX Runtime cannot run there, or cannot read the graph.
    """
    import onnxruntime

    providers = wanted_providers(device)
    missing = [name for name, _ in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise SettingsError(
            f"model.device is {device}, but the installed ONNX Runtime has no {missing[0]}: install onnxruntime-gpu in "
            "the place of onnxruntime, or set model.device to cpu."
        )
    if device != "cpu":
        onnxruntime.preload_dlls()  # CUDA and cuDNN as torch brings them; otherwise the provider would not load
    try:
        session = onnxruntime.InferenceSession(graph, session_options(num_threads), providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        if is_out_of_memory(error):
            raise
        raise SettingsError(
            f"ONNX Runtime cannot load {graph} on {device} ({type(error).__name__}: {error})"
        ) from error
    refuse_missing_provider(device, session.get_providers())
    return session


def refuse_missing_provider(device: str, active: Sequence[str]) -> None:
    """Return where the session runs on the device that was asked for.

    Raises:
        SettingsError: ONNX Runtime went on without it, which it tells in its log only.
    """
    wanted = wanted_providers(device)[0][0]
    if wanted not in active:
        raise SettingsError(
            f"model.device is {device}, but ONNX Runtime could not start its {wanted} and would run on "
            f"{', '.join(active) or 'nothing'}: install the CUDA and cuDNN that it was built for, or set model.device "
            "to cpu."
        )


def wanted_providers(device: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return ONNX Runtime's providers for a device, with their options; the CPU's carries small shape operations."""
    cpu: tuple[str, Mapping[str, Any]] = ("CPUExecutionProvider", {})
    if device == "cpu":
        return [cpu]
    # Memory is asked for as it is needed, not in powers of two: the largest batch is tried at start.
    options = {"device_id": int(device.partition(":")[2] or 0), "arena_extend_strategy": "kSameAsRequested"}
    return [("CUDAExecutionProvider", options), cpu]


def session_options(num_threads: int | None) -> Any:
    """Return ONNX Runtime's options for one engine thread, with batches of ever new shapes, beside a busy Python."""
    import onnxruntime

    from service.engines.devices.device import multiplies_int8_exactly, resolve_threads

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = resolve_threads(num_threads)
    # The graph is a chain: branches worth running side by side there are none.
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    # Spinning threads take the cores from tokenization and the event loop, which live in the same process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A memory plan is made per shape; no shape comes twice. The arena stays: fresh pages cost more than they save.
    options.enable_mem_pattern = False
    if not multiplies_int8_exactly():
        # ONNX Runtime then multiplies uint8 by uint8, which is slower and does not saturate.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    return options


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device had no room; ONNX Runtime has no class of its own for it."""
    if isinstance(error, MemoryError):
        return True
    signs = ("Failed to allocate memory", "bad allocation", "bad_alloc", "CUDA out of memory", "out of memory")
    return any(sign in str(error) for sign in signs)
