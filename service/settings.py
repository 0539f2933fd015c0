"""The tree of settings of a served model: frozen and typed, with units in the names; unknown keys are refused.

The tree is read once. ``reward-serve`` reads it from its command line, the environment and a configuration file
(``service.launch.sources``); Ray Serve passes it as ``args`` of the application in ``serve_config.yaml``. Each part of
the service receives its own section and never the whole tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator
from reward_client.options import DiagnosticsLevel, SpecialTokenText, TemplateChoice, Truncation

from service.errors import SettingsError
from service.records import DEMO_MODEL, Pooling, StepAggregate
from service.setting_fields import VALUES, describe_invalid, setting_names

ProtocolName: TypeAlias = Literal["openrlhf", "vllm", "llamafactory", "slime", "kserve", "sglang", "tei"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)


class Section(BaseModel):
    """Base of all sections: frozen, unknown names refused, values kept out of error messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ModelSettings(Section):
    """Which reward model is served, and how its forward pass runs."""

    path: str | None = Field(
        None,
        description="Checkpoint, PEFT adapter or ONNX bundle folder, or a hub id; demo or null: the demo model.",
    )
    revision: str | None = Field(None, description="Revision of a hub id; null: the hub's default branch.")
    name: str | None = Field(None, description="Name in answers and metrics; null: that of the folder or hub id.")
    engine: Literal["auto", "torch", "onnx", "oracle"] = Field(
        "auto", description="auto: onnx for a bundle, torch for a checkpoint; oracle: a deterministic fake, for tests."
    )
    forward: Literal["auto", "packed", "padded"] = Field(
        "auto", description="Forward path of the torch engine; auto: the fastest that agrees with plain transformers."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        json_schema_extra={VALUES: "one of auto, cpu, cuda, cuda:N"},
        description="auto, cpu, cuda or cuda:N; auto takes CUDA when there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of the model body (the head is always float32); auto: the checkpoint's own on CUDA, "
        "bfloat16 on a CPU with native bfloat16 matrix units, else float32.",
    )
    chat_template: str | None = Field(
        None,
        description="Name of the chat template to use, where the tokenizer has several; null: the one named default.",
    )
    pooling: Pooling | None = Field(
        None,
        description="Token whose hidden state is scored. hf: the rightmost that is not the pad token, as transformers "
        "does; last: the last token; null: what the checkpoint's reward_model.json says, else hf.",
    )
    outputs: tuple[str, ...] | None = Field(
        None,
        min_length=2,
        description="Names of the labels of a model whose labels are outputs of a regression, in order; null: what "
        "reward_model.json says, or id2label where the problem_type is regression.",
    )
    class_reward: str | None = Field(
        None,
        description="How the logits of a model whose labels are classes become the reward: logit:LABEL, "
        "log_probability:LABEL, probability:LABEL or logit_difference:LABEL,LABEL, with names or indices of labels; "
        "null: such a model is refused.",
    )
    step_aggregate: StepAggregate | None = Field(
        None,
        description="How the rewards of an item's steps become its reward; null: what the checkpoint's "
        "reward_model.json says, else last.",
    )
    reward_weights: dict[str, FiniteFloat] | None = Field(
        None,
        min_length=1,
        json_schema_extra={VALUES: "names of outputs with their weights, at least one, as a mapping; or null"},
        description="Of a model with several outputs, the weight of each in the reward; 0 for an output that is not "
        "named. null: what the checkpoint's reward_model.json says.",
    )
    max_input_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest sequence that is scored, in tokens; null: the smaller of the model's and the tokenizer's "
        "limit.",
    )
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads of a replica's forward pass; null: all cores, divided among the replicas."
    )
    kernels: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compiled CPU kernels on x86-64, built at the first start by a C++ compiler: in bfloat16 with "
        "AVX-512, in float32 with AVX-512 or AVX2. auto: use them if the CPU supports them and they can be "
        "built; on: refuse to start without them.",
    )
    compile: bool = Field(
        False,
        description="torch engine: fuse the operations between matrix products with torch.compile, instead of the "
        "compiled CPU kernels. Faster passes and a slower start where those do not run; on a CPU it needs a C++ "
        "compiler.",
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="torch engine on CUDA: capture forward passes of short batches as CUDA graphs; auto: for models of "
        "up to 2e9 parameters.",
    )
    quantization: Literal["none", "fp8", "int8"] = Field(
        "none",
        description="torch engine: linear layers multiply in 8 bits, which changes rewards. int8: on CPUs with AVX-512 "
        "VNNI, with the compiled CPU kernels. fp8: on GPUs from compute capability 8.9 on, with torchao; not measured "
        "yet.",
    )
    cascade_attention: bool = Field(
        False,
        description="torch engine on CUDA: compute attention to a shared prefix once for all sequences that share it "
        "and merge it with the attention to each one's suffix; otherwise the prefix keys are gathered for each "
        "sequence. Not measured yet.",
    )

    @property
    def is_demo(self) -> bool:
        """Whether the model is the demo model."""
        return self.path in {None, DEMO_MODEL}

    @field_validator("kernels", mode="before")
    @classmethod
    def _accept_yaml_booleans(cls, value: object) -> object:
        # YAML 1.1 reads a bare on or off as a boolean.
        return ("on" if value else "off") if isinstance(value, bool) else value


