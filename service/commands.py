"""Entry points of the commands: what is refused, or not installed, becomes one sentence on standard error.

``[project.scripts]`` names the functions at the end of this module. The module of a command is imported inside
`run_command`, so an installation without the extra that the command needs gives the name of that extra and no
traceback. Importing this module imports the standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

OUR_PACKAGES = frozenset({"service", "scoring", "export", "training", "loadtest", "monitoring", "reward_client"})

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""

EXTRAS = {
    "reward-serve": ("service.launch.command", "serve"),
    "reward-key": ("service.launch.key_command", "serve"),
    "reward-train": ("training.train", "train"),
    "reward-audit": ("training.audit.command", "train"),
    "reward-score": ("scoring.command", "serve"),
    "reward-calibrate": ("export.calibration.command", "export"),
    "reward-convert": ("export.conversion_command", "serve"),
    "reward-export": ("export.onnx.command", "export"),
    "reward-loadtest": ("loadtest.traffic.command", "loadtest"),
    "reward-completion": ("service.launch.completion_command", "serve"),
}
"""Module and extra of each command; the module has ``main`` and ``command_parser``."""


def run_command(
    name: str, extra: str, body: Callable[[], int], *, when_interrupted: str = "interrupted.", silent: bool = False
) -> int:
    """Run a command and return its exit status; the errors that a user can act on become one sentence.

    Args:
        name: of the command, which begins the sentence.
        extra: the extra of this distribution whose packages the command imports.
        body: runs the command and returns its exit status.
        when_interrupted: the sentence after Ctrl-C.
        silent: print no sentence, because another process of a launcher prints the same one.

    Returns:
        The status of ``body``; 1 after a sentence; 130 after Ctrl-C.
    """
    try:
        return body()
    except KeyboardInterrupt:
        sentence, status = when_interrupted, INTERRUPTED
    except Exception as error:
        told = _sentence(error, extra)
        if told is None:
            raise
        sentence, status = told, 1
    if not silent:
        print(f"{name}: {sentence}", file=sys.stderr)
    return status


def _sentence(error: Exception, extra: str) -> str | None:
    """Return what the user reads instead of a traceback; None for an error that is a fault of the program."""
    if isinstance(error, ImportError):
        return _missing_package(error, extra)
    from reward_client.errors import ClientError

    from service.errors import StartupError

    if not isinstance(error, StartupError | ClientError):
        return None
    return f"{str(error).removesuffix('.')}."


def _missing_package(error: ImportError, extra: str) -> str | None:
    package = _package_of(error)
    if not package or package in OUR_PACKAGES:
        return None
    remedy = f"install the extra that this command needs, in a clone of the repository: pip install '.[{extra}]'."
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {package} is not installed; {remedy}"
    return f"the installed version of the Python package {package} does not fit; {remedy}"


def _package_of(error: BaseException | None) -> str:
    """The package that could not be imported; transformers raises an error without its name from one that has it."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__
    return ""


def tell_on_standard_error(line: str) -> None:
    """Print a line about what a command reads, before a console is imported."""
    print(line, file=sys.stderr)


def _run(name: str) -> int:
    module, extra = EXTRAS[name]
    return run_command(name, extra, lambda: int(import_module(module).main()))


def reward_serve() -> int:
    """Run ``reward-serve``."""
    return _run("reward-serve")


def reward_key() -> int:
    """Run ``reward-key``."""
    return _run("reward-key")


def reward_train() -> int:
    """Run ``reward-train``."""
    return _run("reward-train")


def reward_audit() -> int:
    """Run ``reward-audit``."""
    return _run("reward-audit")


def reward_score() -> int:
    """Run ``reward-score``."""
    return _run("reward-score")


def reward_calibrate() -> int:
    """Run ``reward-calibrate``."""
    return _run("reward-calibrate")


def reward_convert() -> int:
    """Run ``reward-convert``."""
    return _run("reward-convert")


def reward_export() -> int:
    """Run ``reward-export``."""
    return _run("reward-export")


def reward_loadtest() -> int:
    """Run ``reward-loadtest``."""
    return _run("reward-loadtest")


def reward_completion() -> int:
    """Run ``reward-completion``."""
    return _run("reward-completion")
