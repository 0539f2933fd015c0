"""Start ``reward-serve`` many times on a busy machine: every start is ready or ends in a sentence of the command.

``python tests/start_soak.py --starts 20 --busy 2`` prints a line per start and exits with 1 if one did neither. It is
not part of the test suite: twenty starts beside busy loops take many minutes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

from serving import started, stop

START_TIMEOUT_S = 900.0
RAY_WORDS = re.compile(r"Traceback|ray\.kill|Error\b|raylet|GCS|current node timed out|HAProxy crashed", re.IGNORECASE)
"""What no user should have to read at the end of a start."""


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep that many cores busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def outcome_of_start(folder: Path) -> tuple[str, str]:
    """Start a server and stop it once it is ready; return ``ready``, ``sentence`` or ``bad``, and the last message."""
    with started(folder, "--engine", "oracle") as server:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_at and server.process.poll() is None:
            if "Ready in" in server.messages.read_text():
                tries = server.messages.read_text().count("Starting Ray ...")
                return ("ready" if stop(server.process) == 0 else "bad"), f"after {tries} of Ray"
            time.sleep(0.2)
        lines = server.messages.read_text().splitlines() or ["no message"]
        is_sentence = server.process.poll() == 1 and lines[-1].startswith("reward-serve: ") and lines[-1].endswith(".")
        return ("sentence" if is_sentence and not RAY_WORDS.search(lines[-1]) else "bad"), lines[-1]


def main() -> int:
    """Run the starts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--busy", type=int, default=2, help="busy loops beside the starts")
    arguments = parser.parse_args()
    outcomes = []
    with busy_loops(arguments.busy):
        for number in range(1, arguments.starts + 1):
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                outcome, message = outcome_of_start(Path(folder))
            outcomes.append(outcome)
            print(f"{number}: {outcome} in {time.monotonic() - begin:.0f} s, {message}", flush=True)
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("ready", "sentence", "bad"))
    print(f"{arguments.starts} starts: {counts}")
    return int("bad" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
