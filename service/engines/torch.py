"""The torch engine: a transformers classifier on one device, run by the forward path that the parity probe chose.

This module decides which sequences share a pass and translates out-of-memory errors. The forward path runs a pass; the
queue forms the batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch

from service.checkpoints.configuration import read_config
from service.checkpoints.labels import resolve_description
from service.checkpoints.reward_description import read_description, resolve_pooling
from service.engines.base import Deferred, EngineInfo, EngineOutput, Pending, Ready, StateTap
from service.engines.compilation import check_compiler
from service.engines.deduplication import (
    Reading,
    UniquePass,
    scatter,
    steps_by_row,
    unique_readings,
    unique_token_ids,
)
from service.engines.devices.device import (
    enable_huge_pages,
    forbid_reduced_reductions,
    is_device_lost,
    is_out_of_memory,
    release_memory,
    retain_freed_memory,
)
from service.engines.invariance import FILL_TOKENS, InvarianceProbe
from service.engines.kernels import choice
from service.engines.kernels.bindings import Kernels
from service.engines.kernels.patching import drop_plain_weights, packed_layers
from service.engines.linear.float8 import check_float8, quantize_float8
from service.engines.linear.int8 import quantize_int8
from service.engines.linear.verified_blocks import smallest_blocks
from service.engines.model.classifier import Classifier, load_classifier
from service.engines.model.taps import StateQuery, check_taps
from service.engines.parity import (
    Parity,
    choose_path,
    plain_outputs,
    plain_outputs_of_texts,
    probes_for,
    quantization_error,
    reference_of,
)
from service.engines.paths.base import ForwardPath, LaunchingPath
from service.engines.paths.cuda_graphs import capture_graphs, record_library, resolve_graphs
from service.engines.paths.packed import PackedForward
from service.engines.plan import EnginePlan, Machine, plan_engine
from service.errors import EngineOutOfMemory, EngineUnavailable, SettingsError
from service.records import TextProbe, TokenSequence
from service.settings import BatchingSettings, ModelSettings

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class TorchEngine:
    """An Engine over transformers.

    Equal sequences of a batch are computed once, so their rewards are equal bit for bit.

    Args:
        path: runs the passes.
        info: describes them.
        deterministic: whether every sequence runs in a pass of its own, so that the batch composition cannot change a
            bit of its reward.
        rope_length_limit: sequences up to that many tokens and longer ones never share a pass, since they have other
            rotary frequencies; the longer ones neither read the prefix cache nor add to it. None: all may share.
    """

    def __init__(
        self, path: ForwardPath, info: EngineInfo, *, deterministic: bool = False, rope_length_limit: int | None = None
    ) -> None:
        self._path: ForwardPath | None = path
        self._info = info
        self._deterministic = deterministic
        self._rope_length_limit = rope_length_limit

    @property
    def info(self) -> EngineInfo:
        """How this engine computes rewards; constant after construction."""
        return self._info

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        """Score the sequences; see ``Engine.forward``.

        Raises:
            EngineOutOfMemory: the device ran out of memory; the engine is usable again, a smaller batch may fit.
            EngineUnavailable: the device is lost.
            ValueError: a sequence has no tokens.
        """
        return self.launch(sequences, states=states).result()

    def launch(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> Pending[EngineOutput]:
        """Launch the sequences on the device; see ``LaunchingEngine.launch``. On a CPU they are computed at once.

        Raises:
            EngineOutOfMemory, EngineUnavailable, ValueError: as ``forward``.
        """
        taps = self._info.taps if states else ()
        readings = unique_readings(sequences) if taps else []
        prompts = {sequence.row: sequence.num_prompt_tokens for sequence in sequences}
        steps = steps_by_row(sequences)
        passes = [
            self._launch_pass(token_ids, taps, readings, prompts, steps)
            for token_ids in self._passes_over(unique_token_ids(sequences))
        ]
        return Deferred(partial(self._complete, sequences, passes, states=bool(taps)))

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return how many leading tokens are cached for the next pass; see ``Engine.num_cached_tokens``."""
        if self._path is None or not self._may_use_cache(sequence.row):
            return 0
        reads_mean = any(tap.pooling == "mean" for tap in self._info.taps)
        mean_start = Reading.of(sequence).mean_start if reads_mean else None
        return self._path.num_cached_tokens(sequence.row, mean_start, sequence.step_positions)

    def close(self) -> None:
        """Free the device's memory. The engine is not used afterwards."""
        self._path = None
        release_memory(torch.device(self._info.device))

    def _passes_over(self, token_ids: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Distribute different sequences over the fewest passes in which they cannot change each other's rewards."""
        if self._deterministic:
            return [[one] for one in token_ids]
        limit = self._rope_length_limit
        if limit is None:
            return [token_ids]
        short = [one for one in token_ids if len(one) <= limit]
        long = [one for one in token_ids if len(one) > limit]
        return [part for part in (short, long) if part]

    def _may_use_cache(self, token_ids: tuple[int, ...]) -> bool:
        """Whether a sequence's pass may use the prefix cache, which has the rotary frequencies of short sequences."""
        return self._rope_length_limit is None or len(token_ids) <= self._rope_length_limit

    def _launch_pass(
        self,
        token_ids: list[tuple[int, ...]],
        taps: tuple[StateTap, ...],
        readings: list[Reading],
        prompts: dict[tuple[int, ...], int | None],
        steps: dict[tuple[int, ...], tuple[int, ...]],
    ) -> _LaunchedPass:
        index = {one: position for position, one in enumerate(token_ids)}
        own = [reading for reading in readings if reading.token_ids in index]
        query = StateQuery(taps, tuple((index[reading.token_ids], reading.mean_start) for reading in own))
        cacheable = [prompts[one] for one in token_ids] if self._may_use_cache(token_ids[0]) else None
        own_steps = [steps.get(one, ()) for one in token_ids] if steps else []
        pending = self._translating(token_ids, partial(self._launch, token_ids, query, cacheable, own_steps))
        return _LaunchedPass(UniquePass(token_ids, own, own_steps), pending)

    def _launch(
        self,
        token_ids: list[tuple[int, ...]],
        query: StateQuery,
        prompts: list[int | None] | None,
        steps: list[tuple[int, ...]],
    ) -> Pending[EngineOutput]:
        if self._path is None:
            raise RuntimeError("The engine is closed")
        if isinstance(self._path, LaunchingPath) and not self._path.caches_prefixes:
            return self._path.launch(token_ids, query, steps)
        return Ready(self._path.run(token_ids, query, prompts, steps))

    def _complete(
        self, sequences: Sequence[TokenSequence], passes: list[_LaunchedPass], *, states: bool
    ) -> EngineOutput:
        outputs = ((one.computed, self._translating(one.computed.token_ids, one.pending.result)) for one in passes)
        return scatter(sequences, outputs, states=states)

    def _translating(self, token_ids: Sequence[tuple[int, ...]], step: Callable[[], _T]) -> _T:
        """Return what a step of a pass over these sequences returns; a failure of the device gets its own error."""
        try:
            return step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                if is_device_lost(torch.device(self._info.device)):
                    raise EngineUnavailable(f"{self._info.device} is lost: {error}") from error
                raise
        # Outside of the except clause the traceback no longer holds the tensors of the failed pass.
        release_memory(torch.device(self._info.device))
        raise EngineOutOfMemory(
            f"{len(token_ids)} sequences with {sum(map(len, token_ids))} tokens do not fit into the memory of "
            f"{self._info.device}"
        )


@dataclass(frozen=True, slots=True)
class _LaunchedPass:
    """A pass on the device."""

    computed: UniquePass
    pending: Pending[EngineOutput]


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_torch_engine(
    folder: Path,
    model: ModelSettings,
    batching: BatchingSettings,
    *,
    pad_token_id: int | None,
    max_input_tokens: int,
    taps: Sequence[StateTap] = (),
    reads_token_types: bool = False,
    texts: Sequence[TextProbe] = (),
) -> TorchEngine:
    """Load a validated checkpoint folder and return an engine whose rewards were compared with plain transformers.

    Args:
        folder: weights (safetensors) and configuration.
        model: device, arithmetic, pooling, forward path and threads; the rest is not read.
        batching: budget, determinism and batch invariance.
        pad_token_id: the checkpoint's own, which pooling depends on.
        max_input_tokens: longest sequence that will be scored.
        taps: where states can be read.
        reads_token_types: whether sequences may have token types, which only the padded path reads.
        texts: texts as they are served, with the inputs of the tokenizer's own call, which plain transformers gets.

    Raises:
        InvarianceError: batch-invariant rewards are requested, and no forward path gives them.
        ParityError: no forward path agrees with plain transformers.
        SettingsError: a setting does not fit this machine or this model, or a tap is deeper than the model.
    """
    enable_huge_pages()
    config = read_config(folder)
    description = resolve_description(folder, read_description(folder), config, model)
    pooling = resolve_pooling(description, model.pooling)
    plan = plan_engine(
        model.model_copy(update={"pooling": pooling}),
        batching,
        Machine.detect(model),
        config,
        pad_token_id=pad_token_id,
        max_input_tokens=max_input_tokens,
        taps=taps,
    )
    _prepare_process(plan)
    kernels = _find_kernels(plan)
    classifier = load_classifier(
        folder,
        dtype=plan.dtype,
        device=plan.device,
        pooling=plan.pooling,
        pad_token_id=pad_token_id,
        description=description,
    )
    classifier = replace(classifier, reads_token_types=reads_token_types)
    check_taps(classifier.body, classifier.config.num_hidden_layers, plan.taps)
    path, evidence = _probe(plan, classifier, kernels, texts)
    if kernels is not None:
        _finish_kernels(plan, classifier, path)
    evidence = replace(evidence, cuda_graph_failure=_record_graphs(plan, classifier, path, evidence.parity))
    info = _describe(plan, classifier, path, evidence)
    return TorchEngine(path, info, deterministic=plan.deterministic, rope_length_limit=plan.rope_length_limit)


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What was measured while the engine was loaded; see ``EngineInfo``."""

    parity: Parity
    quantization_error: dict[str, float | int]
    batch_invariance: dict[str, int]
    cuda_graph_failure: str = ""


def _prepare_process(plan: EnginePlan) -> None:
    """Set what torch and the allocator share in this process.

    Raises:
        SettingsError: compiled blocks are requested, and there is no compiler.
    """
    if plan.device.type == "cpu":
        retain_freed_memory()
    torch.set_num_threads(plan.num_threads)
    if plan.fastest_path.compiled:
        check_compiler(plan.device)
    if plan.batch_invariant and plan.device.type == "cuda":
        forbid_reduced_reductions()


def _find_kernels(plan: EnginePlan) -> Kernels | None:
    """Return the CPU kernels that the plan allows and this machine has; logs what passes run on, and why.

    Raises:
        SettingsError: the plan requires them, and this machine has none.
    """
    kernels: Kernels | None
    if plan.kernels == "int8":
        kernels, reason = choice.int8_kernels(plan.device, plan.dtype), ""
    else:
        kernels, reason = choice.kernels_for(plan.kernels, plan.device, plan.dtype)
    is_slow = kernels is None and plan.kernels == "auto" and choice.would_gain(plan.device, plan.dtype)
    logger.log(logging.WARNING if is_slow else logging.INFO, "%s", plan.explain(kernels, reason))
    return kernels


def _probe(
    plan: EnginePlan, classifier: Classifier, kernels: Kernels | None, texts: Sequence[TextProbe]
) -> tuple[ForwardPath, _Evidence]:
    """Quantize the classifier as planned, and return the path that serves it with what was measured.

    Raises:
        InvarianceError: batch-invariant rewards are requested, and no path gives them.
        ParityError: no path agrees with plain transformers.
        SettingsError: the model or the machine cannot be quantized.
    """
    if plan.quantization == "fp8":
        check_float8(plan.device, classifier.dtype)
    texts = [text for text in texts if len(text.row) <= plan.max_shared_pass_tokens]
    probes = [*probes_for(classifier, plan.max_shared_pass_tokens), *(text.row for text in texts)]
    plain = plain_outputs(classifier, probes)
    error: dict[str, float | int] = {}
    if plan.quantization != "none":
        _quantize(classifier, plan.quantization)
        unquantized, plain = plain, plain_outputs(classifier, probes)
        error = quantization_error(unquantized, plain)
    reference = reference_of(classifier, probes, plain).with_texts(plain_outputs_of_texts(classifier, texts))
    invariance = _invariance_probe(plan, probes) if plan.batch_invariant else None
    path, parity = choose_path(classifier, plan.candidates(kernels), reference, invariance)
    return path, _Evidence(parity, error, _invariance_found(classifier, invariance))


def _invariance_probe(plan: EnginePlan, probes: Sequence[tuple[int, ...]]) -> InvarianceProbe:
    return InvarianceProbe(probes, plan.max_shared_pass_tokens, FILL_TOKENS[plan.device.type])


def _invariance_found(classifier: Classifier, invariance: InvarianceProbe | None) -> dict[str, int]:
    if invariance is None:
        return {}
    module = classifier.multiplied_together
    return {**invariance.evidence, "min_block_rows": smallest_blocks(module, packed_layers(module))}


def _quantize(classifier: Classifier, quantization: Literal["fp8", "int8"]) -> None:
    {"fp8": quantize_float8, "int8": quantize_int8}[quantization](classifier.body)


def _finish_kernels(plan: EnginePlan, classifier: Classifier, path: ForwardPath) -> None:
    """Free the weights that a path on the CPU kernels has packed; log where the model does not run on them.

    Raises:
        SettingsError: the plan requires the kernels.
    """
    if path.kernels is not None:
        drop_plain_weights(classifier.body)
    elif plan.kernels == "auto":
        logger.warning("%s does not run on the CPU kernels.", classifier.architecture)
    else:
        setting = "quantization is int8" if plan.kernels == "int8" else "kernels is on"
        raise SettingsError(f"model.{setting}, but {classifier.architecture} does not run on the CPU kernels")


def _record_graphs(plan: EnginePlan, classifier: Classifier, path: ForwardPath, parity: Parity) -> str:
    """Let the path replay short batches from CUDA graphs, where planned; return why it does not, else nothing."""
    num_parameters = sum(weight.numel() for weight in classifier.model.parameters())
    if not resolve_graphs(plan.cuda_graphs, plan.device, num_parameters, deterministic=plan.deterministic):
        return ""
    if not isinstance(path, PackedForward):
        return f"{path.name} batches have no fixed shapes"
    if classifier.gate_pattern:
        return "the gate of the head reads a further token"
    if plan.rope_length_limit is not None:
        return "the rotary frequencies depend on the longest sequence of a pass"
    path.library, failure = record_library(
        classifier,
        lambda rows: path.run(rows).at_pooled,
        plan.batch_tokens_on(path.kernels),
        0.0 if plan.batch_invariant else parity.tolerance,
        partial(capture_graphs, batch_invariant=plan.batch_invariant),
    )
    return failure


def _describe(plan: EnginePlan, classifier: Classifier, path: ForwardPath, evidence: _Evidence) -> EngineInfo:
    return EngineInfo(
        engine="torch",
        architecture=classifier.architecture,
        forward=path.name,
        device=str(classifier.device),
        dtype=str(classifier.dtype).removeprefix("torch."),
        cost=path.cost,
        max_input_tokens=plan.max_input_tokens,
        max_batch_tokens=plan.batch_tokens_on(path.kernels),
        parity=asdict(evidence.parity),
        taps=plan.taps,
        min_shared_prefix_tokens=path.min_shared_prefix_tokens,
        compiled=plan.fastest_path.compiled,
        kernels=path.kernels.name if path.kernels else None,
        prefix_cache_mib=plan.fastest_path.cache_bytes // 2**20 if path.caches_prefixes else 0,
        async_launch=plan.device.type == "cuda" and isinstance(path, LaunchingPath) and not path.caches_prefixes,
        cuda_graph_max_tokens=path.library.max_tokens if isinstance(path, PackedForward) else 0,
        cuda_graph_failure=evidence.cuda_graph_failure,
        cascade_attention=plan.fastest_path.cascade and path.min_shared_prefix_tokens is not None,
        batch_invariance=evidence.batch_invariance,
        attention_heads=getattr(classifier.config, "num_attention_heads", None),
        outputs=classifier.outputs,
        gate_pattern=classifier.gate_pattern,
        reads_steps=classifier.state_head is not None,
        quantization=plan.quantization,
        quantization_error=evidence.quantization_error,
    )
