"""The sections of a GPU day: their commands, their shares of the time, and what they need from earlier sections.

Pure: it starts nothing. Every size of model is written once, as a section of its own, and read by the sections after.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.random_checkpoint import SHAPES, ModelShape

ROOT = Path(__file__).parents[2]
"""Of the clone."""

KINDS = ("tests", "paths", "engines", "invariance", "latency", "load")
"""Kinds of sections that can be chosen; the machine is always described, and models are written where needed."""

TINY = ModelShape(vocabulary=1200, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, positions=4096)
"""For a CPU, on which the sections are tested and nothing is measured."""

DAY_SHAPES = {**SHAPES, "tiny": TINY}

LOAD_SECONDS = 60.0
"""Of the load test in a day of ``FULL_MINUTES``; less in a shorter one."""

FULL_MINUTES = 25.0


@dataclass(frozen=True, slots=True)
class Section:
    """A child process with a time limit."""

    name: str

    kind: str
    """How its result is presented."""

    command: tuple[str, ...]

    minutes: float
    """Its share of the time, relative to the other sections."""

    result: Path
    """The JSON file that it writes, some of it before its end."""

    needs: Path | None = None
    """A file or folder without which it is skipped."""

    ends_the_day: bool = False
    """Whether nothing else can run when it fails."""


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One run of ``loadtest.engines``: what is measured beside plain transformers and the service's default."""

    options: tuple[str, ...]
    items: int
    minutes: float
    workloads: tuple[str, ...] = ("independent", "groups of 8", "groups of 64")
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Size:
    """A size of model and its engine runs."""

    shape: str
    write_minutes: float
    runs: tuple[EngineRun, ...]


OPTIONS = ("--synchronous", "--cuda-graphs", "--cascade", "--fp8")

EXACT = EngineRun(("--batch-invariant", "--deterministic"), 128, minutes=1.5, rounds=2)
"""What rewards with the same bits in any batch cost, in blocks of rows and with a pass for every item."""

# A run measures nothing before all of its engines are loaded, and compiling one takes minutes: it has a run of its own.
# The engines of a run are in memory together: of 8B parameters no more than these few fit on a GPU of 140 GB.
GPU_SIZES = (
    Size(
        "0.5B",
        0.5,
        (EngineRun(OPTIONS, 512, minutes=2.5), EngineRun(("--compile",), 256, minutes=1.5, rounds=2), EXACT),
    ),
    Size(
        "1.5B",
        0.5,
        (EngineRun(OPTIONS, 512, minutes=3.0), EngineRun(("--compile",), 256, minutes=1.5, rounds=2), EXACT),
    ),
    Size(
        "8B",
        1.0,
        (
            EngineRun(("--cascade", "--fp8", "--batch-tokens", "16384"), 128, minutes=3.0, rounds=2),
            EngineRun(("--cuda-graphs", "--compile", "--batch-tokens", "16384"), 128, minutes=3.0, rounds=2),
            replace(EXACT, options=(*EXACT.options, "--batch-tokens", "16384"), items=64, minutes=2.5),
        ),
    ),
)

CPU_SIZES = (
    Size(
        "tiny",
        0.5,
        (EngineRun(("--padded-items", "4"), items=8, minutes=3.0, workloads=("independent", "groups of 8"), rounds=1),),
    ),
)


def plan_day(device: str, minutes: float, folder: Path, kinds: Collection[str] = KINDS) -> list[Section]:
    """Return the sections in their order: what is checked first, then what is measured, small models first.

    Args:
        device: ``cuda``, ``cuda:N`` or ``cpu``.
        minutes: for all sections.
        folder: for models and results; exists.
        kinds: of the sections that are wanted.
    """
    sizes = CPU_SIZES if device == "cpu" else GPU_SIZES
    sections = [_machine(device, folder)]
    if "tests" in kinds:
        sections.append(_module("tests", "tests", 4.0, folder, "loadtest.gpu_day.marked_tests"))
    if "paths" in kinds:
        sections.append(_paths(device, folder))
    if "engines" in kinds:
        for size in sizes:
            sections += _engines(device, size, folder)
    elif {"invariance", "latency", "load"} & set(kinds):
        sections.append(_model(device, sizes[0], folder))
    if "invariance" in kinds:
        sections.append(_invariance(device, sizes[0], folder))
    sections += _servers(device, minutes, sizes[0], folder, kinds)
    return sections


