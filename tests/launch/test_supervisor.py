"""The supervisor: which processes it adopts and kills."""

import subprocess
import sys
import time

import psutil

FAMILY = """
import subprocess, sys, time
import psutil
from service.launch.supervisor import _adopt_orphans, sweep

_adopt_orphans()
# A child that leaves its session and exits at once, and a grandchild that outlives it and ignores SIGTERM.
subprocess.run(["setsid", "sh", "-c", "(trap '' TERM; exec sleep 600) & exit 0"], check=True)
child = subprocess.Popen(["sleep", "600"])
for _ in range(100):
    family = psutil.Process().children(recursive=True)
    if sorted(process.name() for process in family) == ["sleep", "sleep"]:
        break
    time.sleep(0.02)
print(*(process.pid for process in family), flush=True)
sweep()
print(len(psutil.Process().children(recursive=True)))
"""


def test_sweep_finds_orphans() -> None:
    """The sweep kills all descendants of the process: children and orphans whose parent has exited."""
    begin = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", FAMILY], capture_output=True, text=True, check=True, timeout=30)
    family, left = answer.stdout.splitlines()

    assert len(family.split()) == 2
    assert left == "0"
    assert not any(psutil.pid_exists(int(pid)) for pid in family.split())
    assert time.monotonic() - begin < 20


def test_start_command_imports_neither_ray_nor_torch() -> None:
    """The start command runs as long as the server, so it stays small, and on any runtime it is quick to refuse."""
    check = (
        "import sys, service.launch.command, service.launch.start, service.launch.local\n"
        "print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )

    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)

    assert answer.stdout.strip() == "[]"
