"""The tokenizer of a conversion: its files as they are in the source, the chat template, and the pad token."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.converted_head import ConvertedHead
from service.checkpoints.files import TOKENIZER_FILE

CHAT_TEMPLATE_FILE = "chat_template.jinja"

TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
)


def text_notes(found: ConvertedHead | None, folder: Path) -> Sequence[str]:
    """Report the text of training where the tokenizer has no chat template that would write it."""
    from transformers import AutoTokenizer

    if found is None or not found.text or not (folder / TOKENIZER_FILE).is_file():
        return ()
    if AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template:
        return ()
    return (f"{found.text}: give the tokenizer such a chat template, or send texts of this form.",)


def copy_tokenizer(source: Path, unfinished: Path, chat_template: Path | None) -> None:
    """Copy the tokenizer's files byte for byte, because saving it again could change its token ids.

    A chat template from the user takes the place of the source's.
    """
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, unfinished)
    if chat_template is not None:
        for file in unfinished.glob("chat_template.*"):
            file.unlink()
        shutil.copy(chat_template, unfinished / CHAT_TEMPLATE_FILE)


def write_chat_template(folder: Path, template: str) -> None:
    """Write the one chat template of a folder, in place of its others."""
    for file in folder.glob("chat_template.*"):
        file.unlink()
    (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def fallback_pad_token(config: Any, folder: Path) -> tuple[int | None, Sequence[str]]:
    """Return the pad token that trainers use where the config has none, and the note that reports it."""
    from transformers import AutoTokenizer

    stored = config.get_text_config().pad_token_id
    if stored is not None or not (folder / TOKENIZER_FILE).is_file():
        return stored, ()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    fallback = "tokenizer's pad token" if tokenizer.pad_token_id is not None else "EOS token, as TRL does"
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad_token_id, (f"The config had no pad token; it is now {pad_token_id}, the {fallback}.",)
