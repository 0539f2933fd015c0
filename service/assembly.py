"""Builds the parts of one replica from its settings: checkpoint, tokenization, engine, pipeline, scorer.

The only module that joins these parts; it starts no thread that outlives it. Torch is imported only where an engine
needs it.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_client.provenance import Origin, read_origin

from service.checkpoints.bundle import Bundle, is_bundle, open_bundle, read_manifest
from service.checkpoints.checkpoint import Checkpoint, locate_checkpoint, model_version, open_checkpoint
from service.diagnostics.calibration import Calibration
from service.diagnostics.diagnosis import Diagnostician
from service.diagnostics.lookup import Lookup, binding_of, find_calibration, without_calibration
from service.diagnostics.monitors.drift_monitor import UNCALIBRATED, DriftSubject
from service.diagnostics.monitors.monitor import Monitors
from service.diagnostics.monitors.publisher import watch_stream
from service.engines.base import Engine, EngineInfo
from service.errors import CheckpointError, SettingsError, StartupError
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.records import Encoding, ModelIdentity, StateTap
from service.reward_rule import RewardRule
from service.scorer import Scorer
from service.settings import ModelSettings, Settings, TokenizationSettings, name_as_given
from service.steps import PLAIN_READING, StepReading
from service.tokenization import Tokenization

if TYPE_CHECKING:
    from service.engines.oracle import OracleFaults

logger = logging.getLogger(__name__)

ORACLE_INPUT_TOKENS = 4096
ORACLE_BATCH_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A validated checkpoint folder, whose weights are not loaded yet."""

    checkpoint: Checkpoint

    bundle: Bundle | None = None
    """The ONNX bundle in the folder; None: it holds a checkpoint for the torch engine."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with all parts that serve it. The caller starts and stops the scorer."""

    settings: Settings
    identity: ModelIdentity
    info: EngineInfo

    checkpoint: Checkpoint | None
    """None for the oracle."""

    tokenization: Tokenization
    scorer: Scorer
    metrics: Metrics
    monitors: Monitors

    lookup: Lookup
    """The calibration, or why there is none."""

    @property
    def rule(self) -> RewardRule:
        """How the outputs of the model become a reward."""
        return self.scorer.pipeline.rule

    @property
    def origin(self) -> Origin | None:
        """What the model was initialised from, according to its manifest; None where it has none."""
        return read_origin(self.checkpoint.path) if self.checkpoint else None

    @property
    def build(self) -> str:
        """Model version and code: replicas of one build give the same rewards and read each other's messages."""
        code = f"{distribution_version('reward-service')}+{self.settings.code_revision}"
        return f"{self.identity.version} {code}"

    def description(self) -> dict[str, Any]:
        """Return what is served and how, as JSON-ready values for ``/v1/model``."""
        settings = self.settings
        return {
            "model": {"name": self.identity.name, "version": self.identity.version},
            "code_revision": settings.code_revision,
            "engine": asdict(self.info),
            "activation": "none",
            "pooling": self.checkpoint.pooling if self.checkpoint else settings.model.pooling or "hf",
            "reward_model": self.checkpoint.description.as_json()
            if self.checkpoint and self.checkpoint.description
            else None,
            "reward_rule": self.rule.description(),
            "steps": self.tokenization.step_description() | {"aggregate": self.rule.step_aggregate},
            "template": self.tokenization.template_for(Encoding()),
            "text_rule": self.tokenization.rule.description(),
            "truncation": settings.tokenization.truncation,
            "diagnostics": settings.diagnostics.level,
            "calibration": self.lookup.description(),
            "deterministic": settings.batching.deterministic,
            "batch_invariant": settings.batching.batch_invariant,
            "sample_token_ids": list(self.tokenization.sample_token_ids),
            "limits": {**settings.limits.model_dump(), "max_input_tokens": self.info.max_input_tokens},
            "stored_quantization": self.checkpoint.stored_quantization if self.checkpoint else None,
            "initialised_from": asdict(self.origin) if self.origin else None,
            "sha256": asdict(self.checkpoint.hashes) if self.checkpoint else {},
            "notes": list(self.checkpoint.notes) if self.checkpoint else [],
            "audit_url": settings.page.audit_url,
        }

    @property
    def summary(self) -> str:
        """What is served, as one line for the terminal."""
        info, identity = self.info, self.identity
        return (
            f"{identity.name}, version {identity.version}: engine {info.engine}, {info.forward} on {info.device}, "
            f"{info.arithmetic}"
        )


def open_model(settings: ModelSettings) -> OpenedModel:
    """Find the checkpoint that the settings name and validate it, without loading the model.

    All its files are hashed and its weights are scanned once; `assemble` takes the result and does not repeat that.

    Raises:
        CheckpointError: it does not exist, or is refused.
        SettingsError: the chosen engine does not run it.
    """
    folder = locate_checkpoint(settings)
    try:
        return _open_folder(folder, settings)
    except StartupError as error:
        raise type(error)(name_as_given(str(error), folder, settings)) from None


