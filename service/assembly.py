"""Builds what one replica serves from its settings: checkpoint, tokenization, engine, pipeline, scorer.

The one place that knows how the parts fit together; it starts nothing and answers nobody. Torch is imported only on the
way to an engine.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any

from reward_client.provenance import Origin, read_origin

from service.checkpoints.bundle import Bundle, is_bundle, open_bundle, read_manifest
from service.checkpoints.checkpoint import Checkpoint, locate_checkpoint, model_version, open_checkpoint
from service.diagnostics.calibration import Calibration
from service.diagnostics.diagnosis import Diagnostician
from service.diagnostics.lookup import Lookup, binding_of, find_calibration, without_calibration
from service.diagnostics.monitors.monitor import Monitors
from service.diagnostics.monitors.publisher import watch_stream
from service.engines.base import Engine, EngineInfo
from service.errors import SettingsError
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.records import Encoding, ModelIdentity, StateTap
from service.scorer import Scorer
from service.settings import ModelSettings, Settings
from service.tokenization import Tokenization

ORACLE_INPUT_TOKENS = 4096
ORACLE_BATCH_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with everything that answers for it. The scorer is started and stopped by whoever holds this."""

    settings: Settings
    identity: ModelIdentity
    info: EngineInfo
    checkpoint: Checkpoint | None
    tokenization: Tokenization
    scorer: Scorer
    metrics: Metrics
    monitors: Monitors
    lookup: Lookup

    @property
    def origin(self) -> Origin | None:
        """What the model was initialised from, as its manifest says; None where it brings none."""
        return read_origin(self.checkpoint.path) if self.checkpoint else None

    def description(self) -> dict[str, Any]:
        """Say what is served and how, JSON-ready, for ``/v1/model``."""
        settings = self.settings
        return {
            "model": {"name": self.identity.name, "version": self.identity.version},
            "revision": settings.code_revision,
            "engine": asdict(self.info),
            "activation": "none",
            "pooling": settings.model.pooling,
            "template": self.tokenization.template_for(Encoding()),
            "truncation": settings.tokenization.truncation,
            "diagnostics": settings.diagnostics.level,
            "calibration": self.lookup.description(),
            "deterministic": settings.batching.deterministic,
            "sample_token_ids": list(self.tokenization.sample_token_ids),
            "limits": {**settings.limits.model_dump(), "max_input_tokens": self.info.max_input_tokens},
            "initialised_from": asdict(self.origin) if self.origin else None,
            "sha256": asdict(self.checkpoint.hashes) if self.checkpoint else {},
            "notes": list(self.checkpoint.notes) if self.checkpoint else [],
        }


def assemble(settings: Settings, *, taps: tuple[StateTap, ...] | None = None) -> ServedModel:
    """Load the model that the settings name and put its parts together; nothing runs yet.

    Args:
        settings: of everything.
        taps: where to read states for a calibration that is being made; None: where the model's own calibration does.

    Raises:
        StartupError: the checkpoint is refused, no forward path agrees with plain transformers, or a setting does not
            fit the model or the machine.
    """
    if settings.model.engine == "oracle":
        return _assemble_oracle(settings)
    with ThreadPoolExecutor(1, thread_name_prefix="assemble") as apart:
        # OpenMP keeps a team of threads for each thread that has ever computed, for as long as that one lives. With the
        # loader's beside the engine's there are more of them than cores, and both sleep between kernels instead of
        # spinning: a third of the throughput of a small model, measured on two cores.
        return apart.submit(_assemble_model, settings, taps).result()


def judge(settings: ModelSettings) -> Checkpoint:
    """Find the checkpoint that the settings name and judge it without loading the model.

    Raises:
        CheckpointError: it is not there, or cannot be trusted.
        SettingsError: the chosen engine does not run it.
    """
    opened = _open(settings)
    return opened.checkpoint if isinstance(opened, Bundle) else opened


def needs_gpu(settings: ModelSettings, folder: Path) -> bool:
    """Tell whether the judged folder will be run on a GPU.

    Raises:
        SettingsError: the device that the settings name is not there, or cannot run it.
    """
    from service.engines.devices.device import resolve_device
    from service.engines.onnx import resolve_bundle_device

    if is_bundle(folder):
        return resolve_bundle_device(read_manifest(folder).precision, settings.device) != "cpu"
    return resolve_device(settings.device).type == "cuda"


