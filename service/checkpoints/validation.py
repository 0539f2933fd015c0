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
from service.checkpoints.files import CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from service.checkpoints.head_validation import is_described, reads_labels, validate_outputs
from service.checkpoints.labels import labels_message
from service.checkpoints.quantization_format import read_quantization
from service.checkpoints.reward_description import DESCRIPTION_FILE, RewardDescription
from service.checkpoints.weights import TensorInfo, find_non_finite, find_value_head
from service.errors import CheckpointError
from service.records import Pooling

SLOW_TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

DECODER_HEAD = "score.weight"
"""The only parameter of the head of transformers' classifiers of decoders."""

MAX_PLAUSIBLE_TOKENIZER_LIMIT = 10_000_000
"""In tokens. A tokenizer without a limit has a ``model_max_length`` of about 10**30."""


def load_config(path: Path) -> Any:
    """Return transformers' configuration of a checkpoint folder; code from the folder is never run.

    Raises:
        CheckpointError: it is missing, invalid, quantized in a format that is not widened, requires remote code, or is
            of an architecture without a sequence classifier.
    """
    from huggingface_hub.errors import StrictDataclassError

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
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
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
        raise CheckpointError(_pad_token_message(path, pad_token_id, num_rows))


def _pad_token_message(path: Path, pad_token_id: int, num_rows: int) -> str:
    return (
        f"{path / CONFIG_FILE} has pad_token_id {pad_token_id}, but the embedding has {num_rows:,} rows: "
        "set it to the id of the pad token that training used."
    )


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
    return fit


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