def _open_folder(folder: Path, settings: ModelSettings) -> OpenedModel:
    if is_bundle(folder):
        _refuse_settings_of_torch(settings, folder)
        bundle = open_bundle(folder, settings)
        reward_rule_of(bundle.checkpoint, settings)
        return OpenedModel(bundle.checkpoint, bundle)
    if settings.engine == "onnx":
        raise SettingsError(
            f"model.engine is onnx, but {folder} is not an ONNX bundle: run `reward-export {settings.path or 'demo'} "
            "OUT` and serve OUT."
        )
    checkpoint = open_checkpoint(folder, settings)
    reward_rule_of(checkpoint, settings)
    return OpenedModel(checkpoint)


def reward_rule_of(checkpoint: Checkpoint | None, settings: ModelSettings) -> RewardRule:
    """Return how the outputs of a model become a reward; the settings' weights take precedence over the checkpoint's.

    Raises:
        SettingsError: the settings' weights do not fit the model's outputs.
    """
    rule = RewardRule.of(checkpoint.description if checkpoint else None, settings.step_aggregate)
    return rule.weighted(settings.reward_weights)


def assemble(
    settings: Settings, *, taps: tuple[StateTap, ...] | None = None, opened: OpenedModel | None = None
) -> ServedModel:
    """Load the model that the settings name and assemble its parts; nothing runs yet.

    Args:
        settings: all settings.
        taps: taps at which states are read, without a calibration; None: the taps of the model's own calibration.
        opened: the result of `open_model` for the same settings; None: the checkpoint is opened here.

    Raises:
        StartupError: the checkpoint is refused, no forward path agrees with plain transformers, or a setting does not
            fit the model or the machine.
    """
    if settings.model.engine == "oracle":
        return assemble_oracle(settings)
    with ThreadPoolExecutor(1, thread_name_prefix="assemble") as loader:
        # OpenMP creates a team of threads for each thread that computes, and ends it with that thread. A team of the
        # loading thread in addition to the engine's would exceed the number of cores, and both would sleep between
        # kernels instead of spinning. That costs a third of the throughput of a small model, measured on two cores.
        return loader.submit(_assemble_model, settings, taps, opened).result()


def with_calibration(served: ServedModel, file: Path) -> ServedModel:
    """Return the model with the calibration in a file, on the same engine; use only one of the two at a time.

    Where the calibration cannot be used (for example because the engine does not read its taps), ``lookup`` has the
    reason.
    """
    diagnostics = served.settings.diagnostics.model_copy(update={"calibration": str(file)})
    settings = served.settings.model_copy(update={"diagnostics": diagnostics})
    engine = served.scorer.pipeline.engine
    if served.checkpoint is None:
        return _join(settings, served.identity, None, served.tokenization, engine, served.lookup)
    lookup = _find_calibration(settings, served.checkpoint, served.tokenization)
    return _join(settings, served.identity, served.checkpoint, served.tokenization, engine, lookup)


def step_reading_of(checkpoint: Checkpoint, *, max_steps: int, is_bundle: bool = False) -> StepReading:
    """Return how a model is read at steps."""
    refusal = ""
    if is_bundle:
        refusal = "An ONNX graph reads the head at one token of a text: serve the checkpoint itself to score steps."
    elif checkpoint.gate_pattern:
        refusal = "The head weights its objectives by the prompt of a whole text, and has no rewards of steps."
    skipped = checkpoint.pad_token_id if checkpoint.pooling == "hf" else None
    return StepReading(checkpoint.step_marker, max_steps, skipped, refusal)


def open_tokenization(
    checkpoint: Checkpoint, settings: TokenizationSettings, step_reading: StepReading = PLAIN_READING
) -> Tokenization:
    """Return the tokenization of an opened checkpoint.

    Raises:
        SettingsError, CheckpointError: see ``Tokenization``.
    """
    return Tokenization(
        checkpoint.tokenizer,
        settings,
        max_input_tokens=checkpoint.max_input_tokens,
        vocab_size=checkpoint.embedding_size,
        inputs=checkpoint.inputs,
        append_token_ids=checkpoint.append_token_ids,
        gate_pattern=checkpoint.gate_pattern,
        step_reading=step_reading,
    )


def needs_gpu(settings: ModelSettings, folder: Path) -> bool:
    """Return whether a validated folder will be run on a GPU.

    Raises:
        SettingsError: the device that the settings name does not exist, or cannot run it.
    """
    from service.engines.devices.device import resolve_device
    from service.engines.onnx import resolve_bundle_device

    if is_bundle(folder):
        return resolve_bundle_device(read_manifest(folder).precision, settings.device) != "cpu"
    return resolve_device(settings.device).type == "cuda"


def _refuse_settings_of_torch(settings: ModelSettings, folder: Path) -> None:
    if settings.engine == "torch":
        raise SettingsError(f"{folder} is an ONNX bundle: leave model.engine out, or serve the checkpoint itself.")
    if settings.quantization != "none":
        raise SettingsError(
            f"model.quantization is {settings.quantization}, but {folder} is an ONNX bundle, whose precision was "
            "chosen when it was exported: leave it out, or serve the checkpoint itself."
        )


