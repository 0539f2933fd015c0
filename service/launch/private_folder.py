"""The folder of a running server that only its user can read: sockets, logs, and the token of Ray's control plane."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.cache import cache_directory
from service.errors import ServerStartError

MAX_TEMPORARY_FOLDER_BYTES = 27 - len("/reward-12345678")
"""Ray puts Unix sockets deep inside, and their paths are limited to 107 bytes: the private folder has 27 of them."""
SERVER_LOG = "server.log"
"""File in the private folder with the output of the process that runs Ray."""
ACCESS_LOG = "requests.jsonl"
"""File in it for the access log, where none is named."""
MAX_LOG_BYTES = 2**18
"""What ``save_log`` takes from the end of each log."""
SHORT_FOLDER = "/tmp"  # noqa: S108 - mkdtemp makes a new folder in it, with mode 0700


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make the folder, in TMPDIR unless its path is too long, and remove it at the end.

    Raises:
        ServerStartError: it cannot be made.
    """
    parent = parent_folder()
    try:
        folder = Path(tempfile.mkdtemp(prefix="reward-", dir=parent))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ServerStartError(
            f"The private folder of the server cannot be made in {parent} ({reason}): set TMPDIR to a folder that "
            "can be written."
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parent_folder() -> str:
    """TMPDIR, or ``/tmp`` where there is none or paths of Unix sockets below it would be too long."""
    given = os.environ.get("TMPDIR", "")
    return given if given and not is_too_long(given) else SHORT_FOLDER


def is_too_long(parent: str) -> bool:
    """Whether Unix sockets in a private folder below ``parent`` would have paths that are too long."""
    return len(os.fsencode(parent)) > MAX_TEMPORARY_FOLDER_BYTES


def save_log(folder: Path, port: int) -> Path | None:
    """Copy the logs of a server that failed from its private folder into one file of the user's cache.

    Returns:
        The file, which the next failure on the same port replaces; None where it cannot be written.
    """
    saved = cache_directory() / "logs" / f"port-{port}.log"
    logs = (folder / "ray" / "session_latest" / "logs").rglob("*")
    sources = [
        folder / SERVER_LOG,
        folder / ACCESS_LOG,
        *sorted(path for path in logs if path.is_file() and path.stat().st_size),
    ]
    try:
        saved.parent.mkdir(parents=True, exist_ok=True)
        with saved.open("wb") as file:
            for source in sources:
                file.write(f"==> {source.relative_to(folder)} <==\n".encode())
                with suppress(OSError):
                    file.write(source.read_bytes()[-MAX_LOG_BYTES:] + b"\n")
    except OSError:
        return None
    return saved


def write_token(folder: Path) -> Path:
    """Write a new random token that only this user can read; returns its file."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path
