"""Starts the servers to be measured as separate processes on loopback, and ends them.

It handles commands, ports and processes; requests are sent elsewhere.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtest import vllm_peer
from loadtest.wire import NATIVE, LitServeWire, VllmWire, WireFormat
from service.errors import ServerStartError

READY_WITHIN_S = 300.0
STOP_WITHIN_S = 30.0
POLL_S = 0.2
LOG_TAIL = 2000
"""Characters of the log that an error repeats."""

PEER_SERVERS = "peer_servers"
"""The folder of this package whose modules run in the environments of peers."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready to score."""

    name: str
    url: str
    process: psutil.Process
    wire: WireFormat = NATIVE

    def cpu_s(self) -> float:
        """Return the CPU seconds so far of the process and all its living descendants."""
        return family_cpu_s(self.process)


def family_cpu_s(process: psutil.Process) -> float:
    """Return the CPU seconds so far of a process and all its living descendants."""
    return sum(cpu_s_by_process(process).values())


def cpu_s_by_process(process: psutil.Process) -> dict[int, float]:
    """Return the CPU seconds so far of a process and of each living descendant, by process id."""
    spent = {}
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            spent[member.pid] = times.user + times.system
    return spent


@contextlib.contextmanager
def running_baseline(model: Path, dtype: str, log_folder: Path) -> Iterator[RunningServer]:
    """Run the plain server on a free port until the block ends."""
    command = [sys.executable, "-m", "loadtest.baseline", "--model", str(model), "--dtype", dtype]
    with _running("plain", command, log_folder) as (url, process):
        yield RunningServer("plain", url, process)


@contextlib.contextmanager
def running_service(model: Path, dtype: str, log_folder: Path, *options: str) -> Iterator[RunningServer]:
    """Run the service, with further options of its command, on a free port until the block ends."""
    command = [
        sys.executable,
        "-m",
        "service.launch.command",
        "--model",
        str(model),
        "--dtype",
        dtype,
        "--log",
        os.devnull,
        *options,
    ]
    with _running("ours", command, log_folder) as (url, process):
        yield RunningServer("ours", url, process)


@contextlib.contextmanager
def running_vllm(
    python: Path, model: Path, dtype: str, log_folder: Path, *, prefix_cache: bool
) -> Iterator[RunningServer]:
    """Run vLLM with the interpreter of its environment, on a free port until the block ends."""
    from transformers import AutoTokenizer

    command = [str(python), "-m", vllm_peer.MODULE, "--model", str(model), "--host", "127.0.0.1"]
    command += vllm_peer.vllm_flags(dtype, prefix_cache=prefix_cache)
    environment = {**os.environ, **vllm_peer.vllm_environment(os.environ, os.sched_getaffinity(0))}
    wire = VllmWire(AutoTokenizer.from_pretrained(model))
    with _running("vllm", command, log_folder, environment, ready_path="/health") as (url, process):
        yield RunningServer("vllm", url, process, wire)


@contextlib.contextmanager
def running_graph_server(
    runtime: str, python: Path, model: Path, dtype: str, log_folder: Path
) -> Iterator[RunningServer]:
    """Run the plain server in front of a runtime of graphs on a free port until the block ends.

    Args:
        runtime: ``onnxruntime``, whose model is a bundle, or ``openvino``, whose model is a checkpoint.
        python: interpreter of the environment of the runtime.
        model: folder.
        dtype: of the arithmetic.
        log_folder: for the log and for the modules that the interpreter imports.
    """
    options = ["--runtime", runtime, "--model", str(model), "--dtype", dtype]
    command = [str(python), "-m", f"loadtest.{PEER_SERVERS}.graph_server", *options]
    with _running(runtime, command, log_folder, peer_environment(log_folder)) as (url, process):
        yield RunningServer(runtime, url, process)


@contextlib.contextmanager
def running_litserve(python: Path, model: Path, dtype: str, log_folder: Path) -> Iterator[RunningServer]:
    """Run LitServe with the interpreter of its environment, on a free port until the block ends."""
    command = [str(python), "-m", f"loadtest.{PEER_SERVERS}.litserve_server", "--model", str(model), "--dtype", dtype]
    environment = peer_environment(log_folder)
    with _running("litserve", command, log_folder, environment, ready_path="/health") as (url, process):
        yield RunningServer("litserve", url, process, LitServeWire())


def peer_environment(folder: Path) -> dict[str, str]:
    """Return variables with which a peer's interpreter finds its server, and nothing of this project's environment.

    Args:
        folder: into which the modules of the peers' servers are copied.
    """
    package = folder / "peer" / "loadtest"
    own = Path(__file__).parent
    shutil.copytree(own / PEER_SERVERS, package / PEER_SERVERS, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(own / "__init__.py", package)
    return {**os.environ, "PYTHONPATH": str(package.parent), "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def _running(
    name: str,
    command: Sequence[str],
    log_folder: Path,
    environment: Mapping[str, str] | None = None,
    ready_path: str = "/readyz",
) -> Iterator[tuple[str, psutil.Process]]:
    """Run a command that takes ``--port``; yields its address and process when ``ready_path`` answers 200.

    Raises:
        ServerStartError: it ended before it was ready, or was not ready in time; the message has the end of its log.
    """
    port = free_port()
    log = log_folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  (fixed commands)
            [*command, "--port", str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _wait_until_ready(name, process, port, ready_path, log)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        _stop(process)


def _wait_until_ready(name: str, process: subprocess.Popen[bytes], port: int, ready_path: str, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while not _is_ready(port, ready_path):
        if process.poll() is not None:
            raise ServerStartError(f"The {name} server ended with status {process.returncode}. {_end_of(log)}")
        if time.monotonic() > deadline:
            raise ServerStartError(f"The {name} server was not ready within {READY_WITHIN_S:.0f} s. {_end_of(log)}")
        time.sleep(POLL_S)


def _end_of(log: Path) -> str:
    """Return the end of a log in words; the log itself is removed with the folder of the run."""
    return f"The end of its log:\n{log.read_text(errors='replace')[-LOG_TAIL:]}"


def _is_ready(port: int, ready_path: str) -> bool:
    probe = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        probe.request("GET", ready_path)
        return probe.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        probe.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the process and, if it does not end in time or leaves others behind, kill its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_WITHIN_S)
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