def assemble_oracle(settings: Settings, *, salt: str = "", faults: OracleFaults | None = None) -> ServedModel:
    """Assemble the parts that serve the oracle.

    Args:
        settings: all settings; those of checkpoints have no effect.
        salt: of the rewards; the model version names it.
        faults: faults and delays, for tests and simulations; None: none.
    """
    from service.engines.oracle import OracleEngine, byte_tokenizer

    max_input_tokens = settings.model.max_input_tokens or ORACLE_INPUT_TOKENS
    engine = OracleEngine(
        salt=salt,
        faults=faults,
        max_input_tokens=max_input_tokens,
        max_batch_tokens=settings.batching.max_batch_tokens or ORACLE_BATCH_TOKENS,
    )
    tokenizer = byte_tokenizer(max_input_tokens)
    tokenization = Tokenization(
        tokenizer,
        settings.tokenization,
        max_input_tokens=max_input_tokens,
        vocab_size=len(tokenizer),
        step_reading=StepReading(max_steps=settings.limits.max_item_steps),
    )
    identity = ModelIdentity(settings.model.name or "oracle", f"oracle-{salt}" if salt else "oracle")
    return _join(settings, identity, None, tokenization, engine, without_calibration("The oracle has no states."))


def _assemble_model(settings: Settings, taps: tuple[StateTap, ...] | None, opened: OpenedModel | None) -> ServedModel:
    from service.engines.devices.device import enable_huge_pages

    enable_huge_pages()
    opened = opened or open_model(settings.model)
    checkpoint = opened.checkpoint
    step_reading = step_reading_of(
        checkpoint, max_steps=settings.limits.max_item_steps, is_bundle=opened.bundle is not None
    )
    tokenization = open_tokenization(checkpoint, settings.tokenization, step_reading)
    logger.info("%s", tokenization.rule.sentence)
    if taps is None:
        lookup = _find_calibration(settings, checkpoint, tokenization)
    else:
        lookup = without_calibration("No calibration was searched for, because states are read at other taps.")
    engine = _load_engine(settings, opened, taps, lookup, tokenization)
    identity = model_version(
        checkpoint,
        dtype=engine.info.arithmetic if opened.bundle is None else opened.bundle.arithmetic,
        template=tokenization.rule.name,
        reward_weights=settings.model.reward_weights,
        step_aggregate=settings.model.step_aggregate,
    )
    return _join(settings, identity, checkpoint, tokenization, engine, lookup)


def _load_engine(
    settings: Settings,
    opened: OpenedModel,
    taps: tuple[StateTap, ...] | None,
    lookup: Lookup,
    tokenization: Tokenization,
) -> Engine:
    if opened.bundle is not None:
        if tokenization.reads_token_types:
            raise CheckpointError(
                f"{opened.checkpoint.path} is an ONNX bundle, which reads no token types, but its model reads pairs of "
                "texts with them: serve the checkpoint itself."
            )
        from service.engines.onnx import load_onnx_engine

        return load_onnx_engine(opened.bundle, settings.model, settings.batching, taps=taps)
    from service.engines.torch import load_torch_engine

    return load_torch_engine(
        opened.checkpoint.path,
        settings.model,
        settings.batching,
        pad_token_id=opened.checkpoint.pad_token_id,
        max_input_tokens=opened.checkpoint.max_input_tokens,
        taps=lookup.taps if taps is None else taps,
        reads_token_types=tokenization.reads_token_types,
        texts=tokenization.probes(),
    )


def _find_calibration(settings: Settings, checkpoint: Checkpoint, tokenization: Tokenization) -> Lookup:
    binding = binding_of(checkpoint, template=tokenization.rule.name, reward_weights=settings.model.reward_weights)
    return find_calibration(checkpoint.path, settings.diagnostics.calibration, binding)


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
    subject = UNCALIBRATED
    if calibration is not None:
        subject = DriftSubject.of(calibration.states.taps, calibration.drift, settings.monitors.drift_prompts)
    monitors = watch_stream(metrics, calibration.monitors if calibration else None, settings.monitors, subject)
    special_ids = frozenset(checkpoint.tokenizer.all_special_ids) if checkpoint else frozenset()
    diagnostician = Diagnostician(calibration, special_ids, settings.diagnostics.alpha, info.taps)
    scorer = Scorer(
        tokenization,
        Pipeline(engine, diagnostician, rule=reward_rule_of(checkpoint, settings.model)),
        settings.limits,
        settings.batching,
        metrics,
        monitors=monitors,
        num_tokenizer_threads=settings.tokenization.num_threads,
    )
    return ServedModel(settings, identity, info, checkpoint, tokenization, scorer, metrics, monitors, lookup)


def _describe_calibration(metrics: Metrics, calibration: Calibration) -> None:
    facts = calibration.facts
    created_s = datetime.fromisoformat(facts.created).timestamp()
    metrics.describe_calibration(calibration.id, facts.num_calibrate, facts.num_prompts, created_s)


def arithmetic_of(info: EngineInfo) -> dict[str, str]:
    """Return the properties of the engine that affect rewards by rounding only; a calibration stores them."""
    return {"engine": info.engine, "dtype": info.arithmetic, "forward": info.forward}
