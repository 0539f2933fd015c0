"""Converts the output of reward-model training into a checkpoint for the service (``reward-convert``).

TRL, OpenRLHF and LLaMA-Factory store a value head under other names or in a separate file; PEFT stores an adapter.
Published models have further layouts (``export.layouts``). The body is copied unchanged. A linear head is renamed to
what transformers' classifier loads, and a deeper one is described in ``reward_model.json``. The result must pass
validation before its folder appears.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from export.adapter_conversion import convert_adapter, refuse_adapter
from export.conversion import Conversion
from export.conversion_options import ConversionOptions
from export.converted_head import ConvertedHead, head_module, layered_head
from export.copied_tokenizer import copy_tokenizer, fallback_pad_token, text_notes, write_chat_template
from export.ensemble import ensemble_of, heads_in_file, require_equal_bodies
from export.gated_layouts import GateOptions, gated_head, is_gated
from export.layouts import find_head
from export.process_layouts import ProcessLayout, label_token_ids, process_layout_of, step_rule, with_step_outputs
from export.stored_model import StoredModel, has_one_label, read_model
from export.token_logits import TokenLogits, token_logits_head
from service.checkpoints.adapter import is_adapter
from service.checkpoints.architecture import Fit, fit_classifier
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.described_heads import LayeredHead, LinearLayer
from service.checkpoints.files import CONVERSION_FILE
from service.checkpoints.head_validation import validate_head
from service.checkpoints.reward_description import (
    ClassifierHead,
    MeanOfOutputs,
    Provenance,
    RewardDescription,
    TextRule,
    write_description,
)
from service.checkpoints.validation import DECODER_HEAD, describe_names, unplaced_message
from service.checkpoints.weights import VALUE_HEAD_FILE
from service.errors import CheckpointError
from service.outputs import new_folder
from service.settings import ModelSettings
from service.transformers_logging import transformers_silenced

SEPARATE_HEAD = Path(VALUE_HEAD_FILE).stem
NORMALIZER_PREFIX = "normalizer."
"""Prefix of the running mean and variance that Beaver stores; the service gives rewards without normalisation."""


def convert(source: Path, out: Path, *, overwrite: bool = False, **options: Any) -> Conversion:
    """Write a checkpoint made from ``source`` to ``out``; nothing is written unless it is valid.

    A head that is one linear layer without a bias becomes the classifier's. Another one is stored with all its layers
    and described in ``reward_model.json``, which also has the pooling and what is appended to a text.

    Args:
        source: a checkpoint with a value head or of a known layout, a causal language model of which tokens are read,
            or a PEFT adapter with a scalar or value head.
        out: a folder that does not exist or is empty.
        overwrite: replace an earlier conversion in ``out``.
        options: fields of ``ConversionOptions``.

    Raises:
        CheckpointError: there is nothing to convert, or the result would be refused; names the remedy.
        OutputError: ``out`` is not empty, or cannot be written.
    """
    chosen = ConversionOptions(**options)
    with new_folder(out, overwrite=overwrite, marker=CONVERSION_FILE) as unfinished:
        if is_adapter(source):
            refuse_adapter(source, chosen)
            conversion = convert_adapter(source, unfinished, chosen.base, drop_bias=chosen.drop_bias)
        else:
            conversion = _convert_model(read_model(source, allow_pickle=chosen.allow_pickle), unfinished, chosen)
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


def _convert_model(stored: StoredModel, unfinished: Path, options: ConversionOptions) -> Conversion:
    source, config = stored.source, stored.config
    _refuse_mean_pooling(stored)
    process = process_layout_of(config, options.process)
    found = _find_head(stored, options) if process is None else _process_head(stored, options, process)
    if found is None and not stored.is_pickled and not stored.is_renamed and has_one_label(source):
        raise CheckpointError(f"{source} is already a plain scalar-head checkpoint: serve it as it is.")
    copy_tokenizer(source, unfinished, options.chat_template)
    if process is not None and process.chat_template and options.chat_template is None:
        write_chat_template(unfinished, process.chat_template)
    pad_token_id, pad_notes = fallback_pad_token(config, unfinished)
    config.get_text_config().pad_token_id = pad_token_id
    layer = None if found is None else found.linear
    bias = (
        None if found is None or layer is None or layer.bias is None else float(found.tensors[layer.bias].flatten()[0])
    )
    is_linear = layer is not None and (not bias or options.drop_bias)
    is_plain = found is None or (is_linear and found.combine is None)
    _save(stored, unfinished, found, is_plain=is_plain)
    description = _description(stored, None if is_plain else found, found)
    if process is not None:
        description = msgspec.structs.replace(description, steps=step_rule(process, unfinished))
    write_description(unfinished, description)
    return Conversion(
        source=str(source),
        origin=found.layout if found else "transformers",
        head=found.sources if found else (),
        dropped_bias=bias if bias and options.drop_bias else 0.0,
        notes=(*stored.notes, *pad_notes, *text_notes(found, unfinished), *(found.notes if found else ())),
    )


def _refuse_mean_pooling(stored: StoredModel) -> None:
    if getattr(stored.config, "pooling", "last") != "last":  # OpenAssistant's models say it in their configuration
        raise CheckpointError(f"{stored.source} reads the {stored.config.pooling} of all states, which is not served.")


def _find_head(stored: StoredModel, options: ConversionOptions) -> ConvertedHead | None:
    """Return the head that the result has; None where it is the classifier's own, complete in the source."""
    if options.token_logits is not None:
        return token_logits_head(stored, options.token_logits)
    found = _own_head(stored, options)
    return found if not options.members else _ensemble(stored, found, options)


