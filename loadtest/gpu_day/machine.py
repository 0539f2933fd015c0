"""Describes the machine of a GPU day, and tells which packages it lacks; fails where it lacks the device."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loadtest.gpu_day.plan import ROOT

PACKAGES = ROOT / "requirements" / "gpu-day.txt"

AT_LEAST = {"torch": (2, 11), "transformers": (5, 17)}
"""Versions that the code is written for."""


def main() -> int:
    """Write the facts; the exit status is 1 where a section could not run at all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "python": sys.version.partition(" ")[0],
        "commit": _commit(),
        "versions": {name: version_of(name) for name in (*AT_LEAST, "numpy", "torchao")},
        "missing": [name for name in names_of(PACKAGES.read_text(encoding="utf-8")) if version_of(name) is None],
    }
    options.json.write_text(json.dumps(facts), encoding="utf-8")  # before what may fail
    facts |= _device_facts(options.device)
    options.json.write_text(json.dumps(facts), encoding="utf-8")
    problems = [f"{name} {facts['versions'][name] or 'is missing, which'} is too old" for name in too_old(facts)]
    for problem in problems:
        print(problem)
    return int(bool(problems))


def names_of(requirements: str) -> list[str]:
    """Return the names in the text of a requirements file, without versions and comments."""
    lines = (line.partition("#")[0].strip() for line in requirements.splitlines())
    return [re.split(r"[<>=!~; \[]", line, maxsplit=1)[0] for line in lines if line]


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def too_old(facts: dict[str, Any]) -> list[str]:
    """Return the names of ``AT_LEAST`` that are older, or missing."""
    return [name for name, least in AT_LEAST.items() if _numbers(facts["versions"][name]) < least]


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text or "")[:2])


def _device_facts(choice: str) -> dict[str, Any]:
    """Return the properties of the device.

    Raises:
        SettingsError: the machine lacks it.
    """
    import torch

    from loadtest.traffic.machine import machine_facts
    from service.engines.devices.device import resolve_device

    device = resolve_device(choice)
    facts = {"device": str(device), "cores": len(os.sched_getaffinity(0)), "cpu": machine_facts()["cpu"]}
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    return facts | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """Return the commit of the clone, with a mark where files are changed; None where git does not know one."""
    try:
        found = subprocess.run(  # noqa: S603  # nosec B603 B607 - a fixed command
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],  # noqa: S607  # nosec B607
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
