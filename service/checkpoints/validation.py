"""Judges what a checkpoint folder holds; what cannot be trusted is refused, in one sentence that says what to do.

Nothing here runs the model or keeps a weight: headers are compared with the architecture, and files are read as data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.checkpoints.architecture import Fit, fit_classifier, has_classifier
from service.checkpoints.weights import TensorInfo, find_non_finite, find_value_head
from service.errors import CheckpointError

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SLOW_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

SANE_TOKENIZER_LIMIT = 10_000_000
"""A tokenizer without a limit of its own says something like 10**30."""


def read_config(path: Path) -> Any:
    """Return transformers' configuration of a checkpoint folder; code of the folder's own is never run.

    Raises:
        CheckpointError: it is missing, broken, quantized, asks for remote code, or is of no architecture with a
            sequence classifier.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} is no checkpoint: it has no {CONFIG_FILE}; pass the folder that save_pretrained wrote."
        )
    stored = read_json(path / CONFIG_FILE)
    if "auto_map" in stored:
        raise CheckpointError(
            f"{path / CONFIG_FILE} asks for code of its own (auto_map), which is never run: if transformers knows the "
            "architecture, remove auto_map; else save the model as an architecture that it knows."
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
            f"{path / CONFIG_FILE} does not describe a model that this version of transformers knows (model_type "
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
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: copy or save the checkpoint again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object: copy or save the checkpoint again.")
    return content


def fit_to_architecture(path: Path, config: Any, tensors: Mapping[str, TensorInfo]) -> Fit:
    """Return how the stored tensors fit the classifier; from here on the config says one label.

    The head is expected to have one row whatever the config says, so that a causal language model, whose config has the
    default of two labels, is told from a classifier of many.

    Raises:
        CheckpointError: the head or another weight is absent or of another shape, which transformers would patch up
            with random numbers, or there is not exactly one label.
    """
    num_labels = config.num_labels
    config.num_labels = 1
    fit = fit_classifier(config, {name: tensor.shape for name, tensor in tensors.items()})
    if fit.missing_head:
        unplaced = {name: tensors[name] for name in sorted(fit.unplaced)}
        raise CheckpointError(_missing_head_sentence(path, config, fit.missing_head[0], unplaced))
    if fit.missing_body:
        raise CheckpointError(
            f"{path} lacks {len(fit.missing_body)} weights of its architecture (the first is {fit.missing_body[0]}), "
            "and transformers would fill them with random numbers: save or copy the whole model again."
        )
    _refuse_other_than_one_label(path, num_labels, fit)
    for name, (stored, needed) in (*fit.mismatched_head.items(), *fit.mismatched_body.items()):
        raise CheckpointError(
            f"{path} does not belong together: {name} is stored as {list(stored)}, but {CONFIG_FILE} makes it "
            f"{list(needed)}; take both from the same model."
        )
    return fit


def _missing_head_sentence(path: Path, config: Any, head: str, unplaced: Mapping[str, TensorInfo]) -> str:
    problem = f"{path} has no scalar head ({head} is absent, and transformers would serve a random one): "
    value_head = find_value_head(path, unplaced, config.get_text_config().hidden_size)
    if value_head is not None:
        return (
            f"{problem}it has a value head as {value_head.origin} writes it ({value_head.weight} in "
            f"{value_head.file.name}), so run `reward-convert {path} OUT` and serve OUT."
        )
    if (path / "value_head.bin").is_file():
        return (
            f"{problem}its head may be in value_head.bin, a pickle; if you trust it, run "
            f"`reward-convert --allow-pickle {path} OUT` and serve OUT."
        )
    is_causal_lm = any(name.startswith("lm_head.") for name in unplaced) or any(
        name.endswith("ForCausalLM") for name in config.architectures or ()
    )
    what = "it is a causal language model" if is_causal_lm else "it is a bare model"
    return (
        f"{problem}{what}, so save the classifier that was trained, train one with `reward-train`, or, if its head is "
        "in a file of its own, put that beside the weights as value_head.safetensors and run `reward-convert`."
    )


def _refuse_other_than_one_label(path: Path, num_labels: int, fit: Fit) -> None:
    for name, (stored, needed) in fit.mismatched_head.items():
        if stored[0] != 1 == needed[0]:
            raise CheckpointError(
                f"{path} gives {stored[0]} numbers per text, not one reward ({name} is stored as {list(stored)}): "
                "serve a model that was trained with num_labels=1."
            )
    if num_labels != 1:
        raise CheckpointError(
            f"{path / CONFIG_FILE} says {num_labels} labels, but the stored head has one: "
            f"run `reward-convert {path} OUT`, or set num_labels to 1 and remove id2label and label2id."
        )


def read_tokenizer(path: Path) -> Any:
    """Return the folder's fast tokenizer.

    Raises:
        CheckpointError: there is none, only a slow one, a broken one, or one that asks for remote code.
    """
    from transformers import AutoTokenizer

    if not (path / TOKENIZER_FILE).is_file():
        raise CheckpointError(_missing_tokenizer_sentence(path))
    if (path / TOKENIZER_CONFIG_FILE).is_file() and "auto_map" in read_json(path / TOKENIZER_CONFIG_FILE):
        raise CheckpointError(
            f"{path / TOKENIZER_CONFIG_FILE} asks for code of its own (auto_map), which is never run: remove auto_map, "
            f'and set tokenizer_class to "PreTrainedTokenizerFast" if {TOKENIZER_FILE} is complete.'
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exceptions
        raise CheckpointError(
            f"The tokenizer of {path} cannot be loaded ({type(error).__name__}): save it again with save_pretrained."
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(_missing_tokenizer_sentence(path))
    return tokenizer


def _missing_tokenizer_sentence(path: Path) -> str:
    if any((path / name).is_file() for name in SLOW_TOKENIZER_FILES):
        return (
            f"{path} has a slow tokenizer only: write the fast one ({TOKENIZER_FILE}) once with "
            f"`AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})`."
        )
    return f"{path} has no tokenizer: put {TOKENIZER_FILE} and {TOKENIZER_CONFIG_FILE} from its training into it."


def refuse_oversized_tokenizer(path: Path, tokenizer: Any, embedding_size: int) -> None:
    """Refuse a tokenizer whose ids reach beyond the embedding's rows.

    Raises:
        CheckpointError: it does.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= embedding_size:
        raise CheckpointError(
            f"{path} does not belong together: its tokenizer gives ids up to {largest:,}, but the embedding has "
            f"{embedding_size:,} rows; use the tokenizer it was trained with, or resize the embedding and train it."
        )


def settle_pad_token(path: Path, config: Any, tokenizer: Any, embedding_size: int) -> int:
    """Return the pad token that pooling skips, and set it in the config if that has none.

    It is the config's, because transformers pools by it and by nothing else. Where the config has none, transformers
    could not have trained in batches, so the tokenizer's is taken, by which the batches must have been padded.

    Raises:
        CheckpointError: neither names one, or it is no row of the embedding.
    """
    text_config = config.get_text_config()
    pad_token_id = text_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        raise CheckpointError(
            f"{path} has no pad token, and pooling needs to know which one training used: set pad_token_id in "
            f"{CONFIG_FILE} and pad_token in {TOKENIZER_CONFIG_FILE} (TRL takes the EOS token when there is no other)."
        )
    if not 0 <= pad_token_id < embedding_size:
        raise CheckpointError(
            f"{path / CONFIG_FILE} has pad_token_id {pad_token_id}, but the embedding has {embedding_size:,} rows: "
            "set it to the id of the pad token that training used."
        )
    text_config.pad_token_id = pad_token_id
    return int(pad_token_id)


def settle_limit(path: Path, model_limit: int | None, tokenizer: Any, wanted: int | None) -> int:
    """Return the longest text to be scored, in tokens: what is wanted, else the smaller of the two limits.

    A tokenizer's limit is often a habit of its author, so a setting may go beyond it; beyond the model's it may not.

    Raises:
        CheckpointError: the model cannot read so far, or nobody names a limit.
    """
    tokenizer_limit = tokenizer.model_max_length
    if wanted is not None:
        if model_limit is not None and wanted > model_limit:
            raise CheckpointError(
                f"model.max_input_tokens is {wanted:,}, but {path} takes {model_limit:,} at most: lower the setting."
            )
        return wanted
    limits = [
        limit for limit in (model_limit, tokenizer_limit) if limit is not None and 0 < limit < SANE_TOKENIZER_LIMIT
    ]
    if not limits:
        raise CheckpointError(f"Neither model nor tokenizer of {path} has a token limit: set model.max_input_tokens.")
    return int(min(limits))


def refuse_non_finite(path: Path, files: Iterable[Path]) -> None:
    """Refuse weights with NaN or infinity; every tensor is read once.

    Raises:
        CheckpointError: there is one; names the tensor.
    """
    spoilt = find_non_finite(files)
    if spoilt is not None:
        raise CheckpointError(
            f"{path} holds NaN or infinity in {spoilt}: its training diverged or the file is damaged; "
            "serve an earlier checkpoint."
        )


def unusual_facts(config: Any, tokenizer: Any) -> Iterator[str]:
    """Yield a sentence for each thing that is no reason to refuse, but may explain a reward some day."""
    pad_token_id = config.get_text_config().pad_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != pad_token_id:
        yield (
            f"config.json pads with token {pad_token_id}, the tokenizer with {tokenizer.pad_token_id}; "
            "pooling follows config.json, as transformers does."
        )
    if pad_token_id == tokenizer.eos_token_id:
        yield "The pad token is the EOS token, so transformers' pooling skips EOS at a text's end (see model.pooling)."
    if tokenizer.chat_template and "strftime_now" in tokenizer.get_chat_template():
        yield "The chat template writes today's date into every prompt, so rewards may change from day to day."
