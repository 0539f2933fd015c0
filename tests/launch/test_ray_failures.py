"""A start that fails because of Ray: another try, then a sentence that says what to do, and nothing left behind."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import started

from service.launch.ray_failures import explain_failure, is_of_ray

MESSAGES = {
    "The current node timed out during startup. This could happen because the raylet failed to startup.": "in time",
    "ray.exceptions.ActorDiedError: The actor died because it was killed by `ray.kill`.": "A process of Ray ended",
    "RuntimeError: HAProxy (pid=7) did not take over the admin socket within 30 seconds. stderr: ": "in time",
    "OSError: [Errno 28] No space left on device": "The disk is full",
    "RuntimeError: [ALERT] Starting frontend x: cannot bind socket (Address already in use)": "took a port",
    "ValueError: something that nobody has seen before": "Ray could not start the server (ValueError)",
}
"""Messages of Ray, and what the sentence of the service says of each."""


@pytest.mark.parametrize(("message", "expected"), MESSAGES.items(), ids=range(len(MESSAGES)))
def test_sentence_says_what_to_do(message: str, expected: str) -> None:
    """Each message of Ray becomes one sentence with a remedy, without Ray's own words."""
    sentence = explain_failure(message)

    assert expected in sentence
    assert any(remedy in sentence for remedy in ("start again", "free some space"))
    assert "ray.kill" not in sentence


def test_a_refused_model_is_not_tried_again() -> None:
    """A failure of the model is told apart from one of Ray."""
    assert is_of_ray("ray.exceptions.ActorDiedError: killed by ray.kill")
    assert not is_of_ray("The checkpoint has no head.")


@pytest.fixture
def temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR with a path that is short enough for Unix sockets."""
    folder = Path(f"/tmp/{secrets.token_hex(3)}")  # noqa: S108 - a new folder of this user alone
    folder.mkdir(0o700)
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    folder.rmdir()


FAILING_RAY = """
from service.launch import supervisor
supervisor._CHILD = '''
import ray
def init(**_):
    raise RuntimeError("The current node timed out during startup. See `gcs_server.out` for details.")
ray.init = init
from service.app import main
main()
'''
from service.launch.command import main
raise SystemExit(main())
"""


@pytest.mark.slow
def test_start_is_tried_again_and_ends_with_a_sentence(temporary_folder: Path, tmp_path: Path) -> None:
    """Where Ray never starts the command tries three times, says why in its own words, and leaves no folder behind."""
    with started(tmp_path, "--engine", "oracle", command=(sys.executable, "-c", FAILING_RAY)) as server:
        status = server.process.wait(120)

    lines = server.messages.read_text().splitlines()
    reason = "A part of Ray did not start in time: the machine is too busy or short of memory; start again when it has"
    assert status == 1
    assert len([line for line in lines if line.startswith(reason) and line.endswith("Starting Ray once more.")]) == 2
    assert lines[-1].startswith(f"reward-serve: {reason}")
    assert list(temporary_folder.iterdir()) == []
