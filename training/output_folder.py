"""The folder that a command writes to: checked before any work is done, and failures to write into it in one sentence.

The checks import nothing heavy, so a command can make them before it loads a model.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import OutputError

WRITE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
)
"""Errors of the operating system that mean that a file cannot be written."""

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""The number of the operating system's error in messages of libraries in Rust, such as safetensors."""

_FULL_DISK_TEXTS = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))
_ARCHIVE_WRITER = ("PytorchStreamWriter", "unexpected pos")
"""Words in the messages of torch's archive writer, which does not repeat the operating system's error."""


def check_output_folder(folder: Path, option: str, *, may_have_files: bool = False) -> None:
    """Check that a folder can be written: it is no file, has no files unless it may, and can be created.

    Nothing is left behind: writing is tried with a temporary folder in the nearest folder that exists.

    Args:
        folder: the folder, which need not exist.
        option: the option that names it, for messages.
        may_have_files: whether a folder with files is accepted.

    Raises:
        OutputError: one of these does not hold; names the option and the remedy.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{option} {folder} is not a folder: choose another path.")
        if folder.is_dir() and not may_have_files and any(folder.iterdir()):
            raise OutputError(
                f"{option} {folder} exists and is not empty: choose another folder, or pass --overwrite to replace it."
            )
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise OutputError(f"{option} {folder} cannot be created, because {existing} is not a folder.")
        Path(tempfile.mkdtemp(prefix=".reward-", dir=existing)).rmdir()
    except OSError as error:
        raise OutputError(f"{option} {folder} cannot be written ({error.strerror}): choose another folder.") from error


@contextmanager
def writing_to(folder: Path, remedy: str = "free space or choose another folder") -> Iterator[None]:
    """Context in which a failure to write becomes an OutputError that names the folder and the remedy.

    Raises:
        OutputError: a file could not be written. Every other exception is raised unchanged.
    """
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise OutputError(f"{folder} cannot be written ({reason}): {remedy}.") from error


def write_failure(error: BaseException) -> str | None:
    """Return why a file could not be written, in the operating system's words; None if the error is another one.

    safetensors and torch write files themselves and raise exceptions of their own.
    """
    if isinstance(error, OSError):
        return error.strerror if error.errno in WRITE_ERRORS else None
    text = str(error)
    rust_error = _RUST_ERROR.search(text)
    if rust_error:
        code = int(rust_error[1])
        return os.strerror(code) if code in WRITE_ERRORS else None
    reason = next((text_part for text_part in _FULL_DISK_TEXTS if text_part in text), None)
    if reason is None and any(words in text for words in _ARCHIVE_WRITER):
        return "a file could not be completed"
    return reason
