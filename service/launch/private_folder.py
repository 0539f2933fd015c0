"""The folder of a running server that only its user can read: sockets, logs, and the token of Ray's control plane."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import ServerStartError


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make the folder and remove it at the end, except after a ServerStartError, so that its logs can be read."""
    # Ray puts Unix sockets deep inside, and their paths are limited to 107 bytes: the folder must be near the root.
    # mkdtemp makes it new, with mode 0700.
    folder = Path(tempfile.mkdtemp(prefix="reward-", dir="/tmp"))
    try:
        yield folder
    except ServerStartError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def write_token(folder: Path) -> Path:
    """Write a new random token that only this user can read; returns its file."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path
