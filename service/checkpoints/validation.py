"""Validates a checkpoint folder; each refusal is one sentence that names the problem and the remedy.

Nothing here runs the model or retains a weight: headers are compared with the architecture, and files are read as data.
The functions return values or raise; none changes its arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.checkpoints.architecture import Fit, fit_classifier, has_classifier
from service.checkpoints.configuration import read_config, read_json
from service.checkpoints.described_heads import ClassifierHead, DescribedHead
from service.checkpoints.files import CONFIG_FILE
from service.checkpoints.head_validation import is_described, reads_labels, validate_outputs
from service.checkpoints.labels import labels_message
from service.checkpoints.quantization_format import read_quantization
from service.checkpoints.reward_description import DESCRIPTION_FILE, RewardDescription
from service.checkpoints.tokenizer_validation import pad_token_message
from service.checkpoints.weights import TensorInfo, find_non_finite, find_value_head
from service.errors import CheckpointError
from service.records import Pooling

DECODER_HEAD = "score.weight"
"""The only parameter of the head of transformers' classifiers of decoders."""


def load_config(path: Path) -> Any:
    """Return transformers' configuration of a checkpoint folder; code from the folder is never run.

    Raises:
        CheckpointError: it is missing, invalid, quantized in a format that is not widened, requires remote code, or is
            of an architecture without a sequence classifier.
    """
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {CONFIG_FILE}; pass the folder that save_pretrained wrote."
        )
    stored = read_json(path / CONFIG_FILE)
    if "auto_map" in stored:
        raise CheckpointError(
            f"{path / CONFIG_FILE} requires remote code (auto_map), which is never run: if transformers supports the "
            "architecture, remove auto_map; otherwise save the model as a supported architecture."
        )
    read_quantization(path)
    try:
        config = read_config(path)
    except CheckpointError:
        raise
    except Exception as error:  # the classes of transformers raise anything
        raise CheckpointError(
            f"{path / CONFIG_FILE} does not describe a model that this version of transformers supports (model_type "
            f"{stored.get('model_type')!r}, {type(error).__name__}): check model_type and the values, or save it again."
        ) from error
    if not has_classifier(config):
        raise CheckpointError(
            f"{path} is a {config.model_type} model, for which transformers has no sequence classifier that reads one "
            "text: train the reward model on a decoder or an encoder that has one."
        )
    _validate_pad_token(path, config)
    return config


def _validate_pad_token(path: Path, config: Any) -> None:
    """Check that the pad token is in the vocabulary; otherwise transformers could not even build the embedding."""
    text_config = config.get_text_config()
    pad_token_id, num_rows = text_config.pad_token_id, getattr(text_config, "vocab_size", None)
    if pad_token_id is not None and num_rows is not None and pad_token_id >= num_rows:
        raise CheckpointError(pad_token_message(path, pad_token_id, num_rows))


def validate_weights(
    path: Path, config: Any, tensors: Mapping[str, TensorInfo], description: RewardDescription | None = None
) -> Fit:
    """Return how the stored tensors fit the classifier.

    Without a description the comparison requires a head with one output, regardless of the config. So a causal
    language model, whose config has the default of two labels, is distinguished from a classifier with several labels.
    A description of the classifier's own head says what its labels are. The tensors of a described head take the place
    of the classifier's head.

    Raises:
        CheckpointError: a weight of head or body is absent or of another shape, which transformers would initialise
            with random numbers, there are several labels without a description, or a stored tensor that may belong to
            the computation of a reward has no place in the architecture.
    """
    fitted_config = copy.deepcopy(config)
    fitted_config.num_labels = config.num_labels if reads_labels(description) else 1
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if description is not None:
        hidden_size = config.get_text_config().hidden_size
        validate_outputs(path / DESCRIPTION_FILE, description, tensors, hidden_size, config.num_labels)
        if not isinstance(description.head, ClassifierHead):
            shapes = _with_classifier_head(shapes, description.head, config)
    try:
        fit = fit_classifier(fitted_config, shapes)
    except Exception as error:  # transformers' model classes raise anything
        raise CheckpointError(
            f"transformers cannot build the {config.model_type} classifier that {path / CONFIG_FILE} describes "
            f"({type(error).__name__}): check its values; if they are right, the architecture is not supported."
        ) from error
    _validate_fit(path, config, tensors, description, fit)
    return fit


