"""Build the image without a container engine, start it, score items in it and stop it: ``make image-check``.

It needs root on a Debian machine with the packages buildah and debootstrap, some 10 GB of disk and port 8000. The base
image is a Debian system made by debootstrap, unless BASE_IMAGE names one. IMAGE_BUILD_OPTIONS are more options of
``buildah build``, such as volumes with a configuration of pip. It is not part of the test suite: it takes some minutes
and downloads about a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil

sys.path.insert(0, str(Path(__file__).parent / "support"))

from tiny_models import write_tiny_checkpoint

ROOT = Path(__file__).parents[1]
IMAGE = "localhost/reward-service:check"
BASE = "localhost/reward-service-base:check"
BASE_PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
URL = "http://127.0.0.1:8000"
USER = 10001
OPEN = ("--authentication", "none")
"""The image listens on all interfaces, and the check has no API keys."""
OPEN_FILES = 16_384
"""Limit of open files; HAProxy needs 10,270, and buildah gives 1,024."""
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 15.0
ITEMS = [
    {"prompt": "How do I boil an egg?", "completion": "Put it in boiling water for eight minutes."},
    {"prompt": "How do I boil an egg?", "completion": "No."},
]
SCORE = {"items": ITEMS, "timeout_ms": 20_000}
MODEL_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".pt", ".bin")
LARGE_BYTES = 1 << 20


class Buildah:
    """The program with storage of its own, which ``remove`` deletes."""

    def __init__(self, folder: Path) -> None:
        self._storage = ("--root", str(folder / "storage"), "--runroot", str(folder / "run"))

    def command(self, *arguments: str) -> list[str]:
        return ["buildah", *self._storage, *arguments]

    def __call__(self, *arguments: str, shown: bool = False) -> str:
        """Run it and return what it prints; its messages are passed on, its output too if ``shown``."""
        done = subprocess.run(
            self.command(*arguments), stdout=None if shown else subprocess.PIPE, text=True, check=True
        )
        return (done.stdout or "").strip()


def make_base(buildah: Buildah, folder: Path) -> str:
    """Make a Debian image with Python by debootstrap; returns its name."""
    system = folder / "debian"
    subprocess.run(
        ["/usr/sbin/debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", system],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(system), "/")
    buildah("commit", "--quiet", "--format", "docker", "--rm", container, BASE)
    shutil.rmtree(system)
    return BASE


def build(buildah: Buildah, base: str, device: str) -> None:
    """Build the image from the Dockerfile."""
    options = shlex.split(os.environ.get("IMAGE_BUILD_OPTIONS", ""))
    arguments = {"BASE_IMAGE": base, "DEVICE": device, "TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
    given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    buildah(
        *("build", "--isolation", "chroot", "--format", "docker", "--layers", "--tag", IMAGE),
        *(*given, *options, str(ROOT)),
        shown=True,
    )


def check_configuration(config: dict[str, Any]) -> None:
    """What the image says about itself: not root, signals and health as documented, started without a shell."""
    assert config["User"] == "10001:10001", config
    assert config["StopSignal"] == "SIGTERM", config
    assert config["Entrypoint"][0] == "reward-serve", config
    assert config["Healthcheck"]["Test"][0] == "CMD", config
    assert list(config["Volumes"]) == ["/home/reward/.cache"], config


def sizes(buildah: Buildah, container: str, folder: Path) -> dict[str, float]:
    """Sizes in MB: of the files as stored, of the parts, and of the layers as gzip compresses them for a registry.

    Raises:
        AssertionError: a model is in the image.
    """
    root = Path(buildah("mount", container))
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    bytes_of = {path: path.stat().st_size for path in files}
    models = [path for path in files if path.suffix in MODEL_SUFFIXES and bytes_of[path] > LARGE_BYTES]
    assert models == [], models
    packages = next((root / "opt" / "venv" / "lib").iterdir()) / "site-packages"
    by_part: Counter[str] = Counter()
    service = 0
    for path, size in bytes_of.items():
        if packages in path.parents:
            by_part[path.relative_to(packages).parts[0]] += size
        service += size if root / "opt" / "service" in path.parents else 0
    largest = dict(by_part.most_common(10))
    layers = folder / "layers"
    buildah("push", "--quiet", IMAGE, f"oci:{layers}:check")
    blobs = sorted((path.stat().st_size for path in (layers / "blobs" / "sha256").iterdir()), reverse=True)
    shutil.rmtree(layers)
    found = {
        "files": sum(bytes_of.values()),
        "dependencies": sum(by_part.values()),
        "service": service,
        **{f"  {name}": size for name, size in largest.items()},
        "compressed": sum(blobs),
        **{f"  layer {number}": size for number, size in enumerate(blobs, 1) if size > LARGE_BYTES},
    }
    buildah("umount", container)
    return {name: size / 1e6 for name, size in found.items()}


@contextmanager
def started(buildah: Buildah, container: str, command: Sequence[str], *mounts: str) -> Iterator[psutil.Process]:
    """Run a command in the container as its user; yields buildah's process, whose descendants are those inside."""
    volumes = [f"--volume={mount}" for mount in mounts]
    process = subprocess.Popen(buildah.command("run", "--isolation", "chroot", *volumes, container, "--", *command))
    try:
        yield psutil.Process(process.pid)
    finally:
        for descendant in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            descendant.kill()
        process.wait()


