"""The same preference pairs in the forms and file formats in which people publish them."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import parquet

Rows: TypeAlias = list[dict[str, Any]]

_WORDS = ["the", 'quick "brown" fox,', "jumps;", "over\na", "lazy dog\n\nand", "an", "ship ✓", "Über", "船", "don't"]


@dataclass(frozen=True)
class Dialogue:
    """A pair: a conversation that ends with a user's turn, and two answers."""

    turns: tuple[str, ...]
    """The user's and the assistant's in turn."""

    chosen: str
    rejected: str

    @property
    def prompt(self) -> Rows:
        return messages(*self.turns)


def messages(*texts: str) -> Rows:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def made_up_dialogues(number: int, seed: int = 0) -> list[Dialogue]:
    """Dialogues like those of HH: one to five turns, with quotes, commas, line breaks and several scripts."""
    rng = random.Random(seed)

    def text(index: int) -> str:
        return f"{index} " + " ".join(rng.choices(_WORDS, k=rng.randint(2, 9)))

    return [
        Dialogue(tuple(text(index) for _ in range(rng.choice((1, 3, 5)))), text(index), text(-index))
        for index in range(1, number + 1)
    ]


def as_conversation(pair: Dialogue) -> dict[str, Any]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "source": "made up"}


def as_trl(pair: Dialogue) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
    return {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}


def as_hub_text(pair: Dialogue) -> dict[str, Any]:
    """As in Anthropic's ``hh-rlhf``: each side is one text with role markers."""
    start = "".join(f"\n\n{'Assistant' if number % 2 else 'Human'}: {text}" for number, text in enumerate(pair.turns))
    return {side: f"{start}\n\nAssistant: {text}" for side, text in _sides(pair).items()}


def as_ultrafeedback(pair: Dialogue) -> dict[str, Any]:
    """As in ``ultrafeedback_binarized``: the first user message as a text beside whole conversations."""
    whole = {side: messages(*pair.turns, text) for side, text in _sides(pair).items()}
    scores = {"score_chosen": 8.0, "score_rejected": 2.5}
    return {"prompt": pair.turns[0], "prompt_id": "0", **whole, "messages": whole["chosen"], **scores}


def as_skywork(pair: Dialogue) -> dict[str, Any]:
    return {side: messages(*pair.turns, text) for side, text in _sides(pair).items()}


def as_content_parts(pair: Dialogue) -> dict[str, Any]:
    prompt = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in pair.prompt]
    return as_conversation(pair) | {"prompt": prompt}


def _sides(pair: Dialogue) -> dict[str, str]:
    return {"chosen": pair.chosen, "rejected": pair.rejected}


def write_lines(path: Path, rows: Rows) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_windows_lines(path: Path, rows: Rows) -> None:
    """With a byte-order mark, CRLF line ends and blank lines."""
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n\r\n" for row in rows).encode())


def write_array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path: Path, rows: Rows) -> None:
    """Conversations as JSON in a field."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()})


def write_python_csv(path: Path, rows: Rows) -> None:
    """Conversations as Python writes them, which is what ``to_csv`` of pandas and ``datasets`` does."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=64)


PUBLISHED: Mapping[str, tuple[Callable[[Dialogue], dict[str, Any]], Callable[[Path, Rows], None]]] = {
    "conversation.jsonl": (as_conversation, write_lines),
    "conversation.jsonl.gz": (as_conversation, write_lines),
    "windows.jsonl": (as_conversation, write_windows_lines),
    "conversation.json": (as_conversation, write_array),
    "conversation.csv": (as_conversation, write_csv),
    "python.csv": (as_trl, write_python_csv),
    "conversation.parquet": (as_conversation, write_parquet),
    "trl.pq": (as_trl, write_parquet),
    "hub-text.jsonl": (as_hub_text, write_lines),
    "hub-text.csv": (as_hub_text, write_csv),
    "hub-text.parquet": (as_hub_text, write_parquet),
    "ultrafeedback.jsonl": (as_ultrafeedback, write_lines),
    "ultrafeedback.parquet": (as_ultrafeedback, write_parquet),
    "skywork.json": (as_skywork, write_array),
    "parts.jsonl": (as_content_parts, write_lines),
}
"""By file name: how a row is written, and how rows are written to a file."""


def write_published(folder: Path, name: str, pairs: Sequence[Dialogue]) -> Path:
    """Write the pairs to a file of that name in ``PUBLISHED``."""
    as_row, write = PUBLISHED[name]
    write(folder / name, [as_row(pair) for pair in pairs])
    return folder / name
