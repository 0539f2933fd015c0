"""Converts the output of reward-model training into a plain scalar-head checkpoint (``reward-convert``).

TRL, OpenRLHF and LLaMA-Factory store a value head under other names or in a separate file; PEFT stores an adapter. The
body is copied unchanged, and the head is renamed to what transformers' classifier loads. Everything that the classifier
cannot hold is reported, and the result must pass validation before its folder appears.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from service.checkpoints.adapter import ADAPTER_WEIGHTS_FILE, is_adapter, merge_adapter
from service.checkpoints.architecture import Fit, fit_classifier, has_classifier
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.files import ADAPTER_CONFIG_FILE, CONVERSION_FILE, TOKENIZER_FILE
from service.checkpoints.weights import (
    VALUE_HEAD_FILE,
    TensorInfo,
    ValueHead,
    find_value_head,
    open_weights,
    pickled_weights,
    weight_files,
)
from service.errors import CheckpointError
from service.outputs import new_folder
from service.settings import ModelSettings
from service.transformers_logging import transformers_silenced

PICKLED_VALUE_HEAD_FILE = "value_head.bin"
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
)
WRAPPER_PREFIX = "pretrained_model."
"""Prefix of the body's tensor names where a trainer saved TRL's value-head wrapper itself."""


LAST_POOLING_NOTE = (
    "Training read the reward at the last token, even if that is EOS, but EOS is also the pad token, which pooling "
    "skips: serve with model.pooling set to last."
)
"""The note of a checkpoint whose rewards equal those of training only with that setting."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion changed; written into the result as ``conversion.json``."""

    source: str
    """The folder that was converted."""

    origin: str
    """The library that wrote it."""

    head: str | None
    """The tensor that became the classifier's head; None where the head had the classifier's name already."""

    dropped_bias: float
    """The constant by which served rewards are lower than those of training."""

    notes: tuple[str, ...]
    """Sentences on differences between training and serving."""


