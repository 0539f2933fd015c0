"""How commands begin: help and version without heavy imports, and a missing extra as one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from first_steps import ROOT, Case, run_case, write_world

from service.commands import EXTRAS, OUR_PACKAGES, run_command

CLIENT_PACKAGES = {
    "httpx2",
    "stamina",
    "anyio",
    "certifi",
    "h11",
    "httpcore2",
    "idna",
    "sniffio",
    "tenacity",
    "socksio",
}
"""What ``pip install .`` brings, and may be imported where no extra is installed."""

_OF_EXTRAS = {
    "torch", "transformers", "ray", "onnxruntime", "gguf", "msgspec", "numpy", "peft", "prometheus_client", "psutil",
    "pyarrow", "pydantic", "pydantic_settings", "yaml", "rich", "safetensors", "scipy", "starlette", "torchao",
    "grafana_foundation_sdk", "matplotlib", "onnx", "onnxscript", "sklearn", "trl", "datasets", "jinja2", "statsmodels",
    "huggingface_hub", "tokenizers", "accelerate", "fastapi", "uvicorn", "hdrh", "shtab",
}  # fmt: skip
_BEYOND_SERVE = {
    "grafana_foundation_sdk",
    "matplotlib",
    "onnx",
    "onnxscript",
    "sklearn",
    "trl",
    "datasets",
    "statsmodels",
    "hdrh",
}

_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocker())
"""
"""As ``sitecustomize`` it makes packages look as if they were not installed."""

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
"""Characters that colour text or move the cursor of a terminal; they do not belong into a file or a pipe."""

LIMIT_CPU_S = 0.5
"""Seconds of processor time, in user and kernel mode, of ``--help`` and ``--version``."""

MODULES = [
    f"python -m {name}"
    for name in (
        *("loadtest.baseline", "loadtest.compare", "loadtest.connections", "loadtest.diagnostics_cost"),
        *("loadtest.engines", "loadtest.latency"),
        *("loadtest.invariance", "loadtest.staged_drift", "monitoring.dashboard", "monitoring.render"),
    )
]

VALID_ARGUMENTS = {
    "reward-serve": ["--model", "model"],
    "reward-train": ["--data", "pairs.jsonl", "--base", "base", "--out", "{out}"],
    "reward-audit": ["model", "pairs.jsonl", "--out", "{out}"],
    "reward-score": ["pairs.jsonl", "{out}", "--model", "model"],
    "reward-calibrate": ["model", "many.jsonl", "--out", "{out}"],
    "reward-convert": ["model", "{out}"],
    "reward-export": ["model", "{out}"],
    "reward-key": ["trainer", "--file", "{out}"],
    "reward-loadtest": ["--url", "http://127.0.0.1:9", "--out", "{out}"],
    "reward-completion": ["bash"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def without(blocked: set[str], folder: Path) -> dict[str, str]:
    """Return the environment in which these packages cannot be imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_BLOCKER.format(blocked=blocked))
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("command", EXTRAS)
def test_after_the_plain_install_the_extra_is_named(command: str, world: Path, tmp_path: Path) -> None:
    """With the client's packages alone, each command says in one sentence which extra to install."""
    environment = without(_OF_EXTRAS, tmp_path / "blocker")
    case = Case(command, command, VALID_ARGUMENTS[command], [], environment=environment)

    outcome = run_case(case, world, tmp_path / "case")

    assert outcome.status == 1
    *read_files, line = outcome.stderr.strip().splitlines()
    assert len(read_files) <= 1
    assert line.startswith(f"{command}: the Python package ")
    assert line.endswith(f"pip install '.[{EXTRAS[command][1]}]'.")
    assert (outcome.stdout, outcome.left_behind) == ("", [])


@pytest.mark.parametrize("command", [name for name, (_, extra) in EXTRAS.items() if extra != "serve"])
@pytest.mark.slow
def test_with_the_extra_serve_alone_the_other_extra_is_named(command: str, world: Path, tmp_path: Path) -> None:
    """A command of another extra says so before a model is loaded."""
    environment = without(_BEYOND_SERVE, tmp_path / "blocker")
    case = Case(command, command, VALID_ARGUMENTS[command], [], environment=environment)

    outcome = run_case(case, world, tmp_path / "case")

    assert outcome.status == 1
    *read_files, line = outcome.stderr.strip().splitlines()
    assert len(read_files) <= 1
    assert line.startswith(f"{command}: the Python package ")
    assert line.endswith(f"pip install '.[{EXTRAS[command][1]}]'.")
    assert outcome.left_behind == []


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("command", [*EXTRAS, *MODULES])
def test_help_and_version_come_at_once(command: str, option: str, world: Path, tmp_path: Path) -> None:
    """They print to standard output, end with 0, load no heavy package, and take little processor time."""
    case = Case(command, command, [option], [])
    outcome = run_case(case, world, tmp_path / "case")

    assert (outcome.status, outcome.stderr, outcome.loaded) == (0, "", [])
    assert command in outcome.stdout
    assert not CONTROL.search(outcome.stdout)
    times_s = [outcome.cpu_s]
    for number in range(2):  # other processes on the same cores slow this one down; the shortest time is its own
        if min(times_s) >= LIMIT_CPU_S:
            times_s.append(run_case(case, world, tmp_path / f"again-{number}").cpu_s)
    assert min(times_s) < LIMIT_CPU_S


@pytest.mark.parametrize("command", [name for name in EXTRAS if name not in {"reward-serve", "reward-score"}])
def test_help_needs_neither_the_client_nor_pydantic(command: str, world: Path, tmp_path: Path) -> None:
    """Packages that take a tenth of a second are not imported either; two commands need them for their options."""
    environment = without({"httpx2", "pydantic", "numpy", "pyarrow", "rich", "msgspec"}, tmp_path / "blocker")
    case = Case(command, command, ["--help"], [], environment=environment)

    outcome = run_case(case, world, tmp_path / "case")

    assert (outcome.status, outcome.stderr) == (0, "")


def test_a_fault_of_the_program_is_not_hidden() -> None:
    """A module of ours that does not exist, or any other bug, is raised with its traceback."""

    def broken_import() -> int:
        raise ModuleNotFoundError("No module named 'service.nope'", name="service.nope")

    def broken() -> int:
        raise ZeroDivisionError

    for body, error in ((broken_import, ModuleNotFoundError), (broken, ZeroDivisionError)):
        with pytest.raises(error):
            run_command("reward-audit", "train", body)
    assert "training" in OUR_PACKAGES


def test_the_module_of_the_entry_points_needs_the_standard_library_alone() -> None:
    """Importing it works where not even the client's packages are installed."""
    blocked = _OF_EXTRAS | CLIENT_PACKAGES
    code = f"{_BLOCKER.format(blocked=blocked)}\nimport service.commands"

    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )

    assert completed.returncode == 0, completed.stderr


def test_ctrl_c_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """The status is that of shells, 130, and there is no traceback."""

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command("reward-audit", "train", interrupted) == 130
    assert capsys.readouterr().err == "reward-audit: interrupted.\n"
