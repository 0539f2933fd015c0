"""Converts the output of reward-model training into a checkpoint for the service (``reward-convert``).

TRL, OpenRLHF and LLaMA-Factory store a value head under other names or in a separate file; PEFT stores an adapter.
Published models have further layouts (``export.layouts``). The body is copied unchanged. A linear head is renamed to
what transformers' classifier loads, and a deeper one is described in ``reward_model.json``. The result must pass
validation before its folder appears.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from export.layouts import FoundHead, find_head
from export.stored_model import StoredModel, has_one_label, read_model
from service.checkpoints.adapter import ADAPTER_WEIGHTS_FILE, is_adapter, merge_adapter
from service.checkpoints.architecture import Fit, fit_classifier
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.files import ADAPTER_CONFIG_FILE, CONVERSION_FILE, TOKENIZER_FILE
from service.checkpoints.reward_description import (
    ClassifierHead,
    LayeredHead,
    LinearLayer,
    Provenance,
    RewardDescription,
    TextRule,
    read_description,
    write_description,
)
from service.checkpoints.validation import DECODER_HEAD, describe_names, unplaced_message, validate_layers
from service.checkpoints.weights import VALUE_HEAD_FILE
from service.errors import CheckpointError
from service.outputs import new_folder
from service.records import Activation
from service.settings import ModelSettings
from service.transformers_logging import transformers_silenced

SEPARATE_HEAD = Path(VALUE_HEAD_FILE).stem
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
)
NORMALIZER_PREFIX = "normalizer."
"""Prefix of the running mean and variance that Beaver stores; the service gives rewards without normalisation."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion changed; written into the result as ``conversion.json``."""

    source: str
    """The folder that was converted."""

    origin: str
    """The layout that was recognised, or the library that wrote it."""

    head: tuple[str, ...]
    """The tensors that became the head; empty where the head had the classifier's name already."""

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
    activation: Activation | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write a checkpoint made from ``source`` to ``out``; nothing is written unless it is valid.

    A head that is one linear layer without a bias becomes the classifier's. Another one is stored with all its layers
    and described in ``reward_model.json``, which also has the pooling and what is appended to a text.

    Args:
        source: a checkpoint with a value head, or a PEFT adapter with a scalar or value head.
        out: a folder that does not exist or is empty.
        base: the adapter's base model; required where the adapter names none that can be found.
        drop_bias: leave out the bias of a linear head, so that the result is a plain classifier. That shifts all
            rewards by one constant.
        allow_pickle: also read pickled weights, with torch's restricted unpickler, which allows tensors only.
        activation: the function between the layers of a deeper head of an unknown layout.
        overwrite: replace an earlier conversion in ``out``.

    Raises:
        CheckpointError: there is nothing to convert, or the result would be refused; names the remedy.
        OutputError: ``out`` is not empty, or cannot be written.
    """
    with new_folder(out, overwrite=overwrite, marker=CONVERSION_FILE) as unfinished:
        if is_adapter(source):
            conversion = _convert_adapter(source, unfinished, base, drop_bias=drop_bias)
        else:
            stored = read_model(source, allow_pickle=allow_pickle)
            conversion = _convert_model(stored, unfinished, drop_bias=drop_bias, activation=activation)
        notes = _validate(unfinished, out)
        conversion = dataclasses.replace(conversion, notes=(*conversion.notes, *notes))
        manifest = json.dumps(dataclasses.asdict(conversion), indent=2)
        (unfinished / CONVERSION_FILE).write_text(manifest + "\n", encoding="utf-8")
    return conversion


def _validate(unfinished: Path, out: Path) -> tuple[str, ...]:
    """Open the result as the service does, and return its notes."""
    try:
        return open_checkpoint(unfinished, ModelSettings(path=str(unfinished))).notes
    except CheckpointError as error:
        refusal = str(error).replace(str(unfinished), str(out))
        raise CheckpointError(f"Nothing was written, since the result would be refused: {refusal}") from error


def _convert_adapter(source: Path, unfinished: Path, base: Path | None, *, drop_bias: bool) -> Conversion:
    if not (source / VALUE_HEAD_FILE).is_file():
        merge_adapter(source, unfinished, base)
        if read_description(unfinished) is None:
            write_description(unfinished, RewardDescription(ClassifierHead(), source=Provenance("PEFT")))
        return Conversion(str(source), "PEFT", (), 0.0, ())
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
    write_description(
        unfinished, RewardDescription(ClassifierHead(), pooling="last", source=Provenance("LLaMA-Factory"))
    )
    return Conversion(str(source), "LLaMA-Factory", (weights[0],), dropped, ())


def _put_head_into_adapter(source: Path, work_dir: Path, head: Any) -> Path:
    """Write a copy of the adapter that holds the head as PEFT would have saved it with the task type SEQ_CLS."""
    shutil.copytree(source, work_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin"))
    config = json.loads((source / ADAPTER_CONFIG_FILE).read_bytes())
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (work_dir / ADAPTER_CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(source / ADAPTER_WEIGHTS_FILE) | {"base_model.model.score.weight": head}
    save_file(weights, work_dir / ADAPTER_WEIGHTS_FILE, {"format": "pt"})
    return work_dir


def _convert_model(
    stored: StoredModel, unfinished: Path, *, drop_bias: bool, activation: Activation | None
) -> Conversion:
    source, config = stored.source, stored.config
    _refuse_mean_pooling(stored)
    fit = stored.fit()
    found = _find_head(stored, fit, activation)
    if found is None and not stored.is_pickled and not stored.is_renamed and has_one_label(source):
        raise CheckpointError(f"{source} is already a plain scalar-head checkpoint: serve it as it is.")
    _copy_tokenizer(source, unfinished)
    pad_token_id, pad_notes = _fallback_pad_token(config, unfinished)
    config.get_text_config().pad_token_id = pad_token_id
    bias = _bias(stored, found) if found is not None and found.is_linear else None
    is_plain = found is None or (found.is_linear and (not bias or drop_bias))
    head = _save(stored, unfinished, found, is_plain=is_plain)
    write_description(unfinished, _description(stored, found, head))
    return Conversion(
        source=str(source),
        origin=found.layout if found else "transformers",
        head=found.layers.tensor_names() if found else (),
        dropped_bias=bias if bias and drop_bias else 0.0,
        notes=(*stored.notes, *pad_notes, *_text_notes(found, unfinished)),
    )


def _refuse_mean_pooling(stored: StoredModel) -> None:
    if getattr(stored.config, "pooling", "last") != "last":  # OpenAssistant's models say it in their configuration
        raise CheckpointError(f"{stored.source} reads the {stored.config.pooling} of all states, which is not served.")


def _find_head(stored: StoredModel, fit: Fit, activation: Activation | None) -> FoundHead | None:
    """Return the head that the classifier does not have; None where the classifier's own is complete."""
    outside = {name for name in fit.unplaced if not name.startswith((fit.body_prefix, NORMALIZER_PREFIX))}
    if not fit.missing_head and not outside:
        return None
    modules = {name.partition(".")[0] for name in outside}
    outside |= {name for name in fit.head if name in stored.infos and name.partition(".")[0] in modules}
    hidden_size = stored.config.get_text_config().hidden_size
    if not outside:
        raise CheckpointError(
            f"{stored.source} has no value head, which is one tensor of shape [1, {hidden_size}] outside the body: "
            f"put it into the folder as {VALUE_HEAD_FILE}, or train a reward model with `reward-train`."
        )
    if fit.head != (DECODER_HEAD,):
        raise CheckpointError(
            f"{stored.source} stores {describe_names(sorted(outside))}, but the head of {fit.architecture} has other "
            f"parts ({', '.join(fit.head)}): only decoders can be converted."
        )
    infos = {name: stored.infos[name] for name in sorted(outside)}
    found = find_head(stored.source, stored.config, infos, activation)
    validate_layers(stored.source, found.layers, infos, hidden_size)
    is_separate = all(info.file.stem == SEPARATE_HEAD for info in infos.values())
    return dataclasses.replace(found, layout="LLaMA-Factory") if is_separate else found