def _process_head(stored: StoredModel, options: ConversionOptions, process: ProcessLayout) -> ConvertedHead:
    """Return the head of a process reward model, with the names of its outputs."""
    if process.label_tokens is not None:
        found: ConvertedHead | None = token_logits_head(
            stored, TokenLogits("probability", label_token_ids(process, stored.source))
        )
    else:
        found = _own_head(stored, dataclasses.replace(options, outputs=process.outputs))
    if found is None:
        raise CheckpointError(
            f"{stored.source} has the classifier's own head, and the layout {process.name} has another: serve it as it "
            "is, with steps in its reward_model.json."
        )
    return dataclasses.replace(with_step_outputs(found, process), layout=process.name)


def _ensemble(stored: StoredModel, first: ConvertedHead | None, options: ConversionOptions) -> ConvertedHead:
    """Return the heads of the source and of the further members as one head."""
    fit = stored.fit()
    heads = [first or _classifier_head(stored, fit)]
    for member in options.members:
        if member.is_file():
            heads += heads_in_file(member, stored.config.get_text_config().hidden_size, heads[0])
            continue
        other = read_model(member, allow_pickle=options.allow_pickle)
        require_equal_bodies(stored, other, fit.body_prefix)
        heads.append(_own_head(other, options) or _classifier_head(other, other.fit()))
    return ensemble_of(heads, options.combine or MeanOfOutputs())


def _classifier_head(stored: StoredModel, fit: Fit) -> ConvertedHead:
    """Return the head that the classifier of a decoder has."""
    if fit.head != (DECODER_HEAD,) or DECODER_HEAD not in stored.tensors:
        raise CheckpointError(f"{stored.source} has no head on the state of one token, so it is no member.")
    return layered_head([LinearLayer(DECODER_HEAD)], stored.tensors, layout="transformers", pooling="hf")