def time_limit(left_s: float, weights: Sequence[float]) -> float:
    """Return the seconds that the next section may take: its share of what is left.

    Time that a section does not use is thereby distributed among all later ones.

    Args:
        left_s: until the end of the day.
        weights: of the next section and of all after it.
    """
    return max(0.0, left_s) * weights[0] / sum(weights)


def _machine(device: str, folder: Path) -> Section:
    return replace(
        _module("machine", "machine", 0.5, folder, "loadtest.gpu_day.machine", "--device", device), ends_the_day=True
    )


def _paths(device: str, folder: Path) -> Section:
    script = ROOT / "tests" / "path_check.py"
    result = folder / "paths.json"
    command = (sys.executable, str(script), "--device", device, "--json", str(result))
    return Section("paths", "paths", command, 4.5, result, needs=script)


def _invariance(device: str, size: Size, folder: Path) -> Section:
    items = "8" if device == "cpu" else "256"
    model = _model_folder(size, folder)
    command = ("loadtest.gpu_day.invariance", "--model", str(model), "--device", device, "--items", items)
    return _module(f"invariance {size.shape}", "invariance", 2.0, folder, *command, needs=model)


def _engines(device: str, size: Size, folder: Path) -> Iterator[Section]:
    yield _model(device, size, folder)
    for number, run in enumerate(size.runs, start=1):
        part = f", part {number}" if len(size.runs) > 1 else ""
        yield _module(
            f"engines {size.shape}{part}",
            "engines",
            run.minutes,
            folder,
            "loadtest.engines",
            *("--model", str(_model_folder(size, folder)), "--device", device, "--keep-going"),
            *("--items", str(run.items), "--rounds", str(run.rounds), "--workloads", *run.workloads),
            *run.options,
            needs=_model_folder(size, folder),
        )


def _servers(device: str, minutes: float, size: Size, folder: Path, kinds: Collection[str]) -> Iterator[Section]:
    model = _model_folder(size, folder)
    common = ("--model", str(model), "--device", device)
    is_tiny = device == "cpu"
    if "latency" in kinds:
        requests = "5" if is_tiny else "200"
        yield _module(
            f"latency {size.shape}",
            "latency",
            1.5,
            folder,
            *("loadtest.gpu_day.latency", *common, "--requests", requests),
            needs=model,
        )
    if "load" in kinds:
        seconds = 2.0 if is_tiny else LOAD_SECONDS * min(1.0, minutes / FULL_MINUTES)
        yield _module(
            f"load {size.shape}",
            "load",
            2.0,
            folder,
            *("loadtest.gpu_day.load", *common, "--seconds", f"{seconds:g}"),
            *(("--items", "64", "--connections", "4") if is_tiny else ("--items", "8192", "--connections", "256")),
            needs=model,
        )


def _model(device: str, size: Size, folder: Path) -> Section:
    target = _model_folder(size, folder)
    return _module(
        f"model {size.shape}",
        "model",
        size.write_minutes,
        folder,
        *("loadtest.gpu_day.model", "--shape", size.shape, "--device", device, "--folder", str(target)),
    )


def _model_folder(size: Size, folder: Path) -> Path:
    return folder / f"random-{size.shape}"


def _module(name: str, kind: str, minutes: float, folder: Path, *module: str, needs: Path | None = None) -> Section:
    """Return a section that runs a module with its arguments; its result file is named after the section."""
    result = folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
    return Section(name, kind, (sys.executable, "-m", *module, "--json", str(result)), minutes, result, needs=needs)