class TokenizationSettings(Section):
    """How items become token ids."""

    template: TemplateChoice | None = Field(
        None,
        description="Rendering of a plain-string prompt. chat: by the chat template; pair: by the tokenizer's own "
        "call with two texts, as cross-encoders are trained; concat: prompt and completion joined. null: chat if the "
        "tokenizer has a template, else pair for an encoder whose tokenizer has a form for pairs, else concat.",
    )
    special_tokens: Literal["tokenizer", "leading"] = Field(
        "tokenizer",
        description="Special tokens of a text that no chat template renders. tokenizer: those that the tokenizer's own "
        "call adds, before and after; leading: only those before.",
    )
    token_types: bool = Field(
        True,
        description="Whether an encoder with embeddings of token types gets those that its tokenizer's form for pairs "
        "gives the two texts; false: all tokens have type 0.",
    )
    unrendered: Literal["error", "accept"] = Field(
        "error",
        description="A completion of which the chat template leaves out a part. error: the item gets an error; accept: "
        "what is left is scored, and length.truncated is true.",
    )
    chat_template_kwargs: tuple[str, ...] = Field(
        ("enable_thinking",),
        description="Names that chat_template_kwargs of a request may hold; the chat template gets their values.",
    )
    completion_special_tokens: SpecialTokenText = Field(
        "read",
        description="Default for special tokens that are written in the text of a completion. read: they are these "
        "tokens, as in training, so a completion can write turns of its own; escape: they are text.",
    )
    truncation: Truncation = Field(
        "error",
        description="Default for items over the token limit. error: the item gets an error; prompt_left: the left end "
        "of the prompt is cut.",
    )
    num_threads: int = Field(2, ge=1, description="Tokenizer threads of a replica.")


class LimitSettings(Section):
    """Limits on one request and on the queue. Raising a limit costs memory, not correctness."""

    max_request_bytes: int = Field(
        64 * 1024 * 1024, ge=1024, description="Bytes of a request body, also after decompression."
    )
    max_open_body_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="Bytes of the bodies of all requests that a replica has not answered, without the first 16 KiB of "
        "each. A body beyond it is refused with 503, unless it is the only one.",
    )
    max_request_values: int = Field(
        4 * 1024 * 1024,
        ge=1024,
        description="Values of a request body, such as token ids; an object counts eight. Checked above 1 MiB.",
    )
    max_request_items: int = Field(2048, ge=1, description="Items of a request.")
    max_compare_completions: int = Field(
        256, ge=2, description="Completions of a comparison; the size of the answer grows with the square."
    )
    max_item_steps: int = Field(512, ge=1, description="Steps of one item that get rewards of their own.")
    max_item_chars: int = Field(
        131_072, ge=1, description="Characters of one item, roles of messages included, checked before tokenizing."
    )
    max_queue_tokens: int = Field(
        2_097_152,
        ge=1,
        description="Tokens in the queue; requests beyond it are refused with 503. A valid request is always admitted "
        "to an empty queue, however large.",
    )
    deadline_s: float = Field(
        600.0, gt=0, le=86_400, description="Maximum and default time to an answer, in seconds; at most a day."
    )


