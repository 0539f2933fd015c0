"""The picture of the dashboard is taken by one command, of a real service and a real Prometheus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from first_steps import ROOT
from prometheus_tools import tool
from tiny_calibration import write_calibrated_checkpoint, write_pairs

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(600)]


def test_the_command_takes_the_picture(tmp_path: Path) -> None:
    """docs.dashboard_picture starts all that it needs, and every panel has data or a stated reason for none."""
    tool("prometheus")
    model = write_calibrated_checkpoint(tmp_path / "model", max_position_embeddings=2048)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 100, seed=3)
    picture = tmp_path / "dashboard.png"
    command = [sys.executable, "-m", "docs.dashboard_picture", str(picture), "--pairs", str(pairs)]
    options = ["--model", str(model), "--clean-s", "20", "--hacked-s", "20", "--serve", "--num-threads", "1"]

    done = subprocess.run([*command, *options], cwd=ROOT, check=False, capture_output=True, text=True, timeout=500)

    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
