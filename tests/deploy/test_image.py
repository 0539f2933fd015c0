"""The Dockerfile: what a build needs reaches it, and what it installs is locked. `make image-check` builds it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def copied() -> set[str]:
    """Names at the top of the repository that the build copies."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return {name for line in lines for name in line.split()}


def admitted() -> set[str]:
    """Names that .dockerignore lets into the build; it leaves everything else out."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def test_build_gets_what_it_copies() -> None:
    """Everything that the Dockerfile copies exists and is let in by .dockerignore, and nothing more is let in."""
    assert copied() == admitted()
    assert [name for name in copied() if not (ROOT / name).exists()] == []


def test_every_package_is_copied() -> None:
    """Each package of the distribution comes from a copied folder, so the installed commands find their modules."""
    find = CONFIGURATION["tool"]["setuptools"]["packages"]["find"]
    roots = [ROOT / where for where in find["where"]]
    packages = {
        path.parent
        for root in roots
        for path in root.glob("*/__init__.py")
        if any(fnmatch(path.parent.name, pattern) for pattern in find["include"])
    }

    assert len(packages) == len(find["include"])
    assert {package.relative_to(ROOT).parts[0] for package in packages} <= copied()


def test_commands_come_from_copied_packages() -> None:
    """Each command's module lies in a copied folder."""
    modules = {target.split(".")[0] for target in CONFIGURATION["project"]["scripts"].values()}

    assert modules <= copied()


def test_dependencies_are_locked() -> None:
    """Everything but torch is installed by hash, before torch, which finds it there; our code brings nothing more."""
    installs = [line.strip() for line in re.findall(r"pip install ([^\\\n]+)", DOCKERFILE)]

    assert len(installs) == 3
    assert installs[0] == "--no-deps --require-hashes --requirement requirements/serve.txt"
    assert "--constraint requirements/constraints.txt --requirement torch.txt" in installs[1]
    assert installs[2] == "--no-deps --target /opt/service ."


@pytest.mark.skipif(shutil.which("sed") is None, reason="sed is not installed")
def test_cpu_image_takes_the_cpu_build_of_onnx_runtime(tmp_path: Path) -> None:
    """The Dockerfile's edit of the lock replaces ONNX Runtime for GPUs by the one for CPUs, and no other line."""
    lock = ROOT / "requirements" / "serve.txt"
    edited = tmp_path / "requirements" / "serve.txt"
    edited.parent.mkdir()
    edited.write_bytes(lock.read_bytes())
    script = re.search(r"sed -i (-e '[^']+' -e '[^']+') requirements/serve\.txt", DOCKERFILE)
    assert script is not None
    subprocess.run(["/bin/sh", "-c", f"sed -i {script[1]} requirements/serve.txt"], cwd=tmp_path, check=True)
    before, after = lock.read_text().splitlines(), edited.read_text().splitlines()
    removed, added = set(before) - set(after), set(after) - set(before)

    assert [line for line in after if line.startswith("onnxruntime")] == sorted(added)
    assert re.fullmatch(r"onnxruntime==\S+ \\", next(iter(added)))
    assert {line.split("==")[0] for line in removed if "==" in line} == {"onnxruntime", "onnxruntime-gpu"}
    assert all(re.match(r" +--hash=", line) for line in removed if "==" not in line)


def test_image_listens_where_its_health_check_looks() -> None:
    """The health check asks for /readyz on the port that the service has by default and the image exposes."""
    from service.launch.start_settings import ServerSettings

    port = ServerSettings().port

    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert f"'http://127.0.0.1:{port}/readyz'" in DOCKERFILE


def test_dockerfile_passes_the_linter() -> None:
    """Hadolint has nothing against the Dockerfile."""
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if program is None:
        pytest.skip("hadolint is not installed beside this Python")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stdout
