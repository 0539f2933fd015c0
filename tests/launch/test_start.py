"""What the start command does to its own process."""

from __future__ import annotations

import os
from pathlib import Path

from service.launch.start import write_at_the_end


def test_lines_of_replicas_are_not_overwritten(tmp_path: Path) -> None:
    """A message of the start command comes after the lines that others have appended to the same file."""
    file = tmp_path / "output"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        write_at_the_end(descriptor)
        os.write(descriptor, b"ready\n")
        with file.open("a") as replica:
            replica.write("scored\n")
        os.write(descriptor, b"stopping\n")
    finally:
        os.close(descriptor)

    assert file.read_text() == "ready\nscored\nstopping\n"
