"""A stored model as its source folder holds it, with the names that transformers gives its body's tensors.

Training wrappers put prefixes before the names, and some models have a body that transformers knows under another name.
Only names and the layout of fused tensors change; no number does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from service.checkpoints.architecture import Fit, fit_classifier, has_classifier
from service.checkpoints.configuration import read_config
from service.checkpoints.files import CONFIG_FILE
from service.checkpoints.quantized_weights import find_quantized
from service.checkpoints.tokenizer_validation import load_tokenizer
from service.checkpoints.weights import (
    VALUE_HEAD_FILE,
    TensorInfo,
    open_weights,
    pickled_weights,
    read_tensor_infos,
    weight_files,
)
from service.errors import CheckpointError

PICKLED_VALUE_HEAD_FILE = "value_head.bin"
WRAPPERS = ("module.", "_orig_mod.", "pretrained_model.")
"""Prefixes of DDP and DeepSpeed, of torch.compile, and of TRL's value-head wrapper."""

KNOWN_AS = {"internlm2": "llama", "gpt_neox_reward_model": "gpt_neox"}
"""Model types of published reward models that transformers does not have, and the one with the same computation."""

_NOT_KNOWN_AS = frozenset({"model_type", "auto_map", "quantization_config"})

INTERNLM2_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Modules of InternLM2's body, and their names in Llama's."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Configuration and tensors of a source folder; the tensors are mapped into memory, not copied."""

    source: Path
    config: Any
    tensors: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]

    is_renamed: bool = False
    """Whether a tensor has another name than in the files."""

    notes: tuple[str, ...] = ()
    """Sentences on what reading the tensors changed."""

    @property
    def is_pickled(self) -> bool:
        """Whether a tensor comes from a pickle."""
        return any(info.file.suffix != ".safetensors" for info in self.infos.values())

    @property
    def architecture(self) -> str | None:
        """The class that the configuration names."""
        return next(iter(self.config.architectures or ()), None)

    def tokenizer(self) -> Any:
        """Return the tokenizer of the source.

        Raises:
            CheckpointError: there is none, or it cannot be loaded.
        """
        return load_tokenizer(self.source, self.config)

    def fit(self) -> Fit:
        """Return how the tensors fit the classifier with one label."""
        return fit_classifier(self.config, {name: info.shape for name, info in self.infos.items()})


def read_model(source: Path, *, allow_pickle: bool) -> StoredModel:
    """Read a source folder, with the names that transformers gives the body's tensors.

    Raises:
        CheckpointError: it holds no checkpoint of a supported architecture, pickles that are not allowed, or two
            different tensors for one name.
    """
    config = _read_config(source)
    tensors, infos = _read_tensors(source, allow_pickle=allow_pickle)
    stored = _widened(StoredModel(source, config, tensors, infos))
    stored = _renamed(stored, {name: _unwrapped(name) for name in stored.infos})
    if _stored_type(source) == "internlm2":
        stored = _as_llama(stored)
    return _with_body_prefix(stored)


