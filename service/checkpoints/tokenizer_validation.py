"""Validates the tokenizer of a checkpoint folder and the token ids that configuration and description name.

The functions return values or raise; none changes its arguments.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from service.checkpoints.bounds import MAX_TOKENIZER_BYTES, check_file_size
from service.checkpoints.configuration import read_json
from service.checkpoints.files import CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from service.checkpoints.reward_description import DESCRIPTION_FILE, RewardDescription
from service.errors import CheckpointError

SLOW_TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

MAX_PLAUSIBLE_TOKENIZER_LIMIT = 10_000_000
"""In tokens. A tokenizer without a limit has a ``model_max_length`` of about 10**30."""


def pad_token_message(path: Path, pad_token_id: int, num_rows: int) -> str:
    """Return the refusal of a checkpoint whose pad token has no row in the embedding."""
    return (
        f"{path / CONFIG_FILE} has pad_token_id {pad_token_id}, but the embedding has {num_rows:,} rows: "
        "set it to the id of the pad token that training used."
    )


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
    for file in sorted(path.glob("*.json")):
        check_file_size(file, MAX_TOKENIZER_BYTES)
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
        raise CheckpointError(pad_token_message(path, pad_token_id, embedding_size))
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
