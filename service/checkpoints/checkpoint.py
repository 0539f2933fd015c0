"""Finds a checkpoint, opens it once the judge has let it pass, and names what is in it.

No path, a folder, an adapter or a hub id: out comes a plain folder with everything known of it that the service shows.
Loading the weights for real is the engine's part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward_client.options import TemplateChoice

from service.cache import build_once, cache_directory
from service.checkpoints.adapter import is_adapter, merge_adapter
from service.checkpoints.demo import obtain_demo_model
from service.checkpoints.validation import (
    CONFIG_FILE,
    fit_to_architecture,
    read_config,
    read_json,
    read_tokenizer,
    refuse_non_finite,
    refuse_oversized_tokenizer,
    settle_limit,
    settle_pad_token,
    unusual_facts,
)
from service.checkpoints.weights import hash_files, read_tensor_infos, weight_files
from service.errors import CheckpointError
from service.records import ModelIdentity, Pooling
from service.settings import DEMO_MODEL, ModelSettings
from service.transformers_logging import transformers_silenced

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
"""What is fetched from a hub: weights and plain data, nothing that could run."""

PASSING_CONFIG_KEYS = frozenset({"transformers_version", "_name_or_path", "architectures"})
"""Entries of ``config.json`` that do not change a reward."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """sha256 (hexadecimal) of everything in the folder that decides a reward; ``template`` is empty without one."""

    config: str
    weights: str
    tokenizer: str
    template: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that passed the judge.

    ``config`` and ``tokenizer`` are transformers' own objects; the config's pad token is always set. ``architecture``
    is the class that loads it. ``dtype`` is the one most weights are stored in, in safetensors' words.
    ``embedding_size`` bounds the token ids. ``max_input_tokens`` is the limit to serve with. ``notes`` are sentences on
    what is unusual, though no reason to refuse.
    """

    path: Path
    name: str
    config: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    architecture: str
    num_parameters: int
    dtype: str
    embedding_size: int
    max_input_tokens: int
    pad_token_id: int
    hashes: Hashes
    notes: tuple[str, ...] = ()

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(self.tokenizer.chat_template)


def locate_checkpoint(settings: ModelSettings) -> Path:
    """Return the folder of the checkpoint that the settings name, fetching or merging it first where needed.

    ``demo``, or no path, is the demo model. A PEFT adapter is merged into its base once and kept in the user's cache.
    What is no folder is taken for a hub id.

    Raises:
        CheckpointError: there is neither such a folder nor such a model on a reachable hub, or a merge fails.
    """
    if settings.path is None or settings.is_demo:
        return obtain_demo_model()
    folder = Path(settings.path).expanduser()
    if not folder.is_dir():
        folder = _download(settings.path, settings.revision)
    return _merge_once(folder) if is_adapter(folder) else folder


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionResolutionError

    if not HUB_ID.fullmatch(hub_id):
        raise CheckpointError(f"There is no folder {hub_id}, and it is no hub id (owner/name) either: check the path.")
    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RevisionResolutionError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{hub_id} is no folder here, and it could not be fetched from the hub ({type(error).__name__}): check the "
            "name and the network (HF_TOKEN for a gated model), or download it elsewhere and pass its folder."
        ) from error


def _merge_once(adapter: Path) -> Path:
    """Merge an adapter into the cache; another adapter, or another base under the same name, gets another folder."""
    parts = [*sorted(adapter.glob("adapter_*")), *_base_files(adapter)]
    version = hashlib.sha256("\n".join(_file_state(part) for part in parts).encode()).hexdigest()

    def merge(folder: Path) -> None:
        merge_adapter(adapter, folder)

    return build_once(cache_directory() / "merged" / f"{adapter.resolve().name}-{version[:16]}", merge)


def _base_files(adapter: Path) -> list[Path]:
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    folder = Path(str(base))
    return sorted(folder.glob("*.safetensors")) if base and folder.is_dir() else []


def _file_state(file: Path) -> str:
    state = file.stat()
    return f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"


