"""Builds what one replica serves from its settings: checkpoint, tokenization, engine, pipeline, scorer.

The one place that knows how the parts fit together; it starts nothing and answers nobody. Torch is imported only on the
way to a torch engine.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version as distribution_version
from typing import Any

from service.checkpoint import Checkpoint, locate_checkpoint, model_version, open_checkpoint
from service.engines.base import Engine, EngineInfo
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.records import Encoding, ModelIdentity
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

    def description(self) -> dict[str, Any]:
        """Say what is served and how, JSON-ready, for ``/v1/model``."""
        settings = self.settings
        return {
            "model": {"name": self.identity.name, "version": self.identity.version},
            "revision": settings.revision,
            "engine": asdict(self.info),
            "activation": "none",
            "pooling": settings.model.pooling,
            "template": self.tokenization.template_for(Encoding()),
            "truncation": settings.tokenization.truncation,
            "diagnostics": settings.diagnostics.level,
            "deterministic": settings.batching.deterministic,
            "sample_token_ids": list(self.tokenization.sample_token_ids),
            "limits": {**settings.limits.model_dump(), "max_input_tokens": self.info.max_input_tokens},
            "sha256": asdict(self.checkpoint.hashes) if self.checkpoint else {},
            "notes": list(self.checkpoint.notes) if self.checkpoint else [],
        }


def assemble(settings: Settings) -> ServedModel:
    """Load the model that the settings name and put its parts together; nothing runs yet.

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
        return apart.submit(_assemble_torch, settings).result()


def judge(settings: ModelSettings) -> Checkpoint:
    """Find the checkpoint that the settings name and judge it without loading the model.

    Raises:
        CheckpointError: it is not there, or cannot be trusted.
    """
    return open_checkpoint(locate_checkpoint(settings), settings)


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
    return _join(settings, identity, None, tokenization, engine)


def _assemble_torch(settings: Settings) -> ServedModel:
    from service.engines.torch import load_torch_engine

    checkpoint = judge(settings.model)
    tokenization = Tokenization(
        checkpoint.tokenizer,
        settings.tokenization,
        max_input_tokens=checkpoint.max_input_tokens,
        vocab_size=checkpoint.embedding_size,
    )
    engine = load_torch_engine(
        checkpoint.path,
        settings.model,
        settings.batching,
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
    )
    identity = model_version(
        checkpoint,
        dtype=engine.info.dtype,
        pooling=settings.model.pooling,
        template=tokenization.template_for(Encoding()),
    )
    return _join(settings, identity, checkpoint, tokenization, engine)


def _join(
    settings: Settings,
    identity: ModelIdentity,
    checkpoint: Checkpoint | None,
    tokenization: Tokenization,
    engine: Engine,
) -> ServedModel:
    info = engine.info
    metrics = Metrics()
    metrics.describe_model(identity, checkpoint.hashes.weights if checkpoint else "", info.dtype, info.device)
    metrics.describe_build(distribution_version("reward-service"), settings.revision)
    scorer = Scorer(
        tokenization,
        Pipeline(engine),
        settings.limits,
        settings.batching,
        metrics,
        num_tokenizer_threads=settings.tokenization.num_threads,
    )
    return ServedModel(settings, identity, info, checkpoint, tokenization, scorer, metrics)
