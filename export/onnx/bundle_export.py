"""Exports a valid checkpoint to an ONNX bundle and compares it with plain transformers.

The bundle's folder is created by one rename, after the comparison, whose result is in the manifest. The other modules
of this package trace, quantize and compare the graph.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from reward_client.provenance import TRAINING_MANIFEST_FILE

from export.onnx.probe_texts import MAX_TOKENS, built_in_items, encode_items, read_items
from export.onnx.reward_comparison import BOUNDS, Bounds, compare_rewards, validate_parity
from service.checkpoints.bundle import (
    FORMAT_VERSION,
    ExportParity,
    Manifest,
    Precision,
    Probe,
    hash_bundle_files,
    open_bundle,
    write_manifest,
)
from service.checkpoints.checkpoint import Checkpoint, locate_checkpoint, open_checkpoint
from service.checkpoints.demo import PROVENANCE_FILE
from service.checkpoints.files import BUNDLE_MANIFEST_FILE, CALIBRATION_FILE, CONFIG_FILE
from service.checkpoints.reward_description import DESCRIPTION_FILE
from service.console import Stage
from service.diagnostics.candidate_taps import candidate_taps
from service.engines.base import Engine
from service.errors import CheckpointError, NonFiniteReward, ParityError
from service.offline import score_offline
from service.outputs import check_output_folder, new_folder
from service.pipeline import Pipeline
from service.records import Score, StateTap, TokenSequence
from service.settings import BatchingSettings, ModelSettings, TokenizationSettings
from service.tokenization import Tokenization

COPIED_PATTERNS = (
    CONFIG_FILE,
    DESCRIPTION_FILE,
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    TRAINING_MANIFEST_FILE,
    PROVENANCE_FILE,
)
"""Files that are copied unchanged: saving a tokenizer again could change its token ids."""
LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
MAX_PROBE_TOKENS = 256
"""No recorded probe is longer, because the engine computes all probes at every start."""

CHANNEL_TEXT_STEP = 4
"""Every fourth built-in text is used to measure channel magnitudes (SmoothQuant)."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The options of an export."""

    precision: Precision = "fp32"

    taps: tuple[StateTap, ...] | None = None
    """Where the graph outputs hidden states; None: at all taps from which a calibration chooses."""

    items: Path | None = None
    """Data file of the texts to compare on; None: the built-in texts."""

    bounds: Bounds | None = None
    """Limits of the comparison; None: those of the precision."""

    max_input_tokens: int | None = None
    """Tokens of the longest text that may be scored; None: the checkpoint's limit."""


def export_bundle(
    source: str, out: Path, plan: ExportPlan, stage: Stage = lambda _: None, *, overwrite: bool = False
) -> Manifest:
    """Export a checkpoint to an ONNX bundle in ``out``; nothing is written unless the comparison passes.

    Args:
        source: a checkpoint folder, a PEFT adapter with a scalar head, a hub id, or ``demo``.
        out: a folder that does not exist or is empty.
        plan: the options of the export.
        stage: called with the name of each stage.
        overwrite: replace an earlier bundle in ``out``.

    Raises:
        CheckpointError: the checkpoint is refused, or torch cannot trace the architecture.
        OutputError: ``out`` is not empty, or cannot be written.
        DatasetError: the items cannot be read.
        ParityError: the graph's rewards are not those of plain transformers.
    """
    check_output_folder(out, overwrite=overwrite, marker=BUNDLE_MANIFEST_FILE)
    settings = ModelSettings(path=source, max_input_tokens=plan.max_input_tokens)
    stage("Validating the checkpoint")
    checkpoint = open_checkpoint(locate_checkpoint(settings), settings)
    with new_folder(out, overwrite=overwrite, marker=BUNDLE_MANIFEST_FILE) as unfinished:
        return _build_bundle(unfinished, checkpoint, plan, stage)


