"""Check a checkpoint in a process of its own, so that the memory of torch and transformers ends with that process.

A check that has passed is recorded (``inspection_records``), because the imports of that process take most of its time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from service.errors import CheckpointError, StartupError
from service.launch import inspection_records
from service.settings import ModelSettings, TokenizationSettings

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
    text_rule: str | None = None
    """How text becomes token ids, in one sentence; None for the oracle."""


def inspect_checkpoint(settings: ModelSettings, tokenization: TokenizationSettings) -> Inspection:
    """Validate the checkpoint that the settings name, in a child process, or return what an earlier check has found.

    Args:
        settings: name the checkpoint.
        tokenization: how its text is tokenized, which is checked too.

    Raises:
        CheckpointError: the checkpoint is refused, or the child process failed.
    """
    if settings.engine == "oracle":
        return Inspection(None, None, needs_gpu=False)
    question = json.dumps(
        {"model": settings.model_dump(mode="json"), "tokenization": tokenization.model_dump(mode="json")}
    )
    record = inspection_records.record_of(question, settings)
    if record is not None and record.answer is not None:
        return Inspection(**record.answer)
    answer = _answer_of_child(question)
    if record is not None:
        record.write(answer)
    return Inspection(**answer)


def _answer_of_child(question: str) -> dict[str, Any]:
    child = subprocess.run(  # noqa: S603 - this interpreter and a module of this package
        [sys.executable, "-P", "-c", _CHILD],
        input=question,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,
    )
    if child.returncode != 0:
        raise CheckpointError(_failure(child.returncode))
    answer: dict[str, Any] = json.loads(child.stdout)
    if "refusal" in answer:
        raise CheckpointError(answer["refusal"])
    return answer


def _failure(status: int) -> str:
    """The sentence for a child process that ended without an answer, by its exit status."""
    if status == -signal.SIGKILL:
        return (
            "The check of the checkpoint was killed, most likely because the memory did not suffice: free some, or "
            "raise the limit of the container."
        )
    end = f"was ended by {signal.Signals(-status).name}" if status < 0 else "failed"
    return f"The check of the checkpoint {end}, for the reason above: the checkpoint may be damaged."


def print_inspection(settings: str) -> None:
    """Print the Inspection of a checkpoint as JSON, or the sentence that refuses it; runs in the child process.

    Args:
        settings: the sections ``model`` and ``tokenization`` of the settings as JSON.
    """
    from service.assembly import needs_gpu, open_model, open_tokenization

    sections = json.loads(settings)
    model = ModelSettings.model_validate(sections["model"])
    try:
        checkpoint = open_model(model).checkpoint
        tokenization = open_tokenization(checkpoint, TokenizationSettings.model_validate(sections["tokenization"]))
        gpu = needs_gpu(model, checkpoint.path)
        answer = asdict(
            Inspection(
                str(checkpoint.path.resolve()), checkpoint.name, gpu, checkpoint.notes, tokenization.rule.sentence
            )
        )
    except StartupError as error:
        answer = {"refusal": str(error)}
    print(json.dumps(answer))
