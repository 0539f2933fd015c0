"""Compiles the CPU kernels of all targets into the installation: ``python -m service.engines.kernels``.

A container image does this once, so that it needs no compiler at run time.
"""

from __future__ import annotations

import platform
import sys

from service.engines.kernels.build import BUILT, KernelsUnavailable, build_all


def main() -> int:
    """Run the command; returns the exit status, 1 where the kernels cannot be compiled."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        print(f"The CPU kernels do not support {platform.machine()}: nothing to compile.")
        return 0
    try:
        build_all(BUILT)
    except KernelsUnavailable as reason:
        print(f"service.engines.kernels: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
