"""The architecture page shows the layers as the import contract has them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def diagram() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_diagram", ROOT / "docs" / "architecture_diagram.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diagram_is_current(diagram: ModuleType) -> None:
    """Drawing it again from ``pyproject.toml`` changes nothing."""
    layers = diagram.read_layers((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    assert diagram.PICTURE.read_text(encoding="utf-8") == diagram.draw(layers)


def test_a_step_through_an_unknown_module_is_refused(diagram: ModuleType) -> None:
    """A module that was renamed in the contract cannot stay in the path of a request."""
    with pytest.raises(ValueError, match=r"does not list .*scorer"):
        diagram.draw([["http", "protocols"]])


def test_every_module_that_the_page_names_exists() -> None:
    """Paths of modules on the page are those of the repository."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:service|client|export|training|loadtest|monitoring)/[\w/]*(?:\.py)?)`", page))

    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).exists()]
