"""The command ``reward-serve``: judges the checkpoint, starts the service on this machine, and ends it cleanly.

Ray runs in a child process under a supervisor; this process imports neither Ray nor, beyond the judgement, torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.status import Status

from service.errors import CheckpointError, SettingsError, StartupError
from service.launch.ray_environment import Launch, choose_ports, ray_environment
from service.launch.supervisor import (
    Progress,
    StopRequested,
    private_folder,
    raise_on_stop_signals,
    reachable,
    supervise,
)
from service.settings import ModelSettings, Settings, read_settings

DRAIN_S = 6.0
"""Seconds for accepted requests after Ctrl-C; with Serve's own end this stays below the supervisor's patience."""
REPLICA_DRAIN_S = 1.0
"""How long a leaving replica stays reachable, so that HAProxy has heard of it."""
_JUDGE = "import sys; from service.launch.command import print_verdict; print_verdict(sys.stdin.read())"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judgement found. ``path`` and ``name`` are None for the oracle, which has no checkpoint."""

    path: str | None
    name: str | None
    needs_gpu: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    raise_on_stop_signals()
    try:
        settings = read_settings(_tree(options))
        if options.check is not None:
            _check(settings, console)
        else:
            _serve(settings, options, console)
    except StartupError as error:
        console.print(f"reward-serve: {error}", markup=False, style="red")
        return 1
    except StopRequested:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reward-serve", description="Serve a scalar-head reward model over HTTP.")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder, ONNX bundle or hub id; none: the demo model")
    parser.add_argument("--check", metavar="DIR", help="judge this checkpoint and run the parity probe, serve nothing")
    parser.add_argument("--revision", metavar="REV", help="revision of a hub id")
    parser.add_argument("--name", help="the model's name in answers and metrics")
    parser.add_argument(
        "--engine",
        choices=["auto", "torch", "onnx", "oracle"],
        help="auto: onnx for a bundle of reward-export, torch for a checkpoint; oracle: a known function, for tests",
    )
    parser.add_argument("--forward", choices=["auto", "packed", "padded"], help="forward path of the torch engine")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--pooling", choices=["hf", "last"])
    parser.add_argument("--max-input-tokens", type=int, metavar="N", help="longest sequence that is scored")
    parser.add_argument("--max-batch-tokens", type=int, metavar="N", help="tokens of one forward pass")
    parser.add_argument(
        "--prefix-cache-mib", type=int, metavar="N", help="memory for prompts kept between passes; 0: none are kept"
    )
    parser.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of the forward pass, per replica")
    parser.add_argument(
        "--kernels", choices=["auto", "on", "off"], help="our own for bfloat16 on x86-64 CPUs; made by a C++ compiler"
    )
    parser.add_argument(
        "--quantization",
        choices=["none", "int8", "fp8"],
        help="linear layers in 8 bits, which changes rewards: int8 on CPUs with AVX-512 VNNI, fp8 on GPUs",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile where our kernels do not run: faster passes for a slower start",
    )
    parser.add_argument("--deterministic", action="store_true", default=None, help="bit-identical across batches")
    parser.add_argument(
        "--host", default="127.0.0.1", help="where HTTP listens (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--replicas", type=_positive, default=1, help="copies of the model; each takes a GPU where there are any"
    )
    parser.add_argument(
        "--log",
        metavar="FILE",
        help="one JSON line per request; -: standard output, the default unless it is a terminal",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _tree(options: argparse.Namespace) -> dict[str, Any]:
    model = {
        "path": options.check or options.model,
        "revision": options.revision,
        "name": options.name,
        "engine": options.engine,
        "forward": options.forward,
        "device": options.device,
        "dtype": options.dtype,
        "pooling": options.pooling,
        "max_input_tokens": options.max_input_tokens,
        "num_threads": options.num_threads,
        "kernels": options.kernels,
        "quantization": options.quantization,
        "compile": options.compile,
    }
    batching = {
        "max_batch_tokens": options.max_batch_tokens,
        "prefix_cache_mib": options.prefix_cache_mib,
        "deterministic": options.deterministic,
    }
    return {
        "model": {name: value for name, value in model.items() if value is not None},
        "batching": {name: value for name, value in batching.items() if value is not None},
    }


def _check(settings: Settings, console: Console) -> None:
    from service.assembly import assemble, open_model
    from service.checkpoints.checkpoint import describe

    opened = open_model(settings.model)
    for line in describe(opened.checkpoint):
        console.print(line, markup=False)
    served = assemble(settings, opened=opened)
    info = served.info
    console.print(f"  served as         {served.identity.name}, version {served.identity.version}", markup=False)
    console.print(f"  forward           {info.forward}, {info.arithmetic} on {info.device}", markup=False)
    if info.kernels:
        console.print(f"  kernels           {info.kernels}", markup=False)
    if info.providers:
        console.print(f"  providers         {', '.join(info.providers)}", markup=False)
    for name, value in info.parity.items():
        console.print(f"  parity            {name}: {value}", markup=False)
    for name, value in info.quantization_error.items():
        console.print(f"  quantization      {name}: {value}", markup=False)


def _serve(settings: Settings, options: argparse.Namespace, console: Console) -> None:
    ports = choose_ports(options.host, options.port)
    with _TerminalProgress(console, _reachable_url(options)) as progress:
        verdict = _judge_apart(settings, progress)
        settings = _settled(settings, verdict, options)
        with private_folder() as folder:
            launch = Launch(
                settings=settings.model_dump(mode="json") | {"log": _log_path(options.log, folder)},
                folder=str(folder),
                host=options.host,
                port=options.port,
                replicas=options.replicas,
                cpus=_cores_each(options.replicas),
                gpus=int(verdict.needs_gpu),
                drain_s=DRAIN_S,
            )
            environment = ray_environment(folder, ports, deadline_s=settings.limits.deadline_s, drain_s=REPLICA_DRAIN_S)
            supervise(launch, environment | visible_devices(options.device), progress)


def _judge_apart(settings: Settings, progress: Progress) -> Verdict:
    """Judge the checkpoint in a process of its own, so that torch's memory goes with it."""
    if settings.model.engine == "oracle":
        return Verdict(None, None, needs_gpu=False)
    progress.stage("checkpoint")
    judge = subprocess.run(  # noqa: S603 - our own interpreter and our own module
        [sys.executable, "-P", "-c", _JUDGE],
        input=settings.model.model_dump_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,
    )
    if judge.returncode != 0:
        raise CheckpointError(f"The judgement of the checkpoint broke off with status {judge.returncode}.")
    answer = json.loads(judge.stdout)
    if "refusal" in answer:
        raise CheckpointError(answer["refusal"])
    return Verdict(**answer)


def print_verdict(model: str) -> None:
    """Print the Verdict on a checkpoint as JSON, or the sentence that refuses it; runs in a process of its own.

    Args:
        model: ModelSettings as JSON.
    """
    from service.assembly import needs_gpu, open_model

    settings = ModelSettings.model_validate_json(model)
    try:
        checkpoint = open_model(settings).checkpoint
        gpu = needs_gpu(settings, checkpoint.path)
        answer = asdict(Verdict(str(checkpoint.path.resolve()), checkpoint.name, gpu))
    except StartupError as error:
        answer = {"refusal": str(error)}
    print(json.dumps(answer))


def _settled(settings: Settings, verdict: Verdict, options: argparse.Namespace) -> Settings:
    """The settings with what is known by now, so that replicas neither search nor download again."""
    found: dict[str, Any] = {}
    if verdict.path is not None:
        found |= {"path": verdict.path, "name": verdict.name}
    if verdict.needs_gpu:
        found["device"] = "cuda"  # Ray shows each replica its own device alone, whatever its number
    if settings.model.num_threads is None:
        found["num_threads"] = _cores_each(options.replicas)
    return settings.model_copy(update={"model": settings.model.model_copy(update=found)})


def visible_devices(device: str | None) -> dict[str, str]:
    """The environment that shows Ray one CUDA device alone, when the command names one by number."""
    name, _, number = (device or "").partition(":")
    return {"CUDA_VISIBLE_DEVICES": number} if name == "cuda" and number else {}


def _log_path(choice: str | None, folder: Path) -> str:
    """The file that replicas append to; they are other processes, so standard output has to have a path."""
    if choice not in {None, "-"}:
        return str(Path(str(choice)).absolute())
    stdout = Path(f"/proc/{os.getpid()}/fd/1")
    try:
        stdout.open("ab").close()
    except OSError:  # a socket, as under systemd, has no path
        if choice == "-":
            raise SettingsError("Standard output cannot be shared with the replicas; name a file with --log.") from None
        return str(folder / "requests.jsonl")
    return str(folder / "requests.jsonl" if choice is None and sys.stdout.isatty() else stdout)


def _cores_each(replicas: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // replicas)


def _reachable_url(options: argparse.Namespace) -> str:
    return f"http://{reachable(options.host)}:{options.port}"


_STAGES = {
    "checkpoint": "Judging the checkpoint",
    "ray": "Starting Ray",
    "serve": "Starting Ray Serve",
    "model": "Loading the model and warming up",
    "running": "Waiting for the first answer through the proxy",
}
_EXAMPLE = """\
curl -s {url}/v1/score -H 'Content-Type: application/json' -d '{{"items": [
  {{"prompt": "How do I boil an egg?", "completion": "Put it in boiling water for eight minutes."}},
  {{"prompt": "How do I boil an egg?", "completion": "No."}}]}}'"""


class _TerminalProgress:
    """Shows the start: a moving line on a terminal, a plain line per stage elsewhere."""

    def __init__(self, console: Console, url: str) -> None:
        self._console = console
        self._url = url
        self._status: Status | None = None
        self._started_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_status()

    def stage(self, name: str) -> None:
        """Show that a stage has begun."""
        # The judgement may show the progress of a download, which a moving line of ours would write over.
        self._show(_STAGES[name], moving=name != "checkpoint")

    def ready(self) -> None:
        """Show that the service answers, and how to ask it."""
        self._end_status()
        elapsed_s = time.monotonic() - self._started_at
        self._console.print(
            f"Ready in {elapsed_s:.0f} s: {self._url}\n\n{_EXAMPLE.format(url=self._url)}\n", markup=False
        )

    def stopping(self) -> None:
        """Show that the end has begun."""
        self._show("Stopping: accepted requests are answered first")

    def _show(self, text: str, *, moving: bool = True) -> None:
        self._end_status()
        if moving and self._console.is_terminal:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._console.print(f"{text} ...", markup=False)

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


if __name__ == "__main__":
    sys.exit(main())