def _validate_fit(
    path: Path, config: Any, tensors: Mapping[str, TensorInfo], description: RewardDescription | None, fit: Fit
) -> None:
    if is_described(description) and fit.missing_head:
        raise CheckpointError(
            f"{path / DESCRIPTION_FILE} describes a head on the state of one token, but {fit.architecture} pools in "
            "its own head: only decoders can have such a head."
        )
    if fit.missing_head:
        unused = {name: tensors[name] for name in sorted(fit.unused)}
        raise CheckpointError(_missing_head_message(path, config, fit, unused))
    if fit.missing_body:
        raise CheckpointError(
            f"{path} lacks {len(fit.missing_body)} weights of its architecture (the first is {fit.missing_body[0]}), "
            "and transformers would initialise them with random numbers: save or copy the whole model again."
        )
    if description is None or not (is_described(description) or reads_labels(description)):
        _validate_one_label(path, config, fit)
    if fit.unplaced:
        raise CheckpointError(unplaced_message(path, fit))
    for name, (stored, required) in (*fit.mismatched_head.items(), *fit.mismatched_body.items()):
        raise CheckpointError(
            f"The weights of {path} do not match its {CONFIG_FILE}: {name} is stored as {list(stored)}, but the config "
            f"requires {list(required)}; take both from the same model."
        )


def _validate_one_label(path: Path, config: Any, fit: Fit) -> None:
    for stored, required in fit.mismatched_head.values():
        if stored[0] != 1 == required[0]:
            raise CheckpointError(labels_message(path, config, stored[0]))
    if config.num_labels != 1:
        raise CheckpointError(
            f"{path / CONFIG_FILE} has {config.num_labels} labels, but the stored head has one: "
            f"run `reward-convert {path} OUT`, or set num_labels to 1 and remove id2label and label2id."
        )


def _with_classifier_head(
    shapes: Mapping[str, tuple[int, ...]], head: DescribedHead, config: Any
) -> dict[str, tuple[int, ...]]:
    """Return the shapes with the classifier's linear layer, as decoders have it, in place of the described head."""
    described = set(head.tensor_names())
    others = {name: shape for name, shape in shapes.items() if name not in described}
    return others | {DECODER_HEAD: (1, config.get_text_config().hidden_size)}


def _missing_head_message(path: Path, config: Any, fit: Fit, unused: Mapping[str, TensorInfo]) -> str:
    head = fit.missing_head[0]
    problem = f"{path} has no scalar head ({head} is absent, and transformers would serve a random one): "
    convert = f"so run `reward-convert {path} OUT` and serve OUT."
    prefixed = [name for name in unused if name.endswith(f".{fit.embedding.removeprefix(fit.body_prefix)}")]
    if fit.missing_body and prefixed:
        return f"{problem}the names of its weights have a prefix ({prefixed[0]}), {convert}"
    value_head = find_value_head(path, unused, config.get_text_config().hidden_size)
    if value_head is not None:
        return (
            f"{problem}it has a value head as {value_head.origin} stores it ({value_head.weight} in "
            f"{value_head.file.name}), {convert}"
        )
    outside = [name for name in fit.unplaced if not name.startswith(fit.body_prefix)]
    if outside:
        return f"{problem}it stores {describe_names(outside)} instead, {convert}"
    if (path / "value_head.bin").is_file():
        return (
            f"{problem}its head may be in value_head.bin, a pickle; if you trust it, run "
            f"`reward-convert --allow-pickle {path} OUT` and serve OUT."
        )
    is_causal_lm = any(name.startswith("lm_head.") for name in unused) or any(
        name.endswith("ForCausalLM") for name in config.architectures or ()
    )
    kind = "it is a causal language model" if is_causal_lm else "it is a model without a head"
    return (
        f"{problem}{kind}, so save the classifier that was trained, train one with `reward-train`, or, if its head is "
        "in a separate file, put that beside the weights as value_head.safetensors and run `reward-convert`."
    )


