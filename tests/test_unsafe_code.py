"""No shipped code loads pickles of others, runs code of a checkpoint, or evaluates text."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "service",
    "scoring",
    "export",
    "training",
    "loadtest",
    "monitoring",
    "client/reward_client",
    "demo",
    "examples",
)
OWN_PICKLES = {
    "scoring/ray_data.py",  # written by the tasks of the same job
    "export/calibration/scoring.py",  # its own cache
    "client/reward_client/adapters/callables.py",  # the state of its own object, in __reduce__
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@cache
def sources() -> list[tuple[str, ast.AST]]:
    return [
        (file.relative_to(ROOT).as_posix(), ast.parse(file.read_text()))
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
    ]


def test_pickles_are_loaded_only_where_this_code_has_written_them() -> None:
    """Modules that read pickles are imported in three files, which read what they have written themselves."""
    found = {
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and FORBIDDEN_MODULES & {alias.name.split(".")[0] for alias in node.names})
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES)
    }
    assert found == OWN_PICKLES


def test_torch_loads_tensors_only() -> None:
    """torch.load, which can run code, is called in one place, with weights_only, behind --allow-pickle."""
    calls = [
        (path, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [(path, options.get("weights_only")) for path, options in calls] == [("export/stored_model.py", "True")]


def test_code_of_a_checkpoint_is_never_run() -> None:
    """trust_remote_code is nowhere anything but False."""
    values = {
        ast.unparse(node.value)
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    }
    assert values == {"False"}
    assert not [
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code"
    ]


def test_text_is_never_evaluated() -> None:
    """No builtin that runs text as code is called, and no shell is started."""
    found = [
        (path, node.lineno)
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS)
            or ast.unparse(node.func) in {"os.system", "os.popen"}
            or any(keyword.arg == "shell" for keyword in node.keywords)
        )
    ]
    assert found == []
