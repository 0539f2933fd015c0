"""The version of the distribution, and the option of every command that prints it."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import service

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_version_of_the_package() -> None:
    """``service.__version__`` is the version of the installed distribution."""
    assert service.__version__ == version("reward-service")


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_every_command_prints_its_version(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``COMMAND --version`` prints the command's name and the version, and ends with status 0."""
    module, function = PROJECT["scripts"][command].split(":")
    monkeypatch.setattr(sys, "argv", [command, "--version"])

    monkeypatch.setattr(sys, "argv", [command, "--version"])

    with pytest.raises(SystemExit) as caught:
        getattr(import_module(module), function)()

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{command} {service.__version__}\n"