class BatchingSettings(Section):
    """How queued sequences are combined into forward passes."""

    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of one forward pass; null: 2,048 on CPU (4,096 with the compiled CPU kernels on AMX), "
        "65,536 on CUDA. A longer sequence gets a pass of its own.",
    )
    max_batch_sequences: int = Field(512, ge=1, description="Sequences of one forward pass.")
    deterministic: bool = Field(
        False, description="Rewards bit-identical whatever the batch composition, also where that costs speed."
    )
    batch_invariant: bool = Field(
        False,
        description="torch engine: rewards bit-identical whatever the batch composition, with batches: matrix products "
        "in blocks of fixed numbers of rows, and attention that is not split. Checked at the start, which fails where "
        "it does not hold. On a CPU it matters in float32. On CUDA not measured yet.",
    )
    share_prefixes: bool = Field(True, description="Compute a prefix that sequences of a pass share only once.")
    prefix_cache_mib: int | None = Field(
        None,
        ge=0,
        description="MiB of memory for the prefix cache of the torch engine, which reuses keys and values of prompts "
        "between passes; null: 512 on CPU, 0 on CUDA; 0: no cache, as with deterministic or without share_prefixes.",
    )


class ScatterSettings(Section):
    """How a large request is divided among the replicas of its application. One replica alone computes all itself."""

    enabled: bool = Field(
        True, description="Whether the replica that receives a large request lets other replicas compute parts of it."
    )
    min_tokens: int | None = Field(
        None,
        ge=2,
        description="Tokens of a request from which on it is divided, so that each replica gets at least half as many; "
        "null: twice the budget of a forward pass. Smaller requests are computed where they arrive.",
    )


class DiagnosticsSettings(Section):
    """What is reported about an item beside its reward."""

    level: DiagnosticsLevel = Field("basic", description="Level of a request that does not name one.")
    calibration: str | None = Field(
        None, description="Calibration file; null: calibration.safetensors in the checkpoint folder, if it exists."
    )
    alpha: float = Field(0.01, gt=0, lt=1, description="An item is flagged when its p-value is at most this.")


class MonitorSettings(Section):
    """How the stream of scored items is monitored, and when a monitor raises an alarm."""

    window_items: int = Field(
        4096, ge=256, description="Minimum number of items in a rolling window; requests are not split."
    )
    batch_items: int = Field(256, ge=32, description="Minimum number of items in one step of the cumulative sums.")
    drift_prompts: int = Field(
        128,
        ge=16,
        le=1024,
        description="Prompts in one batch of the drift of the wording. With another number than 128, phrases that "
        "prompts share are compared with the start of the stream only.",
    )
    max_runs: int = Field(
        64,
        ge=1,
        description="Runs (X-Run-Id) monitored separately. A new one displaces the least recently seen run if that has "
        "been idle for an hour, else one with the fewest items.",
    )
    length_corr_warn: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="Warn when |r| of reward and log length exceeds this with 95 percent confidence.",
    )
    length_r2_critical: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="Critical when r squared of reward and log length exceeds this (0.3 is |r| > 0.548) with 95 "
        "percent confidence.",
    )
    false_alarm_batches: int = Field(
        10_000,
        ge=10,
        description="Mean number of batches between two false alarms of all cumulative sums together, and of the "
        "drift of the wording.",
    )


