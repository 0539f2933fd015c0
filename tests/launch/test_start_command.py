"""The start command up to the start of Ray: what it refuses, and with which message."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import free_port
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint

from service.launch.command import main, parity_in_words
from service.launch.start import visible_devices


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """The command replaces two signal handlers; this restores them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must end with status 1, and return the one sentence with the reason."""
    assert main(arguments) == 1
    *stages, sentence = capsys.readouterr().err.splitlines()
    assert all(stage.endswith(" ...") for stage in stages)
    assert sentence.startswith("reward-serve: ")
    return sentence.removeprefix("reward-serve: ")


@pytest.mark.parametrize("runtime", ["ray", "local"])
def test_port_in_use(capsys: pytest.CaptureFixture[str], runtime: str) -> None:
    """A port in use ends the command before any process is started."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])

        assert refusal(capsys, "--engine", "oracle", "--port", port, "--runtime", runtime) == (
            f"Cannot listen on 127.0.0.1 port {port}: address already in use."
        )


@pytest.mark.parametrize("option", ["--max-input-tokens", "--max-batch-tokens", "--num-threads"])
def test_option_out_of_range(capsys: pytest.CaptureFixture[str], option: str) -> None:
    """A value out of range is refused; the message names the setting, the option and the range."""
    sentence = refusal(capsys, "--engine", "oracle", option, "0")

    assert f"{option.removeprefix('--').replace('-', '_')} ({option})" in sentence
    assert "must be a whole number of at least 1" in sentence


@pytest.mark.parametrize("replicas", ["0", "-1", "two"])
def test_replicas_are_one_or_more(capsys: pytest.CaptureFixture[str], replicas: str) -> None:
    """The number of replicas is a positive integer."""
    assert "server.replicas (--replicas)" in refusal(capsys, "--replicas", replicas)


def test_local_runtime_has_one_replica(capsys: pytest.CaptureFixture[str]) -> None:
    """Several replicas on the local runtime are refused, with the two ways out."""
    assert refusal(capsys, "--runtime", "local", "--replicas", "2") == (
        "runtime is local, which runs one replica, but server.replicas is 2: leave --replicas out, or take --runtime "
        "ray."
    )


def test_runtime_in_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime is a setting as any other: its variable is read, and a value that does not exist is refused."""
    monkeypatch.setenv("REWARD_RUNTIME", "docker")

    assert "runtime (REWARD_RUNTIME): must be one of ray, local." in refusal(capsys)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "0"], "server.port (--port): must be a whole number from 1 to 65,535."),
        (["--port", "65536"], "server.port (--port): must be a whole number from 1 to 65,535."),
        (["--dtype", "half"], "model.dtype (--dtype): must be one of auto, float32, bfloat16, float16."),
        (["--name", os.fsdecode(b"\xff")], "model.name (--name) is not valid UTF-8."),
        (["--log", "/nowhere/log"], "log (--log): /nowhere/log cannot be written (no such file or directory)."),
        (["--port", "22000"], "Choose another with --port."),
    ],
)
def test_mistakes_are_answered_before_anything_starts(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    """A value that cannot work is refused in one sentence, which says what would."""
    assert refusal(capsys, "--engine", "oracle", *arguments).endswith(reason)


def test_temporary_folder_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TMPDIR in which no folder can be made is refused before a model is loaded, and named."""
    monkeypatch.setenv("TMPDIR", "/nowhere")

    assert refusal(capsys, "--engine", "oracle", "--port", str(free_port())) == (
        "The private folder of the server cannot be made in /nowhere (no such file or directory): set TMPDIR to a "
        "folder that can be written."
    )


def test_path_that_the_environment_cannot_name(tmp_path: Path) -> None:
    """Where Python has no UTF-8 mode, a path beyond ASCII ends the start with the variable to set."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answer = subprocess.run(
        [sys.executable, "-m", "service.launch.command", "--model", str(tmp_path / "modell-ü")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert answer.returncode == 1
    assert answer.stderr == (
        "reward-serve: model.path (--model) is not valid UTF-8 in this environment, whose encoding is ascii: set "
        "PYTHONUTF8=1.\n"
    )


@pytest.mark.parametrize("options", [("--model",), ("--runtime", "local", "--model"), ("--check",)])
def test_refused_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...]) -> None:
    """A checkpoint without a scalar head is refused, with what to do about it, and Ray is not started."""
    write_tiny_causal_lm(tmp_path)

    assert "reward-convert" in refusal(capsys, "--port", str(free_port()), *options, str(tmp_path))


@pytest.mark.parametrize(
    ("device", "environment"),
    [("auto", {}), ("cpu", {}), ("cuda", {}), ("cuda:3", {"CUDA_VISIBLE_DEVICES": "3"})],
)
def test_a_numbered_device_is_the_only_visible_one(device: str, environment: dict[str, str]) -> None:
    """Ray assigns devices itself; a device requested by number is the only one that it can assign."""
    assert visible_devices(device) == environment


def test_check_of_a_good_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The check prints the checkpoint, what would be served, and the parity with plain transformers."""
    write_tiny_checkpoint(tmp_path)

    assert main(["--check", str(tmp_path), "--device", "cpu", "--dtype", "float32"]) == 0

    printed = capsys.readouterr().err
    for fact in ("LlamaForSequenceClassification", "weights sha256", "version", "packed, float32 on cpu"):
        assert fact in printed
    assert re.search(r"parity +(equal to transformers within \S+|bit-identical to transformers) on \d+ texts", printed)


def test_parity_in_words() -> None:
    """The comparison is said in one sentence, with its reference, and with a warning where it shows little."""
    found = {"max_difference": 6.2e-9, "tolerance": 1e-4, "noise": 0.0, "conclusive": True, "num_probes": 13}

    assert parity_in_words({}) == ""
    assert parity_in_words(found) == "equal to transformers within 6e-09 on 13 texts"
    assert parity_in_words({**found, "conclusive": False}).startswith(
        "equal to transformers within 6e-09 on 13 texts; this shows little, because rounding alone"
    )
    assert parity_in_words({"max_difference": 0.0, "num_texts": 5, "compared_to": "plain transformers at export"}) == (
        "bit-identical to transformers on 5 texts (plain transformers at export)"
    )
