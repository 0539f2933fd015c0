"""Files, folders and data sets on the hub are read and hashed; a mistyped path is not requested from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from preference_rows import polite_pairs, write_pairs
from reward_client.hashing import file_sha256

from service.errors import DatasetError
from training.sources import read_source, source_hashes, source_name

ROWS = polite_pairs(3)


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The requests to the hub, which has ROWS under every name but one."""
    calls: list[tuple[str, str]] = []

    def load_dataset(name: str, *, split: str) -> Any:
        calls.append((name, split))
        if name == "nobody/knows":
            raise ConnectionError(name)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_data_set_on_the_hub_is_read_by_its_name(requested: list[tuple[str, str]]) -> None:
    """Owner and name, with the training split unless another one is given."""
    rows = [row.values for row in read_source("owner/name")]

    assert rows == ROWS
    assert next(iter(read_source("owner/name:test"))).location == "owner/name:test, row 1"
    assert requested == [("owner/name", "train"), ("owner/name", "test")]


@pytest.mark.parametrize("source", ["some/where.jsonl", "just-a-name", "/no/such/folder"])
def test_a_missing_file_is_not_requested_from_the_hub(requested: list[tuple[str, str]], source: str) -> None:
    """A mistyped path is an error without network access."""
    with pytest.raises(DatasetError):
        list(read_source(source))

    assert requested == []


def test_a_failed_download_is_one_error(requested: list[tuple[str, str]]) -> None:
    """A network error becomes a DatasetError with the data set's name."""
    with pytest.raises(DatasetError, match=r"nobody/knows .* could not be downloaded from the hub \(ConnectionError\)"):
        list(read_source("nobody/knows"))


def test_hashes_identify_the_content(requested: list[tuple[str, str]], tmp_path: Path) -> None:
    """A file has the hash of its bytes, a data set the hash of its rows, which is the same in every call."""
    file = write_pairs(tmp_path / "pairs.jsonl", ROWS)

    hashes = source_hashes([str(file), "owner/name"])

    assert hashes["pairs.jsonl"] == file_sha256(file)
    assert hashes == source_hashes([file, "owner/name"])
    assert len(hashes["owner/name"]) == 64


def test_files_of_one_name_are_hashed_each(tmp_path: Path) -> None:
    """The first goes by its name, the next by its path, so that neither hash is lost."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first = write_pairs(tmp_path / "a" / "pairs.jsonl", ROWS)
    second = write_pairs(tmp_path / "b" / "pairs.jsonl", ROWS[:1])

    assert source_hashes([first, second]) == {"pairs.jsonl": file_sha256(first), str(second): file_sha256(second)}


def test_names_have_no_folder_and_no_ending() -> None:
    """Reports name sources in this way."""
    names = [source_name(source) for source in (Path("a/b/pairs.jsonl.gz"), "a/b/pairs.parquet", "owner/name:test")]

    assert names == ["pairs", "pairs", "owner/name:test"]
