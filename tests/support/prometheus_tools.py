"""Prometheus' own programs for tests; a test that needs one that is missing is skipped, and says how to get it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of prometheus, promtool or amtool: beside this Python, or anywhere on the PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/bin"])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not installed; it is in Debian's packages prometheus and prometheus-alertmanager")
    return found


def run(name: str, *arguments: str | Path, given: str | None = None) -> str:
    """What the program prints; fails with it when the program is not content."""
    done = subprocess.run(
        [tool(name), *map(str, arguments)], input=given, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
