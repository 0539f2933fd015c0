"""Output files and folders of commands: checked before the work, written under a temporary name, then renamed.

A command that fails, or runs out of disk space, leaves nothing under the name that was asked for. Nothing that exists
is replaced unless the user asks for it.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.errors import OutputError, StartupError

_OUT_OF_SPACE = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "the file would be larger than the limit of this process or file system",
}
_CANNOT_BE_WRITTEN = frozenset({*_OUT_OF_SPACE, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT})
_ERRNO_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors, tokenizers) report an error of the operating system."""

_ARCHIVE_WRITER = ("PytorchStreamWriter", "unexpected pos")
"""Words in the messages of torch's archive writer, which does not repeat the operating system's error."""


def check_output_folder(
    out: Path,
    *,
    overwrite: bool = False,
    marker: str | None = None,
    entries: Sequence[str] = (),
    option: str = "",
) -> None:
    """Check that a folder can be created or filled, before anything is computed.

    Args:
        out: the folder to write.
        overwrite: an earlier output there may be replaced.
        marker: a file that every earlier output of this command has; a folder without it is never replaced, since it
            holds something else.
        entries: names that the command writes. If given, ``out`` may hold other things, and only an existing entry of
            these names counts as an earlier output.
        option: the option that names the folder, for messages of a command that writes several.

    Raises:
        OutputError: it is a file, an earlier output exists, or the folder cannot be created or written.
    """
    name = f"{option} {out}".lstrip()
    try:
        _refuse_existing(out, name, overwrite=overwrite, marker=marker, entries=entries)
        _probe(out if out.is_dir() else out.parent, name)
    except OSError as error:
        raise OutputError(f"{name} cannot be written: {_in_words(error)}.") from None


def check_output_file(out: Path, *, overwrite: bool = False) -> None:
    """Check that a file can be written, before anything is computed.

    Raises:
        OutputError: it is a folder, it exists and may not be replaced, or its folder cannot be created or written.
    """
    try:
        if out.is_dir():
            raise OutputError(f"{out} is a folder: give the name of a file to write.")
        if out.exists() and not overwrite:
            raise OutputError(f"{out} exists: choose another name, or replace it with --overwrite.")
        _probe(out.parent, str(out))
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {_in_words(error)}.") from None


@contextmanager
def new_folder(
    out: Path, *, overwrite: bool = False, marker: str | None = None, entries: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends without an exception.

    With ``entries``, or if ``out`` is a mount point, its content is moved into ``out`` one by one instead.

    Raises:
        OutputError: as ``check_output_folder``; the disk is full; or ``out`` came into being meanwhile.
    """
    check_output_folder(out, overwrite=overwrite, marker=marker, entries=entries)
    fills = bool(entries) or out.is_mount()
    with writing_to(out):
        parent = out if out.is_dir() and fills else out.parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=parent, ignore_cleanup_errors=True) as work:
            unfinished = Path(work) / out.name
            unfinished.mkdir()
            yield unfinished
            _refuse_existing(out, str(out), overwrite=overwrite, marker=marker, entries=entries)
            if out.is_dir() and fills:
                for entry in sorted(unfinished.iterdir()):
                    _replace(entry, out / entry.name, Path(work))
            else:
                _replace(unfinished, out, Path(work))


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Yield a temporary name that becomes ``out`` when the block ends without an exception; replaces a file there.

    Raises:
        OutputError: the file cannot be written, or the disk is full.
    """
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
        try:
            yield unfinished
            unfinished.replace(out)
        finally:
            unfinished.unlink(missing_ok=True)


def write_text(out: Path, text: str) -> None:
    """Write a UTF-8 file by one rename.

    Raises:
        OutputError: as ``new_file``.
    """
    with new_file(out) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def writing_to(out: Path, remedy: str = "") -> Iterator[None]:
    """Context in which a full disk, and every other failure to write ``out``, becomes one sentence.

    Args:
        out: the file or folder that is written.
        remedy: what the user can do, a clause.

    Raises:
        OutputError: ``out`` could not be written. Every other exception is raised unchanged.
    """
    try:
        yield
    except StartupError:
        raise  # one sentence already
    except Exception as error:
        reason = write_failure(error, out)
        if reason is None:
            raise
        clause = f"; {remedy}" if remedy else ""
        raise OutputError(f"{out} cannot be written: {reason}{clause}.") from error


def write_failure(error: BaseException, out: Path) -> str | None:
    """Return why ``out`` could not be written; None if the error is about something else.

    safetensors and torch write files themselves, and raise exceptions of their own.
    """
    system_error = _system_error(error)
    if system_error is None:
        return "a file could not be completed" if any(words in str(error) for words in _ARCHIVE_WRITER) else None
    concerned = system_error.errno in _OUT_OF_SPACE or _concerns(system_error, out)
    return _in_words(system_error) if concerned else None


def _refuse_existing(out: Path, name: str, *, overwrite: bool, marker: str | None, entries: Sequence[str]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{name} is a file: give the name of a folder to write.")
    present = {entry.name for entry in out.iterdir()}
    existing = [entry for entry in entries if entry in present] if entries else sorted(present)
    if not existing:
        return
    if not overwrite:
        what = f"has {existing[0]} already" if entries else "exists and is not empty"
        raise OutputError(f"{name} {what}: choose another folder, or replace the earlier output with --overwrite.")
    if marker is not None and not (out / marker).exists():
        raise OutputError(f"{name} has no {marker}, so it is no earlier output of this command and is not replaced.")


def _probe(folder: Path, name: str) -> None:
    """Create and delete a folder in the nearest ancestor that exists; permissions alone do not tell."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{name} cannot be written, because {folder} is a file.")
    with tempfile.TemporaryDirectory(prefix=".reward-", dir=folder):
        pass


def _replace(source: Path, target: Path, work: Path) -> None:
    """Rename; what has the target's name is moved aside first, and back if the rename fails."""
    if not target.exists() or not (source.is_dir() or target.is_dir()):
        source.replace(target)
        return
    aside = work / f"replaced-{target.name}"
    target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        aside.rename(target)
        raise


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system behind an exception: itself, its cause, or what a library's text says of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if number := _ERRNO_IN_TEXT.search(str(error)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        for code in _OUT_OF_SPACE:
            if os.strerror(code) in str(error):
                return OSError(code, os.strerror(code))
        error = error.__cause__ or error.__context__
    return None


def _concerns(error: OSError, out: Path) -> bool:
    """Whether the error is about ``out``, its folder or an unfinished output; without a file name, about writing."""
    if not isinstance(error.filename, str):
        return error.errno in _CANNOT_BE_WRITTEN
    path, folder = Path(error.filename).absolute(), out.absolute().parent
    if path == folder or path.is_relative_to(out.absolute()):
        return True
    return path.is_relative_to(folder) and path.relative_to(folder).parts[0].startswith(f".{out.name}")


def _in_words(error: OSError) -> str:
    return _OUT_OF_SPACE.get(error.errno or 0) or (error.strerror or type(error).__name__).lower()
