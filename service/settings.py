"""The one tree of settings: frozen, typed, unknown keys refused, units in the names.

It is read once, from ``serve_config.yaml`` (``args`` of the application) or from the start command's options, and every
part of the service receives its own section and never the whole. Nothing else reads configuration.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from reward_client.options import DiagnosticsLevel, TemplateChoice, Truncation

from service.errors import SettingsError
from service.records import Pooling


class Section(BaseModel):
    """What all parts of the tree share: frozen, strict about names, silent about values in error messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ModelSettings(Section):
    """Which reward model is served, and how its forward pass is run."""

    path: str | None = Field(
        None, description="Checkpoint, PEFT adapter or ONNX bundle folder, or hub id; none: the demo model."
    )
    revision: str | None = Field(None, description="Revision of a hub id; none: the hub's default branch.")
    name: str | None = Field(None, description="Name in answers and metrics; none: that of folder or hub id.")
    engine: Literal["auto", "torch", "onnx", "oracle"] = Field(
        "auto", description="auto: onnx for a bundle, torch for a checkpoint; oracle: a known function, for tests."
    )
    forward: Literal["auto", "packed", "padded"] = Field(
        "auto", description="Forward path of the torch engine; auto: the fastest that agrees with plain transformers."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes CUDA when there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of the body (the head is always fp32); auto: the checkpoint's own on CUDA, "
        "bfloat16 on a CPU with native bfloat16 matrix units, else float32.",
    )
    pooling: Pooling = Field(
        "hf", description="hf: rightmost token that is not the pad token, transformers' rule; last: the last token."
    )
    max_input_tokens: int | None = Field(
        None, ge=1, description="Longest sequence scored; none: the smaller of the model's and the tokenizer's limit."
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the forward pass; none: all.")
    kernels: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Kernels of our own for bfloat16 on x86-64 CPUs, made at the first start by a C++ compiler. auto: "
        "where the CPU and a compiler are there; on: or else do not start.",
    )
    compile: bool = Field(
        False,
        description="torch engine: fuse what stands between matrix products with torch.compile, in the place of our "
        "kernels. Faster passes for a slower start where those do not run; on a CPU it needs a C++ compiler.",
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="torch engine on CUDA: record short rows as graphs; auto: for models of up to 2e9 parameters.",
    )
    quantization: Literal["none", "fp8", "int8"] = Field(
        "none",
        description="torch engine: linear layers multiply in 8 bits, which changes rewards. int8: on CPUs with AVX-512 "
        "VNNI, on our kernels. fp8: on GPUs from compute capability 8.9 on, with torchao; awaits measurement.",
    )
    cascade_attention: bool = Field(
        False,
        description="torch engine on CUDA: attend to a shared beginning once for all that share it, merged with each "
        "one's own part; otherwise its keys are gathered for each. Awaits measurement.",
    )


class TokenizationSettings(Section):
    """How items become token ids."""

    template: TemplateChoice | None = Field(
        None, description="Rendering of a plain-string prompt; none: chat where there is a template, else concat."
    )
    truncation: Truncation = Field("error", description="What becomes of an item over the token limit.")
    num_threads: int = Field(2, ge=1, description="Threads that tokenize beside the event loop.")


class LimitSettings(Section):
    """What one request may ask for, and how much work may wait. Raising a limit costs memory, not correctness."""

    max_request_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="Bytes of a request body.")
    max_request_items: int = Field(2048, ge=1, description="Items of a request.")
    max_compare_completions: int = Field(
        256, ge=2, description="Completions of a comparison; the answer grows with its square."
    )
    max_item_chars: int = Field(131_072, ge=1, description="Characters of one item, checked before tokenizing.")
    max_queue_tokens: int = Field(
        2_097_152,
        ge=1,
        description="Tokens that may wait; beyond it requests are refused with 503. "
        "A legal request is always admitted to an empty queue, however large.",
    )
    deadline_s: float = Field(600.0, gt=0, description="Longest and default time to an answer, in seconds.")


class BatchingSettings(Section):
    """How waiting sequences share forward passes."""

    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of one forward pass; none: 2,048 on CPU (4,096 on our kernels with AMX), 65,536 on CUDA. "
        "A longer sequence goes alone.",
    )
    max_batch_sequences: int = Field(512, ge=1, description="Sequences of one forward pass.")
    deterministic: bool = Field(False, description="Bit-identical rewards across batches, where that costs speed.")
    share_prefixes: bool = Field(
        True, description="Whether sequences of a pass that begin alike compute their beginning once."
    )
    prefix_cache_mib: int | None = Field(
        None,
        ge=0,
        description="MiB of memory for prompts that the torch engine keeps between passes, each computed once; "
        "none: 512 on CPU, 0 on CUDA; 0: none are kept, as with deterministic and without share_prefixes.",
    )


class DiagnosticsSettings(Section):
    """What is said about an item beside its reward."""

    level: DiagnosticsLevel = Field("basic", description="Level of a request that names none.")
    calibration: str | None = Field(
        None, description="Calibration file; none: calibration.safetensors in the checkpoint folder, if there is one."
    )
    alpha: float = Field(0.01, gt=0, lt=1, description="An item is flagged when its p-value is at most this.")


class MonitorSettings(Section):
    """How the stream of scored items is watched, and what is worth an alarm."""

    window_items: int = Field(4096, ge=256, description="Items of a rolling window, at least; requests stay whole.")
    batch_items: int = Field(256, ge=32, description="Items of a step of the cumulative sums, at least.")
    max_runs: int = Field(
        64, ge=1, description="Runs (X-Run-Id) watched apart; the one unheard of longest is forgotten."
    )
    length_corr_warn: float = Field(
        0.3, gt=0, lt=1, description="'r > 0.3': warns when |r| of reward and log length is above it, at 95 percent."
    )
    length_r2_critical: float = Field(
        0.3, gt=0, lt=1, description="'r squared > 0.3', which is |r| > 0.548: critical, by the same bound."
    )
    false_alarm_batches: int = Field(
        10_000, ge=10, description="Batches between two false alarms of all cumulative sums together, on average."
    )


class Settings(Section):
    """All settings of one served model."""

    model: ModelSettings = ModelSettings()
    tokenization: TokenizationSettings = TokenizationSettings()
    limits: LimitSettings = LimitSettings()
    batching: BatchingSettings = BatchingSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()
    monitors: MonitorSettings = MonitorSettings()
    log: str | None = Field(
        None, description="File that gets a JSON line per request; none: standard error, which Ray keeps."
    )
    revision: str = Field("unknown", description="Code revision of this deployment; a change redeploys.")


def read_settings(tree: dict[str, Any]) -> Settings:
    """Build the settings from plain data.

    Raises:
        SettingsError: a key is unknown or a value malformed; the message names each place, one sentence each.
    """
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        places = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_input=False, include_url=False)
        )
        raise SettingsError(f"The settings are not valid: {places}") from None