def await_ready(process: psutil.Process) -> float:
    """Seconds until ``/readyz`` answers 200."""
    begin = time.monotonic()
    while time.monotonic() < begin + START_TIMEOUT_S:
        assert process.status() != psutil.STATUS_ZOMBIE, "the container has ended"
        try:
            if httpx2.get(f"{URL}/readyz", timeout=2.0, trust_env=False).status_code == 200:
                return time.monotonic() - begin
        except httpx2.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready after {START_TIMEOUT_S:.0f} s")


def stop(process: psutil.Process) -> float:
    """Send SIGTERM to the start command as an engine would; returns the seconds until all processes are gone."""
    inside = [child for child in process.children(recursive=True) if "reward-serve" in " ".join(child.cmdline())]
    command = next(child for child in inside if Path(child.exe()).name.startswith("python"))
    descendants = command.children(recursive=True)
    assert command.uids().real == USER, command
    begin = time.monotonic()
    command.send_signal(signal.SIGTERM)
    status = process.wait(STOP_TIMEOUT_S)
    assert status == 0, f"exit status {status}"
    left = [child for child in descendants if child.is_running()]
    assert left == [], left
    return time.monotonic() - begin


def serve_once(
    buildah: Buildah, container: str, config: dict[str, Any], logs: Path, options: Sequence[str], *mounts: str
) -> None:
    """Start the service in the container, score items, run the health check, and stop it by SIGTERM.

    The access log goes to a folder: buildah's pipes stay root's, while engines give them to the container's user.
    """
    logs.mkdir()
    os.chown(logs, USER, USER)
    command = [*config["Entrypoint"], "--log", "/logs/requests.jsonl", *options]
    print(f"serve {' '.join(options)}", flush=True)
    with started(buildah, container, command, f"{logs}:/logs", *mounts) as process:
        ready_s = await_ready(process)
        model = httpx2.get(f"{URL}/v1/model", trust_env=False).raise_for_status().json()
        page = httpx2.get(f"{URL}/page/main.js", trust_env=False).raise_for_status()
        answer = httpx2.post(f"{URL}/v1/score", json=SCORE, trust_env=False, timeout=30.0).raise_for_status().json()
        rewards = [result["reward"] for result in answer["results"]]
        assert len(set(rewards)) == len(ITEMS), answer
        buildah("run", "--isolation", "chroot", container, "--", *config["Healthcheck"]["Test"][1:])
        print(f"  ready after {ready_s:.1f} s; rewards {rewards}; engine {json.dumps(model['engine'])}")
        print(f"  stopped by SIGTERM within {stop(process):.1f} s, status 0", flush=True)
    routes = [json.loads(line)["route"] for line in (logs / "requests.jsonl").read_text().splitlines()]
    assert page.headers["Content-Type"].startswith("text/javascript")
    assert "/v1/score" in routes, routes


def check_unprivileged(buildah: Buildah, container: str) -> None:
    """The user of the image can write the cache and nothing of the service."""
    code = (
        "import os; assert os.access('/home/reward/.cache', os.W_OK); "
        "assert not any(os.access(path, os.W_OK) for path in ('/opt/service', '/opt/venv', '/usr', '/'))"
    )
    buildah("run", "--isolation", "chroot", container, "--", "python", "-c", code)


def main() -> None:
    """Run the check; an exception is a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="variant; gpu is built and not started")
    parser.add_argument("--folder", type=Path, help="storage that is kept for the next run; default: a temporary one")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 8000))  # noqa: S104 - the image listens there too
    with tempfile.TemporaryDirectory(prefix="image-check-", dir=arguments.folder) as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        buildah = Buildah(arguments.folder or folder)
        try:
            check_image(buildah, folder, arguments.device)
        finally:
            buildah("rm", "--all")
            if arguments.folder is None:
                buildah("rmi", "--all", "--force")


def check_image(buildah: Buildah, folder: Path, device: str) -> None:
    """Build, inspect, measure and run the image."""
    base = os.environ.get("BASE_IMAGE") or make_base(buildah, folder)
    begin = time.monotonic()
    build(buildah, base, device)
    print(f"built in {time.monotonic() - begin:.0f} s", flush=True)
    config = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    check_configuration(config)
    container = buildah("from", "--pull-never", f"--ulimit=nofile={OPEN_FILES}:{OPEN_FILES}", IMAGE)
    for name, megabytes in sizes(buildah, container, folder).items():
        print(f"  {name:<24}{megabytes:10.1f} MB")
    check_unprivileged(buildah, container)
    if device == "cpu":
        checkpoint = write_tiny_checkpoint(folder / "checkpoint")
        for path in checkpoint.iterdir():
            path.chmod(0o644)  # readable for the container's user
        local = ["--model", "/model", "--runtime", "local", *OPEN]
        serve_once(buildah, container, config, folder / "ray", ["--engine", "oracle", *OPEN])
        serve_once(buildah, container, config, folder / "local", local, f"{checkpoint}:/model:ro")
    print("the image serves")


if __name__ == "__main__":
    main()
