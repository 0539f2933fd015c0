"""Locates a checkpoint, validates it, and returns one record of everything that the service reads from it.

The settings name a folder, an adapter, a hub id, or nothing (the demo model); each becomes a plain checkpoint folder.
Opening a folder reads all of its weights once, to hash them and to search them for NaN. The resulting `Checkpoint` is
meant to be passed along, so that a process reads them only once. The engine loads the weights for inference.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.cache import build_once, cache_directory
from service.checkpoints.adapter import is_adapter, merge_adapter
from service.checkpoints.configuration import read_json
from service.checkpoints.demo import obtain_demo_model
from service.checkpoints.files import ADAPTER_CONFIG_FILE, CONFIG_FILE
from service.checkpoints.hub import local_folder
from service.checkpoints.labels import resolve_description
from service.checkpoints.quantized_weights import QuantizedTensors, find_quantized
from service.checkpoints.reward_description import (
    DESCRIPTION_FILE,
    ClassifierHead,
    GatedHead,
    LayeredHead,
    LinearLayer,
    RewardDescription,
    read_description,
    resolve_pooling,
)
from service.checkpoints.tokenizer_validation import (
    load_tokenizer,
    resolve_max_input_tokens,
    resolve_pad_token_id,
    validate_appended,
    validate_steps,
    validate_vocabulary,
    with_pad_token_id,
)
from service.checkpoints.validation import load_config, notes_on, validate_finite, validate_weights
from service.checkpoints.weights import read_tensor_infos, weight_files, weights_sha256
from service.records import DEMO_MODEL, PLAIN_INPUTS, ModelIdentity, ModelInputs, Pooling, StepAggregate
from service.settings import ModelSettings
from service.steps import StepMarker
from service.transformers_logging import transformers_silenced

UNHASHED_CONFIG_KEYS = frozenset({"transformers_version", "_name_or_path", "architectures"})
"""Entries of ``config.json`` that do not change a reward."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """The sha256 values (hexadecimal) of everything in a checkpoint folder that determines a reward."""

    config: str
    """Hash of ``config.json`` and ``reward_model.json`` without the entries that do not change a reward (see
    `hash_config`)."""

    weights: str
    """Hash over the files that the classifier is loaded from (see `service.checkpoints.weights.weights_sha256`)."""

    tokenizer: str
    """Hash of the fast tokenizer's serialisation."""

    template: str
    """Hash of the chat template; empty without one."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that passed validation, with the hashes of its content."""

    path: Path
    """The plain checkpoint folder; of an adapter the merged one."""

    name: str
    """The model's name in answers and metrics."""

    config: Any = field(repr=False)
    """transformers' configuration; its pad token is always set."""

    tokenizer: Any = field(repr=False)
    """transformers' fast tokenizer."""

    architecture: str
    """Name of transformers' class that loads the folder."""

    num_parameters: int

    dtype: str
    """The dtype in which most tensors are stored, in the notation of safetensors: ``F32``, ``BF16``."""

    embedding_size: int
    """Rows of the embedding; every token id is smaller."""

    max_input_tokens: int
    """The longest input that may be scored."""

    pad_token_id: int
    hashes: Hashes

    pooling: Pooling
    """The pooling of the description, else of the settings."""

    description: RewardDescription | None = None
    """The content of ``reward_model.json``; None without the file."""
    inputs: ModelInputs = PLAIN_INPUTS
    """What the model reads beside token ids."""

    stored_quantization: str | None = None
    """How quantized weights are stored, which are widened when they are loaded; None: they are not quantized."""

    notes: tuple[str, ...] = ()
    """Sentences on unusual properties that are not a reason to refuse."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the numbers that the head gives."""
        return self.description.outputs if self.description else ("reward",)

    @property
    def step_marker(self) -> StepMarker:
        """What training put after each step."""
        rule = self.description.steps if self.description else None
        return StepMarker() if rule is None else StepMarker(rule.marker, rule.marker_token_id, rule.separate)

    @property
    def append_token_ids(self) -> tuple[int, ...]:
        """Token ids that stand after every text."""
        return self.description.text.append_token_ids if self.description else ()

    @property
    def gate_pattern(self) -> tuple[int, ...]:
        """Token ids of which the gate of the head reads the first one; empty where it has none."""
        head = self.description.head if self.description else None
        return head.gate.token_pattern if isinstance(head, GatedHead) else ()

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)


