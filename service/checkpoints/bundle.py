"""The ONNX bundle: a folder with a graph, its tokenizer, and a manifest with the sha256 of every file.

``reward-export`` writes bundles. The format is defined here because the service, which reads it, decides what it needs.
This module verifies files and runs nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from service.checkpoints.checkpoint import (
    Checkpoint,
    Hashes,
    checkpoint_name,
    hash_config,
    hash_template,
    hash_tokenizer,
)
from service.checkpoints.files import BUNDLE_MANIFEST_FILE
from service.checkpoints.labels import resolve_description
from service.checkpoints.reward_description import read_description, resolve_pooling
from service.checkpoints.tokenizer_validation import (
    load_tokenizer,
    resolve_max_input_tokens,
    validate_vocabulary,
    with_pad_token_id,
)
from service.checkpoints.validation import load_config, notes_on
from service.checkpoints.weights import files_sha256
from service.errors import CheckpointError
from service.records import ModelInputs, Pooling, StateTap
from service.settings import ModelSettings
from service.transformers_logging import transformers_silenced

GRAPH_FILE = "model.onnx"
GRAPH_DATA_FILE = "model.onnx.data"
"""Holds the weights where the graph's file cannot (more than 2 GB)."""

FORMAT_VERSION = 2

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""The dtype of the body's arithmetic by precision, as ``/v1/model`` names it."""


@dataclass(frozen=True, slots=True)
class ExportParity:
    """The difference between a graph's rewards and those of plain transformers in fp32, on the same texts."""

    max_difference: float
    """Largest absolute difference of a reward."""

    mean_difference: float
    """Mean absolute difference."""

    spearman: float
    """Rank correlation of the two lists of rewards."""

    pair_agreement: float
    """Share of the pairs of texts with different reference rewards that both order in the same way."""

    num_texts: int

    text_source: str
    """``built-in``, or the name of the data file."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A recorded reward: the service computes it again at every start and compares."""

    token_ids: tuple[int, ...]

    reward: float
    """The first output that the graph gave for these token ids at export."""

    outputs: tuple[float, ...] = ()
    """All outputs that it gave, where there are several; empty otherwise."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``manifest.json``."""

    format_version: int
    name: str

    precision: Precision
    """Precision of the graph's weights and arithmetic; ``int8`` is weights and activations in int8."""

    architecture: str
    """Name of transformers' class that was exported."""

    checkpoint_sha256: Hashes
    """Weights hash of the checkpoint that was exported."""

    num_parameters: int

    stored_dtype: str
    """The dtype in which most tensors of the checkpoint are stored, in the notation of safetensors."""

    has_linear_head: bool
    """Whether the head reads the state of one token; False where it does its own pooling."""

    embedding_size: int
    """Rows of the embedding; every token id is smaller."""

    pad_token_id: int

    max_input_tokens: int
    """The longest input that may be scored; a setting can only lower it."""

    opset_version: int
    """Version of the standard ONNX operators."""

    library_versions: dict[str, str]
    """Versions of the libraries that exported the graph."""

    taps: tuple[StateTap, ...]
    """Where the graph outputs hidden states."""

    parity: ExportParity

    probes: tuple[Probe, ...] = field(repr=False)
    """The graph must reproduce these rewards within ``probe_tolerance`` before the bundle is served."""

    probe_tolerance: float
    """Largest absolute difference."""

    files: dict[str, str] = field(repr=False)
    """sha256 of each file that determines a reward. A calibration does not, so it may be fitted again and replaced."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files have the sha256 values of its manifest."""

    manifest: Manifest

    checkpoint: Checkpoint
    """Its weights hash is that of the exported checkpoint, so that a calibration of one is valid for the other."""

    @property
    def arithmetic(self) -> str:
        """What changes rewards beyond rounding: the dtype, and below fp32 the hash of the graph."""
        dtype = DTYPES[self.manifest.precision]
        return dtype if self.manifest.precision == "fp32" else f"{dtype} {hash_graph(self.manifest.files)}"

    @property
    def recorded_pooling(self) -> Pooling:
        """The pooling of the rewards that the export recorded."""
        description = self.checkpoint.description
        return description.pooling if description else "hf"

    @property
    def graph(self) -> Path:
        """Path of the graph's file."""
        return self.checkpoint.path / GRAPH_FILE


