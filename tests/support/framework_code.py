"""Code of other frameworks for the conformance tests: downloaded as wheels when a test runs, never copied here.

A wheel is stored in the user's cache. Of a framework only the client module is run: a whole file with stubs for the
imports that it does not need, or single functions and classes with the globals that they use. A test is skipped, with
the reason, where no package index answers.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.cache import build_once, cache_directory

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
TIMEOUT_S = 240


def wheel(requirement: str) -> Path:
    """The wheel of a pinned requirement such as ``verl==0.9.1``; skips the test where it cannot be downloaded."""

    def download(folder: Path) -> None:
        _run_pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement)

    folder = _built(requirement.replace("==", "-"), download, requirement)
    [found] = folder.glob("*.whl")
    return found


def installed(name: str, *requirements: str) -> Path:
    """A folder with the requirements alone, for the PYTHONPATH of a process; skips where that is not possible."""

    def install(folder: Path) -> None:
        _run_pip("install", "--no-deps", "--only-binary=:all:", "--target", str(folder), *requirements)

    version = f"{sys.version_info.major}{sys.version_info.minor}"
    return _built(f"{name}-py{version}", install, ", ".join(requirements))


def source(archive: Path, suffix: str) -> str:
    """The source of the one file of the wheel whose path ends with ``suffix``."""
    with zipfile.ZipFile(archive) as opened:
        [name] = [name for name in opened.namelist() if name.endswith(suffix)]
        return opened.read(name).decode()


def module(archive: Path, suffix: str, stubs: Mapping[str, Mapping[str, Any]]) -> types.ModuleType:
    """Run a whole file of a wheel as a module.

    Args:
        archive: the wheel.
        suffix: the end of the file's path.
        stubs: members of the modules that stand for its imports while it runs, by the name of the module.
    """
    loaded = types.ModuleType(f"framework_{Path(suffix).stem}")
    sys.modules[loaded.__name__] = loaded  # where dataclasses look their module up
    with stubbed(stubs):
        exec(compile(source(archive, suffix), suffix, "exec"), loaded.__dict__)  # noqa: S102 - a framework's own file
    return loaded


def definitions(archive: Path, suffix: str, names: set[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run only the functions and classes of these names of a file, and return the namespace with them.

    Args:
        archive: the wheel.
        suffix: the end of the file's path.
        names: of definitions at the top level of the file.
        namespace: the globals that they use; annotations are not evaluated.
    """
    return run_definitions(source(archive, suffix), names, namespace)


def run_definitions(code: str, names: set[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run only these functions and classes of a source; see ``definitions``."""
    tree = ast.parse(code)
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    assert {getattr(node, "name", None) for node in tree.body} == names
    tree.body.insert(0, ast.ImportFrom("__future__", [ast.alias("annotations")], 0))
    exec(compile(ast.fix_missing_locations(tree), "framework", "exec"), namespace)  # noqa: S102 - a framework's own code
    return namespace


@contextmanager
def stubbed(stubs: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Modules of these names, and their parents, hold these members until the end."""
    names = {".".join(name.split(".")[:depth]) for name in stubs for depth in range(1, name.count(".") + 2)}
    replaced = {name: sys.modules.get(name) for name in names}
    for name in sorted(names):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(stubs.get(name, {}), __path__=[])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name, original in replaced.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original


def _built(name: str, build: Callable[[Path], None], what: str) -> Path:
    try:
        return build_once(cache_directory() / "conformance" / name, build)
    except subprocess.SubprocessError as error:
        output = getattr(error, "stderr", None) or b""
        lines = output.decode(errors="replace").strip().splitlines() or [type(error).__name__]
        pytest.skip(f"{what} could not be obtained from the package index: {lines[-1]}")


def _run_pip(*arguments: str) -> None:
    subprocess.run([*PIP, *arguments], check=True, capture_output=True, timeout=TIMEOUT_S)