def _build_bundle(folder: Path, checkpoint: Checkpoint, plan: ExportPlan, stage: Stage) -> Manifest:
    from export.onnx.graph import OPSET
    from service.engines.onnx import load_onnx_engine

    sequences = _sequences(checkpoint, plan)
    stage(f"Computing the rewards of {len(sequences)} texts with plain transformers")
    has_linear_head, reference = _reference(checkpoint, sequences)
    taps = candidate_taps(checkpoint.config.get_text_config().num_hidden_layers) if plan.taps is None else plan.taps
    stage("Tracing the model, which takes minutes for many layers")
    _write_graph(folder, checkpoint, plan, taps)
    _copy_files(checkpoint.path, folder)
    items = plan.items.name if plan.items else "built-in"
    draft = Manifest(
        format_version=FORMAT_VERSION,
        name=checkpoint.name,
        precision=plan.precision,
        architecture=checkpoint.architecture,
        checkpoint_sha256=checkpoint.hashes,
        num_parameters=checkpoint.num_parameters,
        stored_dtype=checkpoint.dtype,
        has_linear_head=has_linear_head,
        embedding_size=checkpoint.embedding_size,
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
        opset_version=OPSET,
        library_versions=_library_versions(),
        taps=taps,
        parity=ExportParity(0.0, 0.0, 0.0, 0.0, 0, items),
        probes=(),
        probe_tolerance=0.0,
        files=hash_bundle_files(
            folder, sorted(file.name for file in folder.iterdir() if file.name != CALIBRATION_FILE)
        ),
    )
    write_manifest(folder, draft)
    stage(f"Comparing the graph on {len(sequences)} texts")
    settings = ModelSettings(path=str(folder), device="auto")
    engine = load_onnx_engine(open_bundle(folder, settings), settings, BatchingSettings(), check=False)
    outputs = score(engine, sequences)
    parity = _compare_outputs(outputs, reference, items, plan.bounds or BOUNDS[plan.precision])
    manifest = replace(
        draft,
        parity=parity,
        probes=choose_probes(sequences, outputs),
        probe_tolerance=max(probe_tolerance(plan.precision, one) for one in zip(*reference, strict=True)),
    )
    engine.close()
    write_manifest(folder, manifest)
    return manifest


def _sequences(checkpoint: Checkpoint, plan: ExportPlan) -> list[TokenSequence]:
    tokenization = Tokenization(
        checkpoint.tokenizer,
        TokenizationSettings(),
        max_input_tokens=min(checkpoint.max_input_tokens, MAX_TOKENS),
        vocab_size=checkpoint.embedding_size,
        append_token_ids=checkpoint.append_token_ids,
        inputs=checkpoint.inputs,
    )
    if tokenization.reads_token_types:
        raise CheckpointError(
            f"{checkpoint.path} reads pairs of texts with token types, which ONNX bundles do not have: serve the "
            "checkpoint itself."
        )
    return encode_items(read_items(plan.items) if plan.items else built_in_items(), tokenization)


def _compare_outputs(
    outputs: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], text_source: str, bounds: Bounds
) -> ExportParity:
    """Compare each output by itself, and return the largest differences and the lowest agreement.

    Raises:
        ParityError: an output is outside the bounds.
    """
    compared = []
    for found, plain in zip(zip(*outputs, strict=True), zip(*reference, strict=True), strict=True):
        compared.append(compare_rewards(found, plain, text_source))
        validate_parity(compared[-1], bounds, plain)
    return replace(
        compared[0],
        max_difference=max(one.max_difference for one in compared),
        mean_difference=max(one.mean_difference for one in compared),
        spearman=min(one.spearman for one in compared),
        pair_agreement=min(one.pair_agreement for one in compared),
    )


def _reference(checkpoint: Checkpoint, sequences: Sequence[TokenSequence]) -> tuple[bool, list[list[float]]]:
    """Return whether the head reads one state, and the outputs of plain transformers in fp32, one text at a time."""
    from service.engines.parity import plain_outputs

    classifier = _load(checkpoint, "float32")
    return classifier.state_head is not None, plain_outputs(classifier, [tokens.token_ids for tokens in sequences])