def open_checkpoint(path: Path, settings: ModelSettings) -> Checkpoint:
    """Judge the checkpoint folder and return what the service needs to know of it.

    Raises:
        CheckpointError: there is a reason not to trust its rewards; the message names it and what to do.
    """
    with transformers_silenced():
        config = read_config(path)
        files = weight_files(path)
        tensors = read_tensor_infos(files)
        fit = fit_to_architecture(path, config, tensors)
        tokenizer = read_tokenizer(path)
    refuse_oversized_tokenizer(path, tokenizer, fit.embedding_size)
    pad_token_id = settle_pad_token(path, config, tokenizer, fit.embedding_size)
    max_input_tokens = settle_limit(path, fit.max_positions, tokenizer, settings.max_input_tokens)
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
        hashes=_examine_weights(path, files, tokenizer),
        notes=tuple(unusual_facts(config, tokenizer)),
    )


def model_version(checkpoint: Checkpoint, *, dtype: str, pooling: Pooling, template: TemplateChoice) -> ModelIdentity:
    """Name the model by everything that can change a reward: the folder's content and the settings in force.

    Forward path, device and batching are left out on purpose: by the rule of invariance they change no reward beyond
    rounding. The token limit is in, because it decides what ``prompt_left`` cuts.

    Args:
        checkpoint: the judged checkpoint.
        dtype: arithmetic of the body as resolved, never "auto".
        pooling: the pooling rule in force.
        template: how a plain-string prompt is rendered unless a request says otherwise.
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
        "pooling": pooling,
        "template": template,
    }
    return ModelIdentity(checkpoint.name, _hash_text(json.dumps(facts, sort_keys=True))[:16])


def describe(checkpoint: Checkpoint) -> list[str]:
    """Return the judgement as lines for people: what was found, then a line for each note."""
    return [
        f"{checkpoint.path} can be served as {checkpoint.name}.",
        f"  architecture      {checkpoint.architecture}",
        f"  parameters        {checkpoint.num_parameters:,} in {checkpoint.dtype}",
        f"  token limit       {checkpoint.max_input_tokens:,}",
        f"  embedding         {checkpoint.embedding_size:,} rows for {len(checkpoint.tokenizer):,} tokens",
        f"  pad token         {checkpoint.pad_token_id}",
        f"  chat template     {'yes' if checkpoint.has_chat_template else 'no: prompt and completion are joined'}",
        f"  weights sha256    {checkpoint.hashes.weights}",
        *(f"  note              {note}" for note in checkpoint.notes),
    ]


def _examine_weights(path: Path, files: list[Path], tokenizer: Any) -> Hashes:
    # Hashing is bound by one core a file, the search for NaN by memory; they read the same pages side by side.
    with ThreadPoolExecutor(max_workers=1) as pool:
        weights = pool.submit(hash_files, files)
        refuse_non_finite(path, files)
        return Hashes(
            config=hash_config(path),
            weights=weights.result(),
            tokenizer=hash_tokenizer(tokenizer),
            template=hash_template(tokenizer),
        )


def hash_config(path: Path) -> str:
    """Return the sha256 of a folder's configuration, without what changes no reward."""
    config = {key: value for key, value in read_json(path / CONFIG_FILE).items() if key not in PASSING_CONFIG_KEYS}
    return _hash_text(json.dumps(config, sort_keys=True))


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the sha256 of what a fast tokenizer does."""
    return _hash_text(tokenizer.backend_tokenizer.to_str())


def hash_template(tokenizer: Any) -> str:
    """Return the sha256 of a tokenizer's chat template; empty without one."""
    return _hash_text(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint_name(settings: ModelSettings) -> str:
    """Return the name of the model in answers and metrics: the setting, else that of its folder or hub id."""
    if settings.name is not None:
        return settings.name
    if settings.path is None or settings.is_demo:
        return DEMO_MODEL
    folder = Path(settings.path).expanduser()
    return folder.resolve().name if folder.is_dir() else settings.path