def _bias(stored: StoredModel, found: FoundHead) -> float | None:
    """Return the bias of a linear head; None without one."""
    name = found.layers.layers[0].bias
    return None if name is None else float(stored.tensors[name].flatten()[0])


def _description(stored: StoredModel, found: FoundHead | None, head: LayeredHead | None) -> RewardDescription:
    append = getattr(stored.config, "reward_token_id", None) if found is not None else None
    return RewardDescription(
        head=ClassifierHead() if head is None else head,
        pooling=found.pooling if found else "hf",
        text=TextRule(append_token_ids=() if append is None else (int(append),)),
        source=Provenance(found.layout if found else "transformers", stored.architecture),
    )


def _text_notes(found: FoundHead | None, folder: Path) -> Sequence[str]:
    """Report the text of training where the tokenizer has no chat template that would write it."""
    from transformers import AutoTokenizer

    if found is None or not found.text or not (folder / TOKENIZER_FILE).is_file():
        return ()
    if AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template:
        return ()
    return (f"{found.text}: give the tokenizer such a chat template, or send texts of this form.",)


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


def _save(stored: StoredModel, unfinished: Path, found: FoundHead | None, *, is_plain: bool) -> LayeredHead | None:
    """Write configuration and weights; return the head under its stored names, None where it is the classifier's."""
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config, tensors = stored.config, dict(stored.tensors)
    layers = [] if found is None else list(found.layers.layers)
    head = {name: tensors.pop(name) for layer in layers for name in (layer.weight, layer.bias) if name is not None}
    if layers:
        placeholder = torch.zeros(1, config.get_text_config().hidden_size)
        tensors[DECODER_HEAD] = head[layers[0].weight] if is_plain else placeholder
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NORMALIZER_PREFIX)}
    fit = fit_classifier(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _refuse_incomplete(stored.source, fit)
    dtype = Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()).most_common(1)[0][0]
    with transformers_silenced():
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype
        )
        for name in fit.head:
            # The head is small and often stored in fp32 although the body is bf16; its dtype is preserved.
            model.get_parameter(name).data = tensors[name].contiguous()
        if not is_plain:
            model.score = _sequence(layers, head)
        model.save_pretrained(unfinished)
    return None if is_plain else _stored_as(layers)


