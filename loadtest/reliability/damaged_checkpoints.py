"""Checkpoints that cannot be served: the start ends soon, with one sentence, and is not tried again."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.reliability.findings import Finding, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.run_progress import RunProgress
from loadtest.servers import free_port

RUNTIMES = ("ray", "local")
ENDS_WITHIN_S = 30.0
GIVE_UP_S = 120.0
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, slots=True)
class FailedStart:
    """How a start ended."""

    seconds: float
    """Infinite where it did not."""
    status: int
    message: str
    """Standard error."""

    @property
    def is_explained(self) -> bool:
        """Whether it ended by itself, with a message and without a traceback."""
        return self.status == 1 and bool(self.message) and "Traceback" not in self.message


def damaged_checkpoints(options: ExperimentOptions) -> list[Finding]:
    """R24: a checkpoint damaged in several ways, with Ray and with the local runtime."""
    starts: dict[str, FailedStart] = {}
    with tempfile.TemporaryDirectory(prefix="reward-damaged-") as name, RunProgress(Console(stderr=True)) as progress:
        folder = Path(name)
        progress.tell("writing a random checkpoint")
        good = options.model or write_random_checkpoint(folder / "good", dtype="float32")
        for damage, do in DAMAGES.items():
            bad = folder / damage
            shutil.copytree(good, bad)
            do(bad)
            for runtime in RUNTIMES:
                progress.tell(f"{damage}, {runtime} runtime", len(starts), len(DAMAGES) * len(RUNTIMES))
                starts[f"{damage}, {runtime}"] = _start(bad, runtime)
            shutil.rmtree(bad)
    slowest = max(starts, key=lambda one: starts[one].seconds)
    return [
        Finding("load", f"starts ({', '.join(DAMAGES)}; {' and '.join(RUNTIMES)})", len(starts)),
        at_most("R24", "starts that did not end with status 1 and a message without a traceback", sum(
            not one.is_explained for one in starts.values()), 0),
        at_most("R24", "longest time until the end, s (" + slowest + ")", starts[slowest].seconds, ENDS_WITHIN_S),
    ]  # fmt: skip


def _start(model: Path, runtime: str) -> FailedStart:
    command = [sys.executable, "-m", "service.launch.command", "--model", str(model), "--runtime", runtime]
    command += ["--device", "cpu", "--port", str(free_port()), "--log", os.devnull]
    began = time.monotonic()
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            command, capture_output=True, text=True, check=False, timeout=GIVE_UP_S
        )
    except subprocess.TimeoutExpired:
        return FailedStart(math.inf, 0, "")
    return FailedStart(time.monotonic() - began, done.returncode, done.stderr.strip())


def _truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def _spoil_header(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 64)


def _put_nan(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff" * 4)  # a NaN of float32, and two of bfloat16


def _remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _change_config(folder: Path, changes: Mapping[str, object]) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "weights cut in half": _truncate,
    "header of the weights overwritten": _spoil_header,
    "NaN in the weights": _put_nan,
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "another architecture": lambda folder: _change_config(folder, {"model_type": "bert"}),
    "other dimensions": lambda folder: _change_config(folder, {"hidden_size": 256}),
    "no tokenizer": _remove_tokenizer,
}
"""What is done to a good checkpoint."""