def load_tokenizer(path: Path, config: Any, template_name: str | None = None) -> Any:
    """Return the folder's fast tokenizer.

    Args:
        path: the folder.
        config: transformers' configuration of the same folder.
        template_name: the chat template to use where it has several; None: the one named default.

    Raises:
        CheckpointError: there is none, only a slow one, an invalid one, or one that requires remote code; or it has no
            chat template of that name.
    """
    from transformers import AutoTokenizer

    if not (path / TOKENIZER_FILE).is_file():
        raise CheckpointError(_missing_tokenizer_message(path))
    if (path / TOKENIZER_CONFIG_FILE).is_file() and "auto_map" in read_json(path / TOKENIZER_CONFIG_FILE):
        raise CheckpointError(
            f"{path / TOKENIZER_CONFIG_FILE} requires remote code (auto_map), which is never run: remove auto_map, "
            f'and set tokenizer_class to "PreTrainedTokenizerFast" if {TOKENIZER_FILE} is complete.'
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exceptions
        raise CheckpointError(
            f"The tokenizer of {path} cannot be loaded ({type(error).__name__}): save it again with save_pretrained."
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(_missing_tokenizer_message(path))
    _select_template(path, tokenizer, template_name)
    return tokenizer


def _select_template(path: Path, tokenizer: Any, name: str | None) -> None:
    """Make a named chat template the tokenizer's only one; without a name there must be one, or one named default."""
    templates = tokenizer.chat_template
    if name is None and not (isinstance(templates, dict) and "default" not in templates):
        return
    if not isinstance(templates, dict):
        raise CheckpointError(f"{path} has no named chat templates: leave model.chat_template out.")
    if name not in templates:
        problem = "none of them named default" if name is None else "none of that name"
        raise CheckpointError(
            f"{path} has several chat templates, {problem}: set model.chat_template to one of "
            f"{', '.join(sorted(templates))}."
        )
    tokenizer.chat_template = templates[name]


def _missing_tokenizer_message(path: Path) -> str:
    if any((path / name).is_file() for name in SLOW_TOKENIZER_FILES):
        return (
            f"{path} has a slow tokenizer only: write the fast one ({TOKENIZER_FILE}) once with "
            f"`AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})`."
        )
    return f"{path} has no tokenizer: put {TOKENIZER_FILE} and {TOKENIZER_CONFIG_FILE} from its training into it."


def validate_vocabulary(path: Path, tokenizer: Any, embedding_size: int) -> None:
    """Check that every token id of the tokenizer has a row in the embedding.

    Raises:
        CheckpointError: one has none.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= embedding_size:
        raise CheckpointError(
            f"The tokenizer of {path} does not match its weights: token ids go up to {largest:,}, but the embedding "
            f"has {embedding_size:,} rows; use the tokenizer it was trained with, or resize the embedding and train it."
        )


def validate_appended(path: Path, description: RewardDescription | None, embedding_size: int) -> None:
    """Check that every token id that is appended to a text has a row in the embedding.

    Raises:
        CheckpointError: one has none.
    """
    for token_id in description.text.append_token_ids if description else ():
        if not 0 <= token_id < embedding_size:
            raise CheckpointError(
                f"{path / DESCRIPTION_FILE} appends the token id {token_id}, but the embedding has {embedding_size:,} "
                "rows: take both from the same model."
            )


def validate_steps(path: Path, description: RewardDescription | None, embedding_size: int) -> None:
    """Check that a description says where a model that rewards steps is read.

    Raises:
        CheckpointError: it names no marker, no token id where that is needed, or one without a row in the embedding.
    """
    steps = description.steps if description else None
    if steps is None:
        return
    file = path / DESCRIPTION_FILE
    if not steps.marker and steps.marker_token_id is None:
        raise CheckpointError(f"steps in {file} has neither a marker nor a marker_token_id: name what ends a step.")
    if steps.separate and steps.marker_token_id is None:
        raise CheckpointError(f"steps in {file} are tokenized alone, but it has no marker_token_id to put after each.")
    if steps.marker_token_id is not None and not 0 <= steps.marker_token_id < embedding_size:
        raise CheckpointError(
            f"steps in {file} has the marker_token_id {steps.marker_token_id}, but the embedding has "
            f"{embedding_size:,} rows: take both from the same model."
        )


def resolve_pad_token_id(path: Path, config: Any, tokenizer: Any, embedding_size: int) -> int:
    """Return the pad token that pooling skips.

    It is the config's, because transformers' pooling reads no other. Without one in the config, transformers could not
    have trained in batches, so the tokenizer's is used, by which the training batches must have been padded.

    Raises:
        CheckpointError: neither has one, or it has no row in the embedding.
    """
    pad_token_id = config.get_text_config().pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        raise CheckpointError(
            f"{path} has no pad token, and pooling depends on the one that training used: set pad_token_id in "
            f"{CONFIG_FILE} and pad_token in {TOKENIZER_CONFIG_FILE} (TRL takes the EOS token when there is no other)."
        )
    if not 0 <= pad_token_id < embedding_size:
        raise CheckpointError(_pad_token_message(path, pad_token_id, embedding_size))
    return int(pad_token_id)


def with_pad_token_id(config: Any, pad_token_id: int) -> Any:
    """Return a copy of the configuration whose pad token is ``pad_token_id``."""
    padded = copy.deepcopy(config)
    padded.get_text_config().pad_token_id = pad_token_id
    return padded


def resolve_max_input_tokens(path: Path, model_limit: int | None, tokenizer: Any, setting: int | None) -> int:
    """Return the longest input that may be scored, in tokens: the setting, else the smaller of the two limits.

    A tokenizer's limit is often arbitrary, so the setting may exceed it. It may not exceed the model's.

    Args:
        path: the checkpoint folder, for messages.
        model_limit: positions of the model; None: no limit.
        tokenizer: its ``model_max_length`` is the tokenizer's limit.
        setting: ``model.max_input_tokens``; None: not set.

    Raises:
        CheckpointError: the setting exceeds the model's limit, or there is no limit at all.
    """
    tokenizer_limit = tokenizer.model_max_length
    if setting is not None:
        if model_limit is not None and setting > model_limit:
            raise CheckpointError(
                f"model.max_input_tokens is {setting:,}, but {path} takes {model_limit:,} at most: lower the setting."
            )
        return setting
    limits = [
        limit
        for limit in (model_limit, tokenizer_limit)
        if limit is not None and 0 < limit < MAX_PLAUSIBLE_TOKENIZER_LIMIT
    ]
    if not limits:
        raise CheckpointError(f"Neither model nor tokenizer of {path} has a token limit: set model.max_input_tokens.")
    return int(min(limits))


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
