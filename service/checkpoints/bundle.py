"""The ONNX bundle: a folder with a graph, what its texts are tokenized with, and a manifest that vouches for both.

Defined here, because the reader owns the format, and written by ``reward-export``. It judges files and runs nothing.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
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
from service.checkpoints.validation import (
    read_config,
    read_tokenizer,
    refuse_oversized_tokenizer,
    settle_limit,
    unusual_facts,
)
from service.errors import CheckpointError
from service.records import StateTap
from service.settings import ModelSettings
from service.transformers_logging import transformers_silenced

MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "model.onnx"
GRAPH_DATA_FILE = "model.onnx.data"
"""Where the weights lie when the graph's file could not hold them (more than 2 GB)."""
FORMAT = 1

Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""How a precision is called where the arithmetic of a body is named."""


@dataclass(frozen=True, slots=True)
class ExportParity:
    """How far a graph's rewards are from those of plain transformers in fp32.

    Differences are absolute. ``spearman``: rank correlation. ``pair_agreement``: the share of all pairs of texts with
    different rewards that both rank alike. ``items``: where the texts came from.
    """

    max_difference: float
    mean_difference: float
    spearman: float
    pair_agreement: float
    num_items: int
    items: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids and the reward that the graph gave them when it was exported."""

    token_ids: tuple[int, ...]
    reward: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself, in ``manifest.json``.

    ``source``: sha256 of the checkpoint that was exported. ``weights``: numbers in it. ``has_linear_head``: False where
    the head pools by itself. ``max_input_tokens``: the longest text that may be scored. ``opset``: of the standard
    operators. ``probes`` must give their rewards again within ``probe_tolerance`` before the bundle is served.
    ``files``: sha256 of each file that decides a reward; a calibration does not, and may be fitted again in its place.
    """

    format: int
    name: str
    precision: Precision
    architecture: str
    source: Hashes
    num_parameters: int
    stored_dtype: str
    has_linear_head: bool
    embedding_size: int
    pad_token_id: int
    max_input_tokens: int
    opset: int
    libraries: dict[str, str]
    taps: tuple[StateTap, ...]
    parity: ExportParity
    probes: tuple[Probe, ...] = field(repr=False)
    probe_tolerance: float
    files: dict[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are those of its manifest, with all that the service shows of it.

    The hashes of ``checkpoint`` are those of the one that was exported, so that a calibration of it speaks for both.
    """

    manifest: Manifest
    checkpoint: Checkpoint

    @property
    def arithmetic(self) -> str:
        """What of the bundle changes rewards beyond rounding: nothing in fp32, else how this graph was made smaller."""
        dtype = DTYPES[self.manifest.precision]
        return dtype if self.manifest.precision == "fp32" else f"{dtype} {hash_graph(self.manifest.files)}"

    @property
    def graph(self) -> Path:
        """The file of the graph."""
        return self.checkpoint.path / GRAPH_FILE


def is_bundle(folder: Path) -> bool:
    """Whether the folder says that it is a bundle."""
    return (folder / MANIFEST_FILE).is_file() and (folder / GRAPH_FILE).is_file()


def open_bundle(path: Path, settings: ModelSettings) -> Bundle:
    """Judge a bundle folder and return what the service needs to know of it.

    Raises:
        CheckpointError: a file is missing or not the one that was exported, or the parts do not fit each other.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest.files)
    with transformers_silenced():
        config = read_config(path)
        tokenizer = read_tokenizer(path)
    refuse_oversized_tokenizer(path, tokenizer, manifest.embedding_size)
    config.get_text_config().pad_token_id = manifest.pad_token_id
    checkpoint = Checkpoint(
        path=path,
        name=checkpoint_name(settings),
        config=config,
        tokenizer=tokenizer,
        architecture=manifest.architecture,
        num_parameters=manifest.num_parameters,
        dtype=manifest.stored_dtype,
        embedding_size=manifest.embedding_size,
        max_input_tokens=settle_limit(path, manifest.max_input_tokens, tokenizer, settings.max_input_tokens),
        pad_token_id=manifest.pad_token_id,
        hashes=Hashes(
            config=hash_config(path),
            weights=manifest.source.weights,
            tokenizer=hash_tokenizer(tokenizer),
            template=hash_template(tokenizer),
        ),
        notes=tuple(unusual_facts(config, tokenizer)),
    )
    return Bundle(manifest, checkpoint)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a bundle folder.

    Raises:
        CheckpointError: it is missing, broken, or of a format that this version does not read.
    """
    file = path / MANIFEST_FILE
    try:
        content = file.read_bytes()
        version = msgspec.json.decode(content, type=dict[str, object]).get("format")
        if version != FORMAT:
            raise CheckpointError(f"{file} has format {version}, but this version reads {FORMAT}: run `reward-export`.")
        return msgspec.json.decode(content, type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{file} is no manifest of an ONNX bundle ({error}): run `reward-export` again."
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest into a bundle folder."""
    (path / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def hash_bundle_files(path: Path, names: list[str]) -> dict[str, str]:
    """Return sha256 (hexadecimal) of the named files; they are read side by side."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(path / name), names), strict=True))


def verify_files(path: Path, files: dict[str, str]) -> None:
    """Return where every file of the manifest is there, bit for bit.

    Raises:
        CheckpointError: one is missing, differs, or lies outside the folder, or the graph is not among them.
    """
    if GRAPH_FILE not in files:
        raise CheckpointError(f"{path / MANIFEST_FILE} does not vouch for {GRAPH_FILE}: run `reward-export` again.")
    for name in files:
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{path} lacks the file {name} that its manifest names: copy the bundle again.")
    if (path / GRAPH_DATA_FILE).is_file() and GRAPH_DATA_FILE not in files:
        raise CheckpointError(f"{path} holds {GRAPH_DATA_FILE}, which its manifest does not name: copy it again.")
    found = hash_bundle_files(path, sorted(files))
    changed = [name for name, digest in found.items() if digest != files[name]]
    if changed:
        raise CheckpointError(
            f"{path / changed[0]} is not the file that was exported (sha256 {found[changed[0]]}, expected "
            f"{files[changed[0]]}): copy the bundle again, or run `reward-export`."
        )


def hash_graph(files: dict[str, str]) -> str:
    """Return one sha256 over the files that hold the graph and its weights."""
    parts = [f"{name} {files[name]}\n" for name in (GRAPH_FILE, GRAPH_DATA_FILE) if name in files]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