def _own_head(stored: StoredModel, options: ConversionOptions) -> ConvertedHead | None:
    """Return the head of a source that the classifier does not have; None where the classifier's own is complete."""
    fit = stored.fit()
    outside = {name for name in fit.unplaced if not name.startswith((fit.body_prefix, NORMALIZER_PREFIX))}
    outside |= set(fit.mismatched_head)
    if not fit.missing_head and not outside:
        return None
    modules = {name.partition(".")[0] for name in outside}
    outside |= {name for name in fit.head if name in stored.infos and name.partition(".")[0] in modules}
    hidden_size = stored.config.get_text_config().hidden_size
    if not outside:
        raise CheckpointError(
            f"{stored.source} has no value head, which is one tensor of shape [1, {hidden_size}] outside the body: "
            f"put it into the folder as {VALUE_HEAD_FILE}, train a reward model with `reward-train`, or pass "
            "--log-odds with two tokens whose logits are the reward."
        )
    if outside <= set(fit.head):
        raise CheckpointError(
            f"{stored.source} is a classifier with several labels, which is not converted: serve it as it is, with "
            "model.outputs or model.class_reward."
        )
    if fit.head != (DECODER_HEAD,):
        raise CheckpointError(
            f"{stored.source} stores {describe_names(sorted(outside))}, but the head of {fit.architecture} has other "
            f"parts ({', '.join(fit.head)}): only decoders can be converted."
        )
    if is_gated(outside):
        return gated_head(stored, outside, GateOptions(options.gate_pattern, options.outputs))
    infos = {name: stored.infos[name] for name in sorted(outside)}
    found = find_head(stored.source, stored.config, infos, options.activation)
    width = validate_head(stored.source, LayeredHead(found.layers), infos, hidden_size)
    is_separate = all(info.file.stem == SEPARATE_HEAD for info in infos.values())
    return layered_head(
        found.layers,
        stored.tensors,
        layout="LLaMA-Factory" if is_separate else found.layout,
        outputs=_outputs(stored, width, options),
        pooling=found.pooling,
        text=found.text,
    )


def _outputs(stored: StoredModel, width: int, options: ConversionOptions) -> tuple[str, ...]:
    """Return the names of the numbers that a head gives."""
    if options.outputs and len(options.outputs) != width:
        raise CheckpointError(
            f"--outputs has {len(options.outputs)} names, but the head of {stored.source} gives {width} numbers."
        )
    if width > 1 and not options.outputs:
        raise CheckpointError(
            f"The head of {stored.source} gives {width} numbers per text, not one reward: pass --outputs with a name "
            "for each."
        )
    return options.outputs or ("reward",)


def _description(
    stored: StoredModel, described: ConvertedHead | None, found: ConvertedHead | None
) -> RewardDescription:
    append = getattr(stored.config, "reward_token_id", None) if found is not None else None
    return RewardDescription(
        head=ClassifierHead() if described is None else described.head,
        outputs=("reward",) if described is None else described.outputs,
        combine=None if described is None else described.combine,
        pooling=found.pooling if found else "hf",
        text=TextRule(append_token_ids=() if append is None else (int(append),)),
        source=Provenance(found.layout if found else "transformers", stored.architecture),
    )


def _save(stored: StoredModel, unfinished: Path, found: ConvertedHead | None, *, is_plain: bool) -> None:
    """Write configuration and weights, with the head in place of the classifier's."""
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config, tensors = stored.config, dict(stored.tensors)
    if found is not None:
        outside = set(found.sources) - {stored.fit().embedding}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in outside}
        layer = found.linear
        placeholder = torch.zeros(1, config.get_text_config().hidden_size)
        tensors[DECODER_HEAD] = found.tensors[layer.weight] if is_plain and layer is not None else placeholder
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
        if found is not None and not is_plain:
            model.score = head_module(found.tensors)
        model.save_pretrained(unfinished)


def _refuse_incomplete(source: Path, fit: Fit) -> None:
    incomplete = [*fit.missing_head, *fit.missing_body, *fit.mismatched_head, *fit.mismatched_body]
    if incomplete:
        raise CheckpointError(
            f"The body in {source} is incomplete: {len(incomplete)} weights are missing or of another shape (the first "
            f"is {incomplete[0]}); save or copy the whole model."
        )
    if fit.unplaced:
        raise CheckpointError(unplaced_message(source, fit))
