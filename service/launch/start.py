"""Start the service on this machine: check the checkpoint, decide what each replica gets, and supervise Ray.

Ray runs in a child process under the supervisor; this process imports neither Ray nor torch.
"""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from service.errors import RayStartError, ServerStartError, SettingsError
from service.launch.exposure import keys_for
from service.launch.haproxy import check_script
from service.launch.inspection import Inspection, inspect_checkpoint
from service.launch.launch import Launch
from service.launch.ports import Owners, reachable, reserved_block, reserved_http
from service.launch.private_folder import ACCESS_LOG, SHORT_FOLDER, is_too_long, private_folder, write_token
from service.launch.progress import TerminalProgress
from service.launch.ray_environment import direct_loopback, max_connections_within, ray_environment
from service.launch.start_settings import ServerSettings, StartSettings
from service.launch.supervisor import supervise
from service.launch.tls import refuse_tls
from service.settings import SecuritySettings, Settings, name_as_given

DRAIN_S = 6.0
"""Seconds that accepted requests get after Ctrl-C; with Serve's own shutdown this stays below ``STOP_AFTER_S``."""
START_ATTEMPTS = 3
"""Starts of Ray before the command gives up, where a failed one had to do with the machine and not with the model."""
REPLICA_DRAIN_S = 1.0
"""Seconds that a leaving replica stays reachable, so that HAProxy learns of it first."""


def serve(settings: StartSettings, console: Console, *, opens_page: bool = False) -> None:
    """Run the service until SIGINT or SIGTERM.

    Args:
        settings: all settings.
        console: where progress is shown.
        opens_page: whether a browser is to show the page once the service answers.

    Raises:
        StartupError: API keys are missing, a port is taken, the checkpoint is refused, or the server failed.
        StopRequested: the server was asked to stop, and has stopped.
    """
    server = settings.server
    refuse_tls(server)
    needs_key = keys_for(settings.security, server.host) is not None
    check_script()
    url = f"http://{reachable(server.host)}:{server.port}"
    with (
        reserved_http(server.host, server.port) as http,
        TerminalProgress(console, url, opens_page=opens_page, needs_key=needs_key) as progress,
    ):
        with private_folder() as folder:  # what cannot be made or written is said before a model is loaded
            log_path(settings.log, folder)
        if is_too_long(os.environ.get("TMPDIR", "")):
            progress.note(f"TMPDIR has too long a path for Unix sockets: they are made in {SHORT_FOLDER}.")
        if settings.model.engine != "oracle":
            progress.stage("checkpoint")
        inspection = inspect_checkpoint(settings.model, settings.tokenization)
        for note in inspection.notes:
            progress.note(f"Note: {note}")
        if inspection.text_rule is not None:
            progress.note(inspection.text_rule)
        for attempts_left in range(START_ATTEMPTS - 1, -1, -1):
            try:
                _run(settings, inspection, http, progress)
            except RayStartError as error:
                if not attempts_left:
                    raise
                progress.note(f"{error} Starting Ray once more.")


def _run(settings: StartSettings, inspection: Inspection, http: Owners, progress: TerminalProgress) -> None:
    """Start Ray with ports and a folder of its own, and supervise it; returns only by an exception."""
    server = settings.server
    with (
        _checkpoint_named_as_given(settings, inspection),
        private_folder() as folder,
        reserved_block(server.port, server.replicas) as (ports, block),
    ):
        log = log_path(settings.log, folder)
        for descriptor in (1, 2):
            write_at_the_end(descriptor)
        launch = _launch(resolve(settings, inspection, log), server, folder, needs_gpu=inspection.needs_gpu)
        environment = ray_environment(
            folder,
            ports,
            write_token(folder),
            cores=os.cpu_count() or 1,
            deadline_s=settings.limits.deadline_s,
            drain_s=REPLICA_DRAIN_S,
            max_connections=max_connections_within(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        )
        environment |= direct_loopback(os.environ) | visible_devices(settings.model.device)
        supervise(launch, environment, progress, (*http, *block))


@contextmanager
def _checkpoint_named_as_given(settings: StartSettings, inspection: Inspection) -> Iterator[None]:
    """Let errors of replicas, which know the checkpoint's folder alone, name it as the user did."""
    try:
        yield
    except ServerStartError as error:
        if inspection.path is None:
            raise
        raise type(error)(name_as_given(str(error), Path(inspection.path), settings.model)) from None


def resolve(settings: StartSettings, inspection: Inspection, log: str) -> Settings:
    """The settings of a replica, with what has been found out, so that replicas neither search nor download again."""
    found: dict[str, Any] = {}
    if inspection.path is not None:
        found |= {"path": inspection.path, "name": inspection.name}
    if inspection.needs_gpu:
        found["device"] = "cuda"  # Ray shows each replica its own device only, whatever its number
    if settings.model.num_threads is None:
        found["num_threads"] = cores_per_replica(settings.server.replicas)
    model = settings.model.model_copy(update=found)
    return settings.served_model().model_copy(update={"model": model, "log": log, "security": _absolute(settings)})


def _absolute(settings: StartSettings) -> SecuritySettings:
    """The security settings with paths that hold in every process."""
    security = settings.security
    named = {name: getattr(security, name) for name in ("api_keys", "answer_key")}
    return security.model_copy(
        update={name: str(Path(path).expanduser().absolute()) for name, path in named.items() if path is not None}
    )


def _launch(settings: Settings, server: ServerSettings, folder: Path, *, needs_gpu: bool) -> Launch:
    return Launch(
        settings=settings.model_dump(mode="json"),
        folder=str(folder),
        host=server.host,
        port=server.port,
        replicas=server.replicas,
        cpus=cores_per_replica(server.replicas),
        gpus=int(needs_gpu),
        drain_s=DRAIN_S,
    )


def visible_devices(device: str) -> dict[str, str]:
    """The environment that shows Ray a single CUDA device, if the settings name one by number."""
    name, _, number = device.partition(":")
    return {"CUDA_VISIBLE_DEVICES": number} if name == "cuda" and number else {}


def log_path(choice: str | None, folder: Path) -> str:
    """The file to which replicas append the access log; they are other processes, so standard output must have a path.

    Raises:
        SettingsError: the file that ``choice`` names cannot be written, or standard output cannot be opened by other
            processes.
    """
    if choice is None:
        return str(folder / ACCESS_LOG)
    path = Path(f"/proc/{os.getpid()}/fd/1") if choice == "-" else Path(choice).absolute()
    try:
        path.open("ab").close()
    except OSError as error:
        if choice == "-":  # a socket, as under systemd, has no path
            raise SettingsError("Standard output cannot be shared with the replicas; name a file with --log.") from None
        reason = (error.strerror or str(error)).lower()
        raise SettingsError(f"log (--log): {choice} cannot be written ({reason}).") from None
    return str(path)


def write_at_the_end(descriptor: int) -> None:
    """Let every write of an open file append to it, for this process and all that share the open file.

    Replicas append to the file behind standard output. Without this the start command would go on writing at its own
    offset, over their lines, where standard output or standard error is redirected to the same file.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)


def cores_per_replica(replicas: int) -> int:
    """CPU cores of this machine that each replica gets, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // replicas)