def unplaced_message(path: Path, fit: Fit) -> str:
    """Return the refusal of a checkpoint with stored tensors that have no place in the architecture."""
    names = fit.unplaced
    problem = (
        f"{path} stores {describe_names(names)}, which {fit.architecture} under this {CONFIG_FILE} has no place for, "
        "so rewards would be computed without them: "
    )
    if any(".lora_" in name for name in names):
        return f"{problem}merge the LoRA matrices into the base weights (PEFT's merge_and_unload), and save again."
    if all(name.startswith(tuple(f"{head.rpartition('.')[0]}." for head in fit.head)) for name in names):
        return (
            f"{problem}the head has parts that the classifier has not; run `reward-convert {path} OUT` and serve OUT."
        )
    return f"{problem}take {CONFIG_FILE} and weights from the same model."


def describe_names(names: Sequence[str], shown: int = 4) -> str:
    """Return the first names of tensors as a text, with the number of the others."""
    text = ", ".join(names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more tensors"


def validate_finite(path: Path, files: Iterable[Path]) -> None:
    """Check that no weight is NaN or infinite; every tensor is read once.

    Raises:
        CheckpointError: one is; names its tensor.
    """
    tensor = find_non_finite(files)
    if tensor is not None:
        raise CheckpointError(
            f"{path} has NaN or infinity in {tensor}: its training diverged or the file is damaged; "
            "serve an earlier checkpoint."
        )


def notes_on(config: Any, tokenizer: Any, pooling: Pooling) -> Iterator[str]:
    """Yield a sentence for each unusual property that is not a reason to refuse, but may explain a reward.

    Args:
        config: with the resolved pad token.
        tokenizer: tokenizer of the same checkpoint.
        pooling: the resolved pooling.
    """
    pad_token_id = config.get_text_config().pad_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != pad_token_id:
        yield (
            f"The pad token is {pad_token_id} in {CONFIG_FILE} and {tokenizer.pad_token_id} in the tokenizer; "
            "pooling follows config.json, as in transformers."
        )
    if pad_token_id == tokenizer.eos_token_id and pooling == "hf":
        yield "The pad token is the EOS token, so transformers' pooling skips EOS at a text's end (see model.pooling)."
    if tokenizer.chat_template and "strftime_now" in tokenizer.get_chat_template():
        yield "The chat template writes today's date into every prompt, so rewards may change from day to day."
    yield from _normalisation_notes(config)


def _normalisation_notes(config: Any) -> Iterator[str]:
    """Yield a sentence on what the training code does to the head's output and the service does not."""
    mean, std, variance = (getattr(config, name, None) for name in ("mean", "std", "var"))
    if getattr(config, "normalize_reward", False) and mean is not None and std is not None:
        yield f"OpenRLHF returned (reward - {mean}) / {std}; the service returns the raw reward."
    if getattr(config, "do_normalize", False):
        center = "" if getattr(config, "score_type", "reward") == "cost" else f" less its mean ({mean})"
        yield (
            f"Beaver returned the output of its head{center} divided by the root of its variance ({variance}); the "
            "service returns the raw output."
        )
    if getattr(config, "score_type", None) == "cost":
        yield "The model gives costs, not rewards: a higher number is worse."
    settings = getattr(config, "sentence_transformers", None) or {}
    activation = settings.get("activation_fn") if isinstance(settings, dict) else None
    activation = activation or getattr(config, "sbert_ce_default_activation_function", None)
    if activation and not str(activation).endswith("Identity"):
        yield f"sentence-transformers applies {activation} to the output; the service returns the raw output."
