"""Data files on this machine and in remote storage, opened alike.

A remote file is named by a URL of fsspec (``s3://``, ``gs://``, ``memory://``, ``file://``); fsspec is imported for
these alone. How a file is decoded is the business of `service.data.decoders`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from service.errors import DatasetError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that fsspec opens."""

    url: str

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def exists(self) -> bool:
        """Whether there is such a file."""
        system, path = file_system(self.url)
        return bool(system.isfile(path))

    def __str__(self) -> str:
        return self.url


DataFile: TypeAlias = Path | RemoteFile
"""A file of rows."""


def is_url(source: str) -> bool:
    """Whether a source is a URL of fsspec, and not a path of this machine."""
    return _URL.match(source) is not None


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        DatasetError: no installed package reads such URLs, or the storage cannot be reached.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # fsspec names the package to install, and the scheme, but no secret
        raise DatasetError(f"URLs that begin with {scheme}:// cannot be read: {error}.") from error
    return system, str(path)


def open_file(file: DataFile) -> IO[bytes]:
    """Open a data file for reading.

    Raises:
        OSError: it cannot be opened.
    """
    if isinstance(file, Path):
        return file.open("rb", buffering=0)
    system, path = file_system(file.url)
    return cast("IO[bytes]", system.open(path, "rb"))


def open_memory_map(file: DataFile) -> Any:
    """Open a data file for pyarrow, mapped into memory if it is on this machine."""
    import pyarrow as pa

    return pa.memory_map(str(file)) if isinstance(file, Path) else pa.PythonFile(open_file(file), mode="r")
