"""Prometheus' own programs for tests; without them a test is skipped with a message on how to install them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of prometheus, promtool or amtool: in this Python's folder or on the PATH."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/bin"])
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"{name} is not installed; it is in Debian's packages prometheus and prometheus-alertmanager")
    return found


def run(name: str, *arguments: str | Path, given: str | None = None) -> str:
    """Output of the program; fails with it on another exit status than 0."""
    done = subprocess.run(
        [tool(name), *map(str, arguments)], input=given, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
