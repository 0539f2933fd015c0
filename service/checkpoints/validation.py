"""Validates a checkpoint folder; each refusal is one sentence that names the problem and the remedy.

Nothing here runs the model or retains a weight: headers are compared with the architecture, and files are read as data.
The functions return values or raise; none changes its arguments.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.checkpoints.architecture import Fit, fit_classifier, has_classifier
from service.checkpoints.files import CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from service.checkpoints.weights import TensorInfo, find_non_finite, find_value_head
from service.errors import CheckpointError

SLOW_TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

MAX_PLAUSIBLE_TOKENIZER_LIMIT = 10_000_000
"""In tokens. A tokenizer without a limit has a ``model_max_length`` of about 10**30."""


def load_config(path: Path) -> Any:
    """Return transformers' configuration of a checkpoint folder; code from the folder is never run.

    Raises:
        CheckpointError: it is missing, invalid, quantized, requires remote code, or is of an architecture without a
            sequence classifier.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

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
    if "quantization_config" in stored:
        raise CheckpointError(
            f"{path} is stored quantized, which changes rewards: "
            "serve the unquantized model, or dequantize it and save it again."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{path / CONFIG_FILE} does not describe a model that this version of transformers supports (model_type "
            f"{stored.get('model_type')!r}, {type(error).__name__}): check model_type and the values, or save it again."
        ) from error
    if not has_classifier(config):
        raise CheckpointError(
            f"{path} is a {config.model_type} model, for which transformers has no sequence classifier that reads one "
            "text: train the reward model on a decoder or an encoder that has one."
        )
    return config


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: copy or save the checkpoint again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object: copy or save the checkpoint again.")
    return content


def validate_weights(path: Path, config: Any, tensors: Mapping[str, TensorInfo]) -> Fit:
    """Return how the stored tensors fit the classifier with one label.

    The comparison requires a head with one output, regardless of the config. So a causal language model, whose config
    has the default of two labels, is distinguished from a classifier with several labels.

    Raises:
        CheckpointError: a weight of head or body is absent or of another shape, which transformers would initialise
            with random numbers, or there is not exactly one label.
    """
    scalar_config = copy.deepcopy(config)
    scalar_config.num_labels = 1
    fit = fit_classifier(scalar_config, {name: tensor.shape for name, tensor in tensors.items()})
    if fit.missing_head:
        unused = {name: tensors[name] for name in sorted(fit.unused)}
        raise CheckpointError(_missing_head_message(path, config, fit.missing_head[0], unused))
    if fit.missing_body:
        raise CheckpointError(
            f"{path} lacks {len(fit.missing_body)} weights of its architecture (the first is {fit.missing_body[0]}), "
            "and transformers would initialise them with random numbers: save or copy the whole model again."
        )
    _validate_one_label(path, config.num_labels, fit)
    for name, (stored, required) in (*fit.mismatched_head.items(), *fit.mismatched_body.items()):
        raise CheckpointError(
            f"The weights of {path} do not match its {CONFIG_FILE}: {name} is stored as {list(stored)}, but the config "
            f"requires {list(required)}; take both from the same model."
        )
    return fit


def _missing_head_message(path: Path, config: Any, head: str, unused: Mapping[str, TensorInfo]) -> str:
    problem = f"{path} has no scalar head ({head} is absent, and transformers would serve a random one): "
    value_head = find_value_head(path, unused, config.get_text_config().hidden_size)
    if value_head is not None:
        return (
            f"{problem}it has a value head as {value_head.origin} stores it ({value_head.weight} in "
            f"{value_head.file.name}), so run `reward-convert {path} OUT` and serve OUT."
        )
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


def _validate_one_label(path: Path, num_labels: int, fit: Fit) -> None:
    for name, (stored, required) in fit.mismatched_head.items():
        if stored[0] != 1 == required[0]:
            raise CheckpointError(
                f"{path} gives {stored[0]} numbers per text, not one reward ({name} is stored as {list(stored)}): "
                "serve a model that was trained with num_labels=1."
            )
    if num_labels != 1:
        raise CheckpointError(
            f"{path / CONFIG_FILE} has {num_labels} labels, but the stored head has one: "
            f"run `reward-convert {path} OUT`, or set num_labels to 1 and remove id2label and label2id."
        )


def load_tokenizer(path: Path, template_name: str | None = None) -> Any:
    """Return the folder's fast tokenizer.

    Args:
        path: the checkpoint folder.
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
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
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
        raise CheckpointError(
            f"{path / CONFIG_FILE} has pad_token_id {pad_token_id}, but the embedding has {embedding_size:,} rows: "
            "set it to the id of the pad token that training used."
        )
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


def notes_on(config: Any, tokenizer: Any) -> Iterator[str]:
    """Yield a sentence for each unusual property that is not a reason to refuse, but may explain a reward.

    Args:
        config: with the resolved pad token.
        tokenizer: tokenizer of the same checkpoint.
    """
    pad_token_id = config.get_text_config().pad_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != pad_token_id:
        yield (
            f"The pad token is {pad_token_id} in {CONFIG_FILE} and {tokenizer.pad_token_id} in the tokenizer; "
            "pooling follows config.json, as in transformers."
        )
    if pad_token_id == tokenizer.eos_token_id:
        yield "The pad token is the EOS token, so transformers' pooling skips EOS at a text's end (see model.pooling)."
    if tokenizer.chat_template and "strftime_now" in tokenizer.get_chat_template():
        yield "The chat template writes today's date into every prompt, so rewards may change from day to day."
