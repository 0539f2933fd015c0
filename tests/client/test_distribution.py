"""The client installs alone: its distribution brings two small libraries, and no local folder can shadow it."""

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
    """A copy of the sources: a build in the tree would leave folders there that a later build packs again."""
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignored))


def run(*command: str | Path, cwd: Path) -> str:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_it_installs_alone_beside_folders_of_the_same_names(source: Path, tmp_path: Path) -> None:
    """A fresh environment has httpx2, stamina and theirs, and a trainer's own ``service`` and ``training`` import."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", source / "client", cwd=tmp_path)
    for name in ("service", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()

    found = json.loads(run(python, "-c", PROGRAM, cwd=tmp_path))

    assert {"reward-client", "httpx2", "stamina"} <= set(found["installed"])
    unwanted = {"torch", "ray", "numpy", "pydantic", "transformers", "msgspec", "reward-service"}
    assert not unwanted & set(found["installed"])
    assert all(Path(file).is_relative_to(tmp_path) for file in found["local"])


def test_the_wheel_of_the_service_carries_it(source: Path, tmp_path: Path) -> None:
    """The service needs no distribution named reward-client, which a stranger could register on an index."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path)

    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    carried = {name.partition("/")[2] for name in names if name.startswith("reward_client/")}
    assert carried == {file.name for file in (source / "client" / "reward_client").iterdir() if file.is_file()}
    assert not [line for line in metadata.splitlines() if line.startswith("Requires-Dist: reward-client")]