def _refuse_incomplete(source: Path, fit: Fit) -> None:
    incomplete = [*fit.missing_head, *fit.missing_body, *fit.mismatched_head, *fit.mismatched_body]
    if incomplete:
        raise CheckpointError(
            f"The body in {source} is incomplete: {len(incomplete)} weights are missing or of another shape (the first "
            f"is {incomplete[0]}); save or copy the whole model."
        )
    if fit.unplaced:
        raise CheckpointError(unplaced_message(source, fit))


def _sequence(layers: Sequence[LinearLayer], head: dict[str, Any]) -> Any:
    """Return the layers as modules of the classifier, every second one a place for the activation."""
    from torch import nn

    modules: list[nn.Module] = []
    for layer in layers:
        weight = head[layer.weight]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.contiguous())
        if layer.bias is not None:
            linear.bias = nn.Parameter(head[layer.bias].contiguous())
        modules += [linear, nn.Identity()]
    return nn.Sequential(*modules)


def _stored_as(layers: Sequence[LinearLayer]) -> LayeredHead:
    """Return the layers under the names that ``_sequence`` gives them in the classifier."""
    return LayeredHead(
        tuple(
            LinearLayer(f"score.{2 * place}.weight", layer.bias and f"score.{2 * place}.bias", layer.activation)
            for place, layer in enumerate(layers)
        )
    )
