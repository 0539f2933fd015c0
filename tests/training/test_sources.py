"""Files, folders and data sets of the hub are read and hashed alike; nothing is taken for the hub's by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from preference_rows import polite_pairs, write_pairs

from service.errors import DatasetError
from training.sources import file_hash, read_source, source_hashes, source_name

ROWS = polite_pairs(3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the hub is asked for; it has ROWS under any name but one."""
    calls: list[tuple[str, str]] = []

    def load_dataset(name: str, *, split: str) -> Any:
        calls.append((name, split))
        if name == "nobody/knows":
            raise ConnectionError(name)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_data_set_of_the_hub_is_read_by_its_name(asked: list[tuple[str, str]]) -> None:
    """Owner and name, with the training split unless another is named."""
    rows = [row.values for row in read_source("owner/name")]

    assert rows == ROWS
    assert next(iter(read_source("owner/name:test"))).place == "owner/name:test, row 1"
    assert asked == [("owner/name", "train"), ("owner/name", "test")]


@pytest.mark.parametrize("source", ["some/where.jsonl", "just-a-name", "/no/such/folder"])
def test_a_missing_file_is_no_data_set(asked: list[tuple[str, str]], source: str) -> None:
    """A path with a typing error is named as such, and nobody is asked over the network."""
    with pytest.raises(DatasetError):
        list(read_source(source))

    assert asked == []


def test_a_data_set_that_cannot_be_fetched_is_one_sentence(asked: list[tuple[str, str]]) -> None:
    """A dead network is no traceback."""
    with pytest.raises(DatasetError, match=r"nobody/knows .* could not be fetched from the hub \(ConnectionError\)"):
        list(read_source("nobody/knows"))


def test_hashes_name_what_was_read(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    """A file has the hash of its bytes, a data set one of its rows, which stays the same from call to call."""
    file = write_pairs(tmp_path / "pairs.jsonl", ROWS)

    hashes = source_hashes([str(file), "owner/name"])

    assert hashes["pairs.jsonl"] == file_hash(file)
    assert hashes == source_hashes([file, "owner/name"])
    assert len(hashes["owner/name"]) == 64


def test_names_are_without_folders_and_endings() -> None:
    """What a report calls its sources."""
    names = [source_name(source) for source in (Path("a/b/pairs.jsonl.gz"), "a/b/pairs.parquet", "owner/name:test")]

    assert names == ["pairs", "pairs", "owner/name:test"]