class ProtocolSettings(Section):
    """The compatibility protocols: routes that answer as other servers do."""

    enabled: str = Field(
        "all",
        description="Protocols that have routes. The service's own routes are always there.",
        json_schema_extra={VALUES: f"all, none, or names separated by commas: {', '.join(PROTOCOL_NAMES)}"},
    )
    strict_model_names: bool = Field(
        False, description="Refuse requests that name another model; otherwise the served model answers them."
    )
    truncation: Truncation | None = Field(
        None, description="Default of these routes for items over the token limit; null: tokenization.truncation."
    )
    activation: Literal["refuse", "sigmoid"] = Field(
        "refuse",
        description="What happens to a request that asks for an activation (use_activation, raw_scores: false). "
        "refuse: 422; sigmoid: the sigmoid of the rewards is answered, with X-Reward-Activation: sigmoid.",
    )
    openrlhf_scores: Literal["raw", "sigmoid"] = Field(
        "raw", description="Field scores of /get_reward, which OpenRLHF filters prompts by; rewards are always raw."
    )
    slime_template: Literal["auto", "chat", "concat"] = Field(
        "auto",
        description="Prompts of /rm that are strings. chat: a user turn; concat: templated already, so the response is "
        "appended; auto: concat where they contain a special token of the tokenizer, else the model's default.",
    )

    @property
    def names(self) -> tuple[ProtocolName, ...]:
        """Names of the enabled protocols, in the order of their documentation."""
        if self.enabled == "all":
            return PROTOCOL_NAMES
        listed = {name.strip() for name in self.enabled.split(",")}
        return tuple(name for name in PROTOCOL_NAMES if name in listed)

    @field_validator("enabled", mode="before")
    @classmethod
    def _accept_lists(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return ",".join(map(str, value)) or "none"
        return value

    @field_validator("enabled")
    @classmethod
    def _check_names(cls, value: str) -> str:
        if value not in {"all", "none"} and any(name.strip() not in PROTOCOL_NAMES for name in value.split(",")):
            raise ValueError
        return value


class SecuritySettings(Section):
    """Who may call the service."""

    api_keys: str | None = Field(
        None,
        description="YAML file with the hashes of API keys, which reward-key makes; null: no keys. The probes alone "
        "need none.",
    )
    authentication: Literal["auto", "required", "none"] = Field(
        "auto",
        description="auto: without API keys the service listens on this machine only; required: it does not start "
        "without keys; none: whoever reaches the port may score.",
    )
    answer_key: str | None = Field(
        None,
        description="File with a secret by which answers of the native routes are signed for clients that know it too; "
        "null: no answer is signed.",
    )
    public_metrics: bool = Field(False, description="Whether /metrics needs no API key, where there are keys.")


class TracingSettings(Section):
    """OpenTelemetry traces of requests; they need the extra ``tracing``."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        json_schema_extra={VALUES: "an address that begins with http:// or https://, or null"},
        description="Address that gets spans by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; null: no "
        "request is traced, and nothing of OpenTelemetry is loaded by the service.",
    )
    sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the requests without a traceparent that are traced; one with a traceparent is traced if "
        "its caller is.",
    )


class PageSettings(Section):
    """The page for a browser, at the root of the service."""

    enabled: bool = Field(True, description="Whether / is the page. Its files need no API key, the figures on it do.")
    audit_url: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        json_schema_extra={VALUES: "an address that begins with http:// or https://, or null"},
        description="Address of a report of reward-audit, which the page links and /v1/model names; null: none.",
    )


class Settings(Section):
    """All settings of one served model."""

    model: ModelSettings = ModelSettings()
    tokenization: TokenizationSettings = TokenizationSettings()
    limits: LimitSettings = LimitSettings()
    batching: BatchingSettings = BatchingSettings()
    scatter: ScatterSettings = ScatterSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()
    monitors: MonitorSettings = MonitorSettings()
    protocols: ProtocolSettings = ProtocolSettings()
    security: SecuritySettings = SecuritySettings()
    tracing: TracingSettings = TracingSettings()
    page: PageSettings = PageSettings()
    log: str | None = Field(
        None,
        description="Access log: the file that gets one JSON line per request. -: standard output. null: with "
        "reward-serve a file in its private folder, which ends with the server; otherwise standard error, which Ray "
        "writes to its logs.",
    )
    code_revision: str = Field("unknown", description="Code revision of this deployment; a change redeploys.")


def name_as_given(text: str, folder: Path, model: ModelSettings) -> str:
    """Return a text with the checkpoint named as the user did, and not by its folder in a cache.

    Args:
        text: a message or a path.
        folder: of the checkpoint, also of a downloaded or a merged one.
        model: its ``path`` is what the user gave.
    """
    return text.replace(str(folder), model.path or DEMO_MODEL) if folder.is_absolute() else text


def read_settings(tree: dict[str, Any]) -> Settings:
    """Build the settings from plain data.

    Raises:
        SettingsError: a key is unknown or a value malformed; the message names each setting and never a value.
    """
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(describe_invalid(error, tuple(setting_names(Settings)), Settings)) from None