def _write_graph(folder: Path, checkpoint: Checkpoint, plan: ExportPlan, taps: tuple[StateTap, ...]) -> None:
    from export.onnx.graph import write_graph
    from export.onnx.quantization import quantize_graph
    from service.engines.deduplication import Reading
    from service.engines.onnx import Padding

    write_graph(_load(checkpoint, "float16" if plan.precision == "fp16" else "float32"), taps, folder)
    if plan.precision != "int8":
        return
    padding = Padding(
        pooling=checkpoint.pooling,
        pad_token_id=checkpoint.pad_token_id,
        reads_first=False,
        gate_pattern=checkpoint.gate_pattern,
    )
    feeds = (padding.feed([Reading(tokens.token_ids, 0)]) for tokens in _channel_texts(checkpoint))
    if not quantize_graph(folder, feeds):
        raise CheckpointError(f"The graph of {checkpoint.architecture} has no matrix product that can be quantized.")


def _channel_texts(checkpoint: Checkpoint) -> list[TokenSequence]:
    """Return the texts on which channel magnitudes are measured: built-in ones, also if others are compared."""
    short = [tokens for tokens in _sequences(checkpoint, ExportPlan()) if tokens.num_tokens <= MAX_PROBE_TOKENS]
    return short[::CHANNEL_TEXT_STEP]


def _load(checkpoint: Checkpoint, dtype: str) -> Any:
    import torch

    from service.engines.model.classifier import load_classifier
    from service.engines.model.rotary import rope_length_limit

    if rope_length_limit(checkpoint.config.get_text_config(), checkpoint.max_input_tokens) is not None:
        raise CheckpointError(
            f"{checkpoint.architecture} has other rotary frequencies for long texts, which a graph cannot select: "
            "lower --max-input-tokens to the limit of the short ones, or serve the checkpoint with the torch engine."
        )
    return load_classifier(
        checkpoint.path,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
        pooling=checkpoint.pooling,
        pad_token_id=checkpoint.pad_token_id,
        description=checkpoint.description,
    )


def _copy_files(source: Path, folder: Path) -> None:
    for pattern in (*COPIED_PATTERNS, CALIBRATION_FILE):
        for file in sorted(source.glob(pattern)):
            shutil.copy(file, folder)


def _library_versions() -> dict[str, str]:
    import onnxruntime

    return {name: onnxruntime.__version__ if name == "onnxruntime" else version(name) for name in LIBRARIES}


def score(engine: Engine, sequences: Sequence[TokenSequence]) -> list[tuple[float, ...]]:
    """Return the outputs of the sequences, in order; NaN where one is not finite.

    Raises:
        ParityError: the graph does not run on a sequence.
    """
    names = engine.info.outputs
    outputs = [(math.nan,) * len(names)] * len(sequences)
    for index, outcome in score_offline(Pipeline(engine), sequences):
        if isinstance(outcome, Score):
            outputs[index] = outcome.outputs or (math.nan if outcome.reward is None else outcome.reward,)
        elif not isinstance(outcome, NonFiniteReward):
            raise ParityError(f"The graph does not run on a text of {sequences[index].num_tokens} tokens: {outcome}")
    return outputs


def choose_probes(
    sequences: Sequence[TokenSequence], outputs: Sequence[Sequence[float]], count: int = 8
) -> tuple[Probe, ...]:
    """Return some of the texts with their outputs, evenly spaced by length up to `MAX_PROBE_TOKENS` tokens."""
    by_length = sorted(range(len(sequences)), key=lambda index: sequences[index].num_tokens)
    short = [index for index in by_length if sequences[index].num_tokens <= MAX_PROBE_TOKENS] or by_length[:1]
    chosen = dict.fromkeys(short[int(rank)] for rank in np.linspace(0, len(short) - 1, count))
    return tuple(_probe(sequences[index], outputs[index]) for index in chosen)


def _probe(sequence: TokenSequence, outputs: Sequence[float]) -> Probe:
    return Probe(sequence.token_ids, outputs[0], tuple(outputs) if len(outputs) > 1 else ())


def probe_tolerance(precision: Precision, reference: Sequence[float]) -> float:
    """Return the accepted change of a recorded reward on another machine: rounding, or 5 percent of the deviation."""
    if precision == "fp32":
        return 1e-4 * max(1.0, *(abs(reward) for reward in reference))
    return 0.05 * float(np.std(reference))