def _stored_type(source: Path) -> str | None:
    try:
        content = json.loads((source / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def _read_config(source: Path) -> Any:
    from transformers import AutoConfig

    stored_type = _stored_type(source)
    try:
        if stored_type in KNOWN_AS:
            content = json.loads((source / CONFIG_FILE).read_bytes())
            content = {key: value for key, value in content.items() if key not in _NOT_KNOWN_AS}
            config = AutoConfig.for_model(KNOWN_AS[stored_type], **content)
        else:
            config = read_config(source)
    except (CheckpointError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{source} is not a checkpoint of an architecture that transformers supports ({type(error).__name__}): "
            "pass the folder that holds its config.json."
        ) from error
    if not has_classifier(config):
        raise CheckpointError(f"{source} is a {config.model_type} model, for which transformers has no scalar head.")
    if hasattr(config, "auto_map"):
        del config.auto_map  # the result is a class of transformers, and code of the source is never run
    config.num_labels = 1
    return config


def has_one_label(source: Path) -> bool:
    """Whether the stored configuration says that the model has one label."""
    from transformers import AutoConfig

    known = _stored_type(source) not in KNOWN_AS
    return known and bool(AutoConfig.from_pretrained(source, trust_remote_code=False).num_labels == 1)


def _read_tensors(source: Path, *, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return all tensors and their descriptions, by name; safetensors files are mapped, not copied, into memory."""
    tensors: dict[str, Any] = {}
    infos: dict[str, TensorInfo] = {}
    pickles = pickled_weights(source) if allow_pickle else []
    if not any(source.glob("model*.safetensors")) and pickles:
        files = pickles
    else:
        files = [*weight_files(source), *(file for file in pickles if file.name == PICKLED_VALUE_HEAD_FILE)]
    if (source / VALUE_HEAD_FILE).is_file():
        files.append(source / VALUE_HEAD_FILE)
    for file in files:
        for name, tensor in _open_file(file).items():
            tensors[name] = tensor
            infos[name] = TensorInfo(file, tuple(tensor.shape), str(tensor.dtype))
        if file.suffix == ".safetensors":
            infos |= read_tensor_infos([file])
    return tensors, infos


def _widened(stored: StoredModel) -> StoredModel:
    """Return the model with its quantized matrices in the dtype of its configuration."""
    quantized = find_quantized(stored.source, stored.infos)
    if quantized is None:
        return stored
    import torch

    name = str(stored.config.dtype or "bfloat16").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    tensors = quantized.read(stored.tensors.__getitem__, lambda _: dtype)
    note = f"Weights stored quantized ({quantized.quantization}) were widened to {name}."
    return replace(stored, tensors=tensors, infos=quantized.infos, notes=(note,))


def _open_file(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".safetensors":
        with open_weights(file) as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - the handle is not a mapping
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything, depending on the bytes
        raise CheckpointError(
            f"{file} is not a plain pickle of tensors ({type(error).__name__}), and no other pickle is opened: "
            "save the model as safetensors where it was trained."
        ) from error
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _renamed(stored: StoredModel, names: Mapping[str, str]) -> StoredModel:
    """Return the model with other names of tensors; a tensor that is stored twice is kept once.

    Raises:
        CheckpointError: two different tensors would have one name.
    """
    tensors: dict[str, Any] = {}
    infos: dict[str, TensorInfo] = {}
    for old, new in names.items():
        if new in tensors and not _equal(tensors[new], stored.tensors[old]):
            raise CheckpointError(f"{stored.source} stores two different tensors as {new}, with and without a prefix.")
        tensors[new], infos[new] = stored.tensors[old], stored.infos[old]
    is_renamed = stored.is_renamed or any(old != new for old, new in names.items())
    return replace(stored, tensors=tensors, infos=infos, is_renamed=is_renamed)


def _equal(first: Any, second: Any) -> bool:
    return bool(first.shape == second.shape and (first == second).all())


def _with_body_prefix(stored: StoredModel) -> StoredModel:
    """Give the body the prefix of its class in transformers, wherever its input embedding is stored."""
    fit = stored.fit()
    leaf = fit.embedding.removeprefix(fit.body_prefix)
    prefixes = [name.removesuffix(leaf) for name in stored.infos if name.endswith(f".{leaf}")]
    if prefixes in ([], [fit.body_prefix]):
        return stored
    names = {}
    for name in stored.infos:
        prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        names[name] = name if prefix is None else fit.body_prefix + name.removeprefix(prefix)
    return _renamed(stored, names)


def _as_llama(stored: StoredModel) -> StoredModel:
    """Split InternLM2's fused attention weights and rename its modules; the computation is Llama's.

    ``wqkv`` has, for each key-value head, the rows of its query heads, of its key and of its value.
    """
    config = stored.config
    queries = config.num_attention_heads // config.num_key_value_heads
    head_size = config.hidden_size // config.num_attention_heads
    tensors: dict[str, Any] = {}
    infos: dict[str, TensorInfo] = {}
    for name, tensor in stored.tensors.items():
        info = stored.infos[name]
        match = re.fullmatch(r"(.*)attention\.wqkv\.(weight|bias)", name)
        if match is None:
            new = name
            for module, llama in INTERNLM2_NAMES.items():
                new = new.replace(f".{module}.", f".{llama}.")
            new = re.sub(r"^output\.", "lm_head.", new)
            tensors[new], infos[new] = tensor, info
            continue
        groups = tensor.reshape(config.num_key_value_heads, queries + 2, head_size, *tensor.shape[1:])
        parts = {"q_proj": groups[:, :queries], "k_proj": groups[:, queries], "v_proj": groups[:, queries + 1]}
        for part, rows in parts.items():
            new = f"{match[1]}self_attn.{part}.{match[2]}"
            tensors[new] = rows.reshape(-1, *tensor.shape[1:]).contiguous()
            infos[new] = TensorInfo(info.file, tuple(tensors[new].shape), info.dtype)
    return replace(stored, tensors=tensors, infos=infos, is_renamed=True)