def locate_checkpoint(settings: ModelSettings) -> Path:
    """Return the folder of the checkpoint that the settings name, after downloading or merging it where needed.

    ``demo``, or no path, is the demo model. A PEFT adapter is merged into its base once, into the user's cache. A path
    that is not a folder is treated as a hub id.

    Raises:
        CheckpointError: there is neither such a folder nor such a model on a reachable hub, or merging fails.
    """
    if settings.path is None or settings.is_demo:
        return obtain_demo_model()
    folder = local_folder(settings.path, settings.revision)
    return _merge_once(folder) if is_adapter(folder) else folder


def _merge_once(adapter: Path) -> Path:
    """Merge an adapter into the cache; a changed adapter, or a changed base under the same name, gets a new folder."""
    parts = [*sorted(adapter.glob("adapter_*")), *_base_files(adapter)]
    version = hashlib.sha256("\n".join(_file_state(part) for part in parts).encode()).hexdigest()

    def merge(folder: Path) -> None:
        merge_adapter(adapter, folder)

    return build_once(cache_directory() / "merged" / f"{adapter.resolve().name}-{version[:16]}", merge)


def _base_files(adapter: Path) -> list[Path]:
    base = read_json(adapter / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    folder = Path(str(base))
    return sorted(folder.glob("*.safetensors")) if base and folder.is_dir() else []


def _file_state(file: Path) -> str:
    state = file.stat()
    return f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"


def open_checkpoint(path: Path, settings: ModelSettings) -> Checkpoint:
    """Validate a checkpoint folder, hash it, and return its record.

    All weights are read once, so pass the record along instead of opening a folder again.

    Args:
        path: a plain checkpoint folder, as `locate_checkpoint` returns it.
        settings: its name, pooling and token limit.

    Raises:
        CheckpointError: its rewards could be wrong; the message names the reason and the remedy.
        SettingsError: a setting contradicts ``reward_model.json``.
    """
    stored = read_description(path)
    pooling = resolve_pooling(stored, settings.pooling)
    with transformers_silenced():
        config = load_config(path)
        description = resolve_description(path, stored, config, settings)
        files = weight_files(path)
        stored_tensors = read_tensor_infos(files)
        quantized = find_quantized(path, stored_tensors)
        tensors = stored_tensors if quantized is None else quantized.infos
        fit = validate_weights(path, config, tensors, description)
        tokenizer = load_tokenizer(path, config, settings.chat_template)
    validate_vocabulary(path, tokenizer, fit.embedding_size)
    pad_token_id = resolve_pad_token_id(path, config, tokenizer, fit.embedding_size)
    config = with_pad_token_id(config, pad_token_id)
    validate_appended(path, description, fit.embedding_size)
    validate_steps(path, description, fit.embedding_size)
    max_input_tokens = resolve_max_input_tokens(path, fit.max_positions, tokenizer, settings.max_input_tokens)
    return Checkpoint(
        path=path,
        name=checkpoint_name(settings),
        config=config,
        tokenizer=tokenizer,
        architecture=fit.architecture,
        num_parameters=sum(tensor.num_elements for tensor in tensors.values()),
        dtype=Counter(tensor.dtype for tensor in tensors.values()).most_common(1)[0][0],
        embedding_size=fit.embedding_size,
        max_input_tokens=max_input_tokens,
        pad_token_id=pad_token_id,
        hashes=_hash_and_scan(path, files, tokenizer, description),
        inputs=fit.inputs,
        pooling=pooling,
        description=description,
        stored_quantization=None if quantized is None else str(quantized.quantization),
        notes=(*_widening_notes(quantized), *notes_on(config, tokenizer, pooling)),
    )


def _widening_notes(quantized: QuantizedTensors | None) -> Iterator[str]:
    if quantized is not None:
        yield (
            f"{len(quantized.matrices)} weight matrices are stored quantized ({quantized.quantization}); they are "
            "widened when they are loaded, and activations are not quantized."
        )


def model_version(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    template: str,
    reward_weights: Mapping[str, float] | None = None,
    step_aggregate: StepAggregate | None = None,
) -> ModelIdentity:
    """Return the model's name and a version that depends on everything that can change a reward.

    Forward path, device and batching are not part of the version: they change no reward beyond rounding. The token
    limit is, because it determines what ``prompt_left`` cuts.

    Args:
        checkpoint: the opened checkpoint.
        dtype: resolved dtype of the body's arithmetic, never "auto".
        template: name of the text rule, by which items become token ids unless a request chooses otherwise.
        reward_weights: weights of the settings, by the name of the output; those of the checkpoint are in its hash.
        step_aggregate: that of the settings; that of the checkpoint is in its hash.
    """
    hashes = checkpoint.hashes
    facts = {
        "config": hashes.config,
        "weights": hashes.weights,
        "tokenizer": hashes.tokenizer,
        "chat_template": hashes.template,
        "pad_token_id": checkpoint.pad_token_id,
        "max_input_tokens": checkpoint.max_input_tokens,
        "dtype": dtype,
        "pooling": checkpoint.pooling,
        "template": template,
    }
    if reward_weights is not None:
        facts["reward_weights"] = dict(reward_weights)
    if step_aggregate is not None:
        facts["step_aggregate"] = step_aggregate
    return ModelIdentity(checkpoint.name, _hash_text(json.dumps(facts, sort_keys=True))[:16])


def describe(checkpoint: Checkpoint) -> list[str]:
    """Return the properties of a valid checkpoint as lines for a terminal, then a line for each note."""
    return [
        f"{checkpoint.path} can be served as {checkpoint.name}.",
        f"  architecture      {checkpoint.architecture}",
        f"  parameters        {checkpoint.num_parameters:,} in {checkpoint.dtype}",
        f"  token limit       {checkpoint.max_input_tokens:,}",
        f"  embedding         {checkpoint.embedding_size:,} rows for {len(checkpoint.tokenizer):,} tokens",
        f"  pad token         {checkpoint.pad_token_id}",
        f"  head              {describe_head(checkpoint.description)}",
        f"  pooling           {checkpoint.pooling}",
        f"  chat template     {'yes' if checkpoint.has_chat_template else 'no'}",
        f"  weights sha256    {checkpoint.hashes.weights}",
        *(f"  note              {note}" for note in checkpoint.notes),
    ]


def describe_head(description: RewardDescription | None) -> str:
    """Return the head of a checkpoint in words, for a terminal."""
    if description is None:
        return "that of the architecture"
    head = description.head
    outputs = f", {len(description.outputs)} outputs" if len(description.outputs) > 1 else ""
    if isinstance(head, ClassifierHead):
        return f"that of the architecture{outputs}"
    if isinstance(head, LayeredHead):
        words = _describe_layers(head.layers)
    elif isinstance(head, GatedHead):
        words = f"{_describe_layers([head.objectives])}, weighted by a gate of {_describe_layers(head.gate.layers)}"
    else:
        words = f"{len(head.members)} members, each {_describe_layers(head.members[0].layers)}"
    return f"{words}{outputs} ({DESCRIPTION_FILE})"


def _describe_layers(layers: Sequence[LinearLayer]) -> str:
    parts = []
    for layer in layers:
        parts.append(f"linear{'' if layer.bias is None else ' with bias'}")
        parts += [] if layer.activation == "none" else [layer.activation]
    return ", ".join(parts)


def _hash_and_scan(path: Path, files: list[Path], tokenizer: Any, description: RewardDescription | None) -> Hashes:
    # Hashing is limited by one core per file and the search for NaN by memory bandwidth. Running both at the same time
    # reads the same pages of the file cache.
    with ThreadPoolExecutor(max_workers=1) as pool:
        weights = pool.submit(weights_sha256, files)
        validate_finite(path, files)
        return Hashes(
            config=hash_config(path, description),
            weights=weights.result(),
            tokenizer=hash_tokenizer(tokenizer),
            template=hash_template(tokenizer),
        )


def hash_config(path: Path, description: RewardDescription | None) -> str:
    """Return the sha256 of a folder's ``config.json``, without the entries that do not change a reward.

    It covers the description by which the checkpoint is served, where that changes a reward.
    """
    config = {key: value for key, value in read_json(path / CONFIG_FILE).items() if key not in UNHASHED_CONFIG_KEYS}
    facts = description.reward_facts() if description else {}
    if facts:
        config[DESCRIPTION_FILE] = facts
    return _hash_text(json.dumps(config, sort_keys=True))


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the sha256 of a fast tokenizer's serialisation, which determines its token ids."""
    return _hash_text(tokenizer.backend_tokenizer.to_str())


def hash_template(tokenizer: Any) -> str:
    """Return the sha256 of a tokenizer's chat template, or of all where it has several; empty without a template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return _hash_text(template["default"] if len(template) == 1 else json.dumps(template, sort_keys=True))
    return _hash_text(template) if template else ""


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_name(settings: ModelSettings) -> str:
    """Return the model's name in answers and metrics: the setting, else the name of its folder, or its hub id."""
    if settings.name is not None:
        return settings.name
    if settings.path is None or settings.is_demo:
        return DEMO_MODEL
    folder = Path(settings.path).expanduser()
    return folder.resolve().name if folder.is_dir() else settings.path