def _open(settings: ModelSettings) -> Checkpoint | Bundle:
    folder = locate_checkpoint(settings)
    if is_bundle(folder):
        if settings.engine == "torch":
            raise SettingsError(f"{folder} is an ONNX bundle: leave model.engine out, or serve the checkpoint itself.")
        if settings.quantization != "none":
            raise SettingsError(
                f"model.quantization is {settings.quantization}, but {folder} is an ONNX bundle, whose precision was "
                "chosen when it was exported: leave it out, or serve the checkpoint itself."
            )
        return open_bundle(folder, settings)
    if settings.engine == "onnx":
        raise SettingsError(
            f"model.engine is onnx, but {folder} is no ONNX bundle: run `reward-export {settings.path or 'demo'} OUT` "
            "and serve OUT."
        )
    return open_checkpoint(folder, settings)


def _assemble_oracle(settings: Settings) -> ServedModel:
    from service.engines.oracle import OracleEngine, byte_tokenizer

    max_input_tokens = settings.model.max_input_tokens or ORACLE_INPUT_TOKENS
    engine = OracleEngine(
        max_input_tokens=max_input_tokens,
        max_batch_tokens=settings.batching.max_batch_tokens or ORACLE_BATCH_TOKENS,
    )
    tokenizer = byte_tokenizer(max_input_tokens)
    tokenization = Tokenization(
        tokenizer, settings.tokenization, max_input_tokens=max_input_tokens, vocab_size=len(tokenizer)
    )
    identity = ModelIdentity(settings.model.name or "oracle", "oracle")
    return _join(settings, identity, None, tokenization, engine, without_calibration("The oracle has no states."))


def _assemble_model(settings: Settings, taps: tuple[StateTap, ...] | None) -> ServedModel:
    opened = _open(settings.model)
    checkpoint = opened.checkpoint if isinstance(opened, Bundle) else opened
    tokenization = Tokenization(
        checkpoint.tokenizer,
        settings.tokenization,
        max_input_tokens=checkpoint.max_input_tokens,
        vocab_size=checkpoint.embedding_size,
    )
    template = tokenization.template_for(Encoding())
    if taps is None:
        binding = binding_of(checkpoint, pooling=settings.model.pooling, template=template)
        lookup = find_calibration(checkpoint.path, settings.diagnostics.calibration, binding)
    else:
        lookup = without_calibration("A calibration is being made.")
    if isinstance(opened, Bundle):
        from service.engines.onnx import load_onnx_engine

        engine: Engine = load_onnx_engine(opened, settings.model, settings.batching, taps=taps)
    else:
        from service.engines.torch import load_torch_engine

        engine = load_torch_engine(
            checkpoint.path,
            settings.model,
            settings.batching,
            pad_token_id=checkpoint.pad_token_id,
            max_input_tokens=checkpoint.max_input_tokens,
            taps=lookup.taps if taps is None else taps,
        )
    arithmetic = opened.arithmetic if isinstance(opened, Bundle) else engine.info.arithmetic
    identity = model_version(checkpoint, dtype=arithmetic, pooling=settings.model.pooling, template=template)
    return _join(settings, identity, checkpoint, tokenization, engine, lookup)


def _join(
    settings: Settings,
    identity: ModelIdentity,
    checkpoint: Checkpoint | None,
    tokenization: Tokenization,
    engine: Engine,
    lookup: Lookup,
) -> ServedModel:
    info = engine.info
    lookup = lookup.checked(info.taps, arithmetic_of(info))
    calibration = lookup.calibration
    metrics = Metrics()
    metrics.describe_model(identity, checkpoint.hashes.weights if checkpoint else "", info.dtype, info.device)
    metrics.describe_build(distribution_version("reward-service"), settings.code_revision)
    if calibration is not None:
        _describe_calibration(metrics, calibration)
    monitors = watch_stream(metrics, calibration.monitors if calibration else None, settings.monitors)
    special_ids = frozenset(checkpoint.tokenizer.all_special_ids) if checkpoint else frozenset()
    diagnostician = Diagnostician(calibration, special_ids, settings.diagnostics.alpha, info.taps)
    scorer = Scorer(
        tokenization,
        Pipeline(engine, diagnostician),
        settings.limits,
        settings.batching,
        metrics,
        monitors=monitors,
        num_tokenizer_threads=settings.tokenization.num_threads,
    )
    return ServedModel(settings, identity, info, checkpoint, tokenization, scorer, metrics, monitors, lookup)


def _describe_calibration(metrics: Metrics, calibration: Calibration) -> None:
    facts = calibration.facts
    created_s = datetime.fromisoformat(facts["created"]).timestamp()
    metrics.describe_calibration(calibration.id, facts["num_conformal"], facts["num_prompts"], created_s)


def arithmetic_of(info: EngineInfo) -> dict[str, str]:
    """Return what of the engine moves rewards and states by rounding only; a calibration remembers it."""
    return {"engine": info.engine, "dtype": info.arithmetic, "forward": info.forward}