def is_bundle(folder: Path) -> bool:
    """Whether the folder has a bundle's manifest and graph."""
    return (folder / BUNDLE_MANIFEST_FILE).is_file() and (folder / GRAPH_FILE).is_file()


def open_bundle(path: Path, settings: ModelSettings) -> Bundle:
    """Verify a bundle folder and return its record.

    Raises:
        CheckpointError: a file is missing or is not the one that was exported, or its parts do not match.
        SettingsError: a setting contradicts ``reward_model.json``.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest.files)
    stored = read_description(path)
    pooling = resolve_pooling(stored, settings.pooling)
    with transformers_silenced():
        config = with_pad_token_id(load_config(path), manifest.pad_token_id)
        description = resolve_description(path, stored, config, settings)
        tokenizer = load_tokenizer(path, config, settings.chat_template)
    validate_vocabulary(path, tokenizer, manifest.embedding_size)
    limit = resolve_max_input_tokens(path, manifest.max_input_tokens, tokenizer, settings.max_input_tokens)
    checkpoint = Checkpoint(
        path=path,
        name=checkpoint_name(settings),
        config=config,
        tokenizer=tokenizer,
        architecture=manifest.architecture,
        num_parameters=manifest.num_parameters,
        dtype=manifest.stored_dtype,
        embedding_size=manifest.embedding_size,
        max_input_tokens=limit,
        pad_token_id=manifest.pad_token_id,
        hashes=Hashes(
            config=hash_config(path, description),
            weights=manifest.checkpoint_sha256.weights,
            tokenizer=hash_tokenizer(tokenizer),
            template=hash_template(tokenizer),
        ),
        inputs=ModelInputs(
            is_encoder=not manifest.has_linear_head, num_token_types=getattr(config, "type_vocab_size", 0)
        ),
        pooling=pooling,
        description=description,
        notes=tuple(notes_on(config, tokenizer, pooling)),
    )
    return Bundle(manifest, checkpoint)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a bundle folder.

    Raises:
        CheckpointError: it is missing, invalid, or of a format version that this service does not read.
    """
    file = path / BUNDLE_MANIFEST_FILE
    try:
        content = file.read_bytes()
        version = msgspec.json.decode(content, type=dict[str, object]).get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {version}, but this service reads {FORMAT_VERSION}: run `reward-export`."
            )
        return msgspec.json.decode(content, type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{file} is not a valid manifest of an ONNX bundle ({error}): run `reward-export` again."
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest into a bundle folder."""
    (path / BUNDLE_MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def hash_bundle_files(path: Path, names: list[str]) -> dict[str, str]:
    """Return the sha256 (hexadecimal) of files of the folder, by name; they are read in parallel."""
    return {file.name: digest for file, digest in files_sha256([path / name for name in names]).items()}


def verify_files(path: Path, files: dict[str, str]) -> None:
    """Check that every file of the manifest is in the folder and has its sha256.

    Raises:
        CheckpointError: one is missing, differs, or is outside the folder, or the graph is not among them.
    """
    if GRAPH_FILE not in files:
        raise CheckpointError(f"{path / BUNDLE_MANIFEST_FILE} has no sha256 of {GRAPH_FILE}: run `reward-export`.")
    for name in files:
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{path} lacks the file {name} that its manifest lists: copy the bundle again.")
    if (path / GRAPH_DATA_FILE).is_file() and GRAPH_DATA_FILE not in files:
        raise CheckpointError(f"{path} holds {GRAPH_DATA_FILE}, which its manifest does not list: copy it again.")
    found = hash_bundle_files(path, sorted(files))
    changed = [name for name, digest in found.items() if digest != files[name]]
    if changed:
        raise CheckpointError(
            f"{path / changed[0]} is not the file that was exported (sha256 {found[changed[0]]}, expected "
            f"{files[changed[0]]}): copy the bundle again, or run `reward-export`."
        )


def hash_graph(files: dict[str, str]) -> str:
    """Return one sha256 over the graph's files, from their own sha256 values."""
    parts = [f"{name} {files[name]}\n" for name in (GRAPH_FILE, GRAPH_DATA_FILE) if name in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
