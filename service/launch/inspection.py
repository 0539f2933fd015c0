"""Check a checkpoint in a process of its own, so that the memory of torch and transformers ends with that process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass

from service.errors import CheckpointError, StartupError
from service.settings import ModelSettings

_CHILD = "import sys; from service.launch.inspection import print_inspection; print_inspection(sys.stdin.read())"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the start command has to find out about a checkpoint."""

    path: str | None
    """Absolute path of its folder; None for the oracle, which has no checkpoint."""
    name: str | None
    """Name under which it is served; None for the oracle."""
    needs_gpu: bool
    """Whether each replica takes a GPU."""
    notes: tuple[str, ...] = ()
    """Sentences on unusual properties of the checkpoint, which the start prints."""


def inspect_checkpoint(settings: ModelSettings) -> Inspection:
    """Validate the checkpoint that the settings name, in a child process.

    Raises:
        CheckpointError: the checkpoint is refused, or the child process failed.
    """
    if settings.engine == "oracle":
        return Inspection(None, None, needs_gpu=False)
    child = subprocess.run(  # noqa: S603 - this interpreter and a module of this package
        [sys.executable, "-P", "-c", _CHILD],
        input=settings.model_dump_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,
    )
    if child.returncode != 0:
        raise CheckpointError(_failure(child.returncode))
    answer = json.loads(child.stdout)
    if "refusal" in answer:
        raise CheckpointError(answer["refusal"])
    return Inspection(**answer)


def _failure(status: int) -> str:
    """The sentence for a child process that ended without an answer, by its exit status."""
    if status == -signal.SIGKILL:
        return (
            "The check of the checkpoint was killed, most likely because the memory did not suffice: free some, or "
            "raise the limit of the container."
        )
    end = f"was ended by {signal.Signals(-status).name}" if status < 0 else "failed"
    return f"The check of the checkpoint {end}, for the reason above: the checkpoint may be damaged."


def print_inspection(model: str) -> None:
    """Print the Inspection of a checkpoint as JSON, or the sentence that refuses it; runs in the child process.

    Args:
        model: ModelSettings as JSON.
    """
    from service.assembly import needs_gpu, open_model

    settings = ModelSettings.model_validate_json(model)
    try:
        checkpoint = open_model(settings).checkpoint
        gpu = needs_gpu(settings, checkpoint.path)
        answer = asdict(Inspection(str(checkpoint.path.resolve()), checkpoint.name, gpu, checkpoint.notes))
    except StartupError as error:
        answer = {"refusal": str(error)}
    print(json.dumps(answer))
