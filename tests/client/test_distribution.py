"""The client can be installed alone: its distribution has two small dependencies, and no local folder shadows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from importlib.metadata import distributions
from reward_client import AsyncRewardClient, RewardClient
from reward_client.adapters import callables, ms_swift, nemo_rl, openrlhf, trl, verl
import service, training
RewardClient("http://127.0.0.1:1"); AsyncRewardClient("http://127.0.0.1:1")
print(json.dumps({
    "installed": sorted(distribution.name.lower() for distribution in distributions()),
    "local": [service.__file__, training.__file__],
}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, because a build leaves folders in the source tree that a later build would include."""
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignored))


def run(*command: str | Path, cwd: Path) -> str:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_it_is_installed_alone_and_not_shadowed_by_local_folders(source: Path, tmp_path: Path) -> None:
    """A new environment has two packages and their dependencies; a local ``service`` or ``training`` is imported."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", source / "client", cwd=tmp_path)
    for name in ("service", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()

    found = json.loads(run(python, "-c", PROGRAM, cwd=tmp_path))

    assert {"reward-client", "httpx2", "tenacity"} <= set(found["installed"])
    unwanted = {"torch", "ray", "numpy", "pydantic", "transformers", "msgspec", "reward-service"}
    assert not unwanted & set(found["installed"])
    assert all(Path(file).is_relative_to(tmp_path) for file in found["local"])


def test_the_wheel_of_the_service_contains_it(source: Path, tmp_path: Path) -> None:
    """The service does not depend on a distribution named reward-client, which anybody could register on an index."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path)

    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    packaged = {name for name in names if name.startswith("reward_client/")}
    client = source / "client"
    assert packaged == {str(file.relative_to(client)) for file in client.rglob("reward_client/**/*") if file.is_file()}
    assert not [line for line in metadata.splitlines() if line.startswith("Requires-Dist: reward-client")]