def convert(
    source: Path,
    out: Path,
    *,
    base: Path | None = None,
    drop_bias: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write a plain scalar-head checkpoint made from ``source`` to ``out``; nothing is written unless it is valid.

    Args:
        source: a checkpoint with a value head, or a PEFT adapter with a scalar or value head.
        out: a folder that does not exist or is empty.
        base: the adapter's base model; required where the adapter names none that can be found.
        drop_bias: leave out a bias, which the classifier cannot hold. That shifts all rewards by one constant.
        allow_pickle: also read pickled weights, with torch's restricted unpickler, which allows tensors only.
        overwrite: replace an earlier conversion in ``out``.

    Raises:
        CheckpointError: there is nothing to convert, or the result would be refused; names the remedy.
        OutputError: ``out`` is not empty, or cannot be written.
    """
    with new_folder(out, overwrite=overwrite, marker=CONVERSION_FILE) as unfinished:
        if is_adapter(source):
            conversion = _convert_adapter(source, unfinished, base, drop_bias=drop_bias)
        else:
            conversion = _convert_model(source, unfinished, drop_bias=drop_bias, allow_pickle=allow_pickle)
        _validate(unfinished, out)
        manifest = json.dumps(dataclasses.asdict(conversion), indent=2)
        (unfinished / CONVERSION_FILE).write_text(manifest + "\n", encoding="utf-8")
    return conversion


def _validate(unfinished: Path, out: Path) -> None:
    try:
        open_checkpoint(unfinished, ModelSettings(path=str(unfinished)))
    except CheckpointError as error:
        refusal = str(error).replace(str(unfinished), str(out))
        raise CheckpointError(f"Nothing was written, since the result would be refused: {refusal}") from error


def _convert_adapter(source: Path, unfinished: Path, base: Path | None, *, drop_bias: bool) -> Conversion:
    if not (source / VALUE_HEAD_FILE).is_file():
        merge_adapter(source, unfinished, base)
        return Conversion(str(source), "PEFT", None, 0.0, ())
    tensors = load_file(source / VALUE_HEAD_FILE)
    weights = [name for name in tensors if name.endswith("weight")]
    if len(weights) != 1:
        raise CheckpointError(
            f"{source / VALUE_HEAD_FILE} does not hold one head: exactly one tensor name must end in weight."
        )
    bias = tensors.get(weights[0].removesuffix("weight") + "bias")
    dropped = _dropped_bias(source, bias, drop_bias=drop_bias)
    with tempfile.TemporaryDirectory() as work_dir:
        merge_adapter(_put_head_into_adapter(source, Path(work_dir), tensors[weights[0]]), unfinished, base)
    return Conversion(str(source), "LLaMA-Factory", weights[0], dropped, _pooling_notes(unfinished))


def _put_head_into_adapter(source: Path, work_dir: Path, head: Any) -> Path:
    """Write a copy of the adapter that holds the head as PEFT would have saved it with the task type SEQ_CLS."""
    shutil.copytree(source, work_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))
    config = json.loads((source / ADAPTER_CONFIG_FILE).read_bytes())
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (work_dir / ADAPTER_CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(source / ADAPTER_WEIGHTS_FILE) | {"base_model.model.score.weight": head}
    save_file(weights, work_dir / ADAPTER_WEIGHTS_FILE, {"format": "pt"})
    return work_dir


def _convert_model(source: Path, unfinished: Path, *, drop_bias: bool, allow_pickle: bool) -> Conversion:
    config = _read_config(source)
    was_scalar = config.num_labels == 1
    config.num_labels = 1
    tensors, infos = _read_tensors(source, allow_pickle=allow_pickle)
    fit = fit_classifier(config, {name: info.shape for name, info in infos.items()})
    if not fit.missing_head and was_scalar and not _is_pickled(infos):
        raise CheckpointError(f"{source} is already a plain scalar-head checkpoint: serve it as it is.")
    value_head, dropped = None, 0.0
    if fit.missing_head:
        value_head = _find_head(source, config, infos, fit)
        dropped = _rename_head(source, tensors, value_head, fit, drop_bias=drop_bias)
    _copy_tokenizer(source, unfinished)
    pad_token_id, pad_notes = _fallback_pad_token(config, unfinished)
    config.get_text_config().pad_token_id = pad_token_id
    notes = (*_unused_notes(fit, value_head), *_normalisation_notes(config), *pad_notes)
    _save(source, unfinished, config, tensors, fit.head)
    return Conversion(
        source=str(source),
        origin=value_head.origin if value_head else "transformers",
        head=value_head.weight if value_head else None,
        dropped_bias=dropped,
        notes=(*notes, *_pooling_notes(unfinished)) if value_head else notes,
    )


def _read_config(source: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} is not a checkpoint of an architecture that transformers supports ({type(error).__name__}): "
            "pass the folder that holds its config.json."
        ) from error
    if not has_classifier(config):
        raise CheckpointError(f"{source} is a {config.model_type} model, for which transformers has no scalar head.")
    return config


def _read_tensors(source: Path, *, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return all tensors and their descriptions, by name; safetensors files are mapped, not copied, into memory."""
    tensors: dict[str, Any] = {}
    infos: dict[str, TensorInfo] = {}
    pickles = pickled_weights(source) if allow_pickle else []
    if not any(source.glob("model*.safetensors")) and pickles:
        files = pickles
    else:
        files = [*weight_files(source), *(file for file in pickles if file.name == PICKLED_VALUE_HEAD_FILE)]
    for file in files:
        for stored_name, tensor in _open_file(file).items():
            name = stored_name.removeprefix(WRAPPER_PREFIX)
            tensors[name] = tensor
            infos[name] = TensorInfo(file, tuple(tensor.shape), str(tensor.dtype))
    return tensors, infos


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


def _is_pickled(infos: Mapping[str, TensorInfo]) -> bool:
    return any(info.file.suffix != ".safetensors" for info in infos.values())


def _find_head(source: Path, config: Any, infos: Mapping[str, TensorInfo], fit: Fit) -> ValueHead:
    hidden_size = config.get_text_config().hidden_size
    value_head = find_value_head(source, {name: infos[name] for name in sorted(fit.unused)}, hidden_size)
    if value_head is None:
        raise CheckpointError(
            f"{source} has no value head, which is one tensor of shape [1, {hidden_size}] outside the body: "
            f"put it into the folder as {VALUE_HEAD_FILE}, or train a reward model with `reward-train`."
        )
    if sum(name.endswith("weight") for name in fit.head) != 1:
        raise CheckpointError(
            f"The head of {fit.architecture} has more layers than a value head ({', '.join(fit.head)}): "
            "only decoders can be converted."
        )
    return value_head


def _rename_head(source: Path, tensors: dict[str, Any], value_head: ValueHead, fit: Fit, *, drop_bias: bool) -> float:
    """Move the value head in ``tensors`` to the classifier's name; return the bias that was dropped, 0.0 if none."""
    stored = tensors if value_head.weight in tensors else load_file(value_head.file)
    (weight_name,) = (name for name in fit.head if name.endswith("weight"))
    tensors[weight_name] = stored.pop(value_head.weight)
    bias = stored.pop(value_head.bias) if value_head.bias else None
    return _dropped_bias(source, bias, drop_bias=drop_bias)


def _dropped_bias(source: Path, bias: Any | None, *, drop_bias: bool) -> float:
    constant = 0.0 if bias is None else float(bias.flatten()[0])
    if constant and not drop_bias:
        raise CheckpointError(
            f"The value head of {source} has a bias of {constant:.6g}, and transformers' classifier has none: "
            "pass --drop-bias if all rewards may shift by this constant (comparisons stay the same)."
        )
    return constant


def _copy_tokenizer(source: Path, unfinished: Path) -> None:
    """Copy the tokenizer's files byte for byte, because saving it again could change its token ids."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, unfinished)


def _fallback_pad_token(config: Any, folder: Path) -> tuple[int | None, Sequence[str]]:
    """Return the pad token that trainers use where the config has none, and the note that reports it."""
    from transformers import AutoTokenizer

    stored = config.get_text_config().pad_token_id
    if stored is not None or not (folder / TOKENIZER_FILE).is_file():
        return stored, ()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    fallback = "tokenizer's pad token" if tokenizer.pad_token_id is not None else "EOS token, as TRL does"
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad_token_id, (f"The config had no pad token; it is now {pad_token_id}, the {fallback}.",)


def _unused_notes(fit: Fit, value_head: ValueHead | None) -> Sequence[str]:
    used = {value_head.weight, value_head.bias} if value_head else set()
    unused = sorted(name for name in fit.unused - used if not name.startswith("lm_head."))
    if not unused:
        return ()
    return (f"{len(unused)} tensors are not used by {fit.architecture} and were left out; the first is {unused[0]}.",)


def _normalisation_notes(config: Any) -> Sequence[str]:
    """Report OpenRLHF's normalisation by a mean and standard deviation of the config, which the service leaves out."""
    if not getattr(config, "normalize_reward", False) or not hasattr(config, "mean"):
        return ()
    return (f"OpenRLHF returned (reward - {config.mean}) / {config.std}; the service returns the raw reward.",)


def _pooling_notes(folder: Path) -> tuple[str, ...]:
    """Value heads pool the last token, whichever it is; transformers skips pad tokens at the end."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    end_tokens = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id not in end_tokens:
        return ()
    return (LAST_POOLING_NOTE,)


def _save(source: Path, unfinished: Path, config: Any, tensors: Mapping[str, Any], head: Sequence[str]) -> None:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    fit = fit_classifier(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    incomplete = [*fit.missing_head, *fit.missing_body, *fit.mismatched_head, *fit.mismatched_body]
    if incomplete:
        raise CheckpointError(
            f"The body in {source} is incomplete: {len(incomplete)} weights are missing or of another shape (the first "
            f"is {incomplete[0]}); save or copy the whole model."
        )
    dtype = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()).most_common(1)[0][0]
    with transformers_silenced():
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype
        )
        for name in head:
            # The head is small and often stored in fp32 although the body is bf16; its dtype is preserved.
            model.get_parameter(name).data = tensors[name].contiguous()
        model.save_pretrained(unfinished)
