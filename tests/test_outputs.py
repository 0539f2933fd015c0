"""Output folders are checked before work is done, and failures to write become one sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from service.errors import DatasetError, OutputError
from service.outputs import check_output_folder, write_failure, writing_to


def test_a_folder_that_can_be_created_is_accepted_and_not_created(tmp_path: Path) -> None:
    """Missing parents are fine, and nothing is left behind."""
    check_output_folder(tmp_path / "a" / "b", option="--out")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file", "file/below", "full"])
def test_what_is_in_the_way_is_named(tmp_path: Path, path: str) -> None:
    """A file, a path below a file, and a folder with files are refused by the option's name."""
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model").write_text("")

    with pytest.raises(OutputError, match=f"--out {tmp_path / path}"):
        check_output_folder(tmp_path / path, option="--out")

    check_output_folder(tmp_path / "full", option="--out", overwrite=True)


def test_a_name_that_the_file_system_refuses_is_one_sentence(tmp_path: Path) -> None:
    """A name that is too long ends in our error, not in the operating system's."""
    with pytest.raises(OutputError, match="cannot be written"):
        check_output_folder(tmp_path / ("x" * 300), option="--out")


def test_a_full_disk_is_reported_with_the_folder_and_the_remedy(tmp_path: Path) -> None:
    """The operating system's reason, the folder and what to do are in one sentence; other errors are unchanged."""
    sentence = rf"{tmp_path} cannot be written: no space is left on the device; wait\."
    with pytest.raises(OutputError, match=sentence), writing_to(tmp_path, "wait"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ZeroDivisionError), writing_to(tmp_path):
        raise ZeroDivisionError


def test_a_sentence_about_an_input_beside_the_output_is_kept(tmp_path: Path) -> None:
    """An error of ours stays as it is, whichever error of the operating system caused it."""

    def read() -> None:
        try:
            (tmp_path / "pairs.jsonl").read_text()
        except OSError as error:
            raise DatasetError("The pairs do not exist.") from error

    with pytest.raises(DatasetError, match="The pairs do not exist"), writing_to(tmp_path / "out"):
        read()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_the_libraries_errors_on_a_full_disk_are_recognised(tmp_path: Path) -> None:
    """JSON files, torch's archives and safetensors files are written by different code, with different exceptions."""
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    failures = []
    for write in (
        lambda: full.write_text("x"),
        lambda: torch.save({"x": torch.zeros(100_000)}, full),
        lambda: save_file({"x": torch.zeros(100_000)}, "/proc/none/model.safetensors"),
    ):
        with pytest.raises(Exception) as failure:  # noqa: PT011 - the libraries' classes differ
            write()
        failures.append(write_failure(failure.value, full))

    assert all(failures)
    assert write_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), full) is None
