"""The description of the served model, the answer of ``GET /v1/model``, as a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reward_client.answers import read_object
from reward_client.errors import BadAnswer
from reward_client.fields import read_fields


@dataclass(frozen=True, slots=True)
class Engine:
    """How rewards are computed."""

    engine: str | None = None
    """``torch``, ``onnx`` or ``oracle``."""

    architecture: str | None = None
    """The transformers class of the model."""

    forward: str | None = None
    """The forward path: ``packed`` or ``padded``."""

    device: str | None = None
    """``cpu`` or ``cuda:N``."""

    dtype: str | None = None
    """The dtype of the body's activations; the head is computed in float32."""

    quantization: str | None = None
    """``none``, or the type of the linear layers' products."""

    max_input_tokens: int | None = None
    """Tokens of the longest sequence that is scored."""


@dataclass(frozen=True, slots=True)
class CalibrationInfo:
    """The statistics that calibrated diagnostics refer to."""

    id: str | None = None
    """None: the model has no calibration."""

    reason: str | None = None
    """Why there is none; None where there is one."""


@dataclass(frozen=True, slots=True)
class RewardRule:
    """How the numbers that the model gives become one reward."""

    outputs: tuple[str, ...] = ("reward",)
    """Names of the numbers; where there are several, each result has them in ``rewards``."""

    combination: str | None = None
    """``output`` (there is one), ``weights``, ``mean``, ``min``, ``lower_bound``; None: no weights are known."""

    weights: Mapping[str, float] | None = None
    """Weight of each output by name, where ``combination`` is ``weights``."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served. A member that the service does not send is None."""

    name: str
    """The name of the model."""

    version: str
    """Hash of everything that can change its rewards; every answer names it."""

    description: Mapping[str, Any] = field(repr=False)
    """The whole answer, also what this record has no member for."""

    activation: str | None = None
    """What is applied to the head's output: ``none``."""

    pooling: str | None = None
    """Which token the scalar head reads."""

    template: str | None = None
    """How a plain-text prompt is rendered by default: ``chat`` or ``concat``."""

    truncation: str | None = None
    """What happens by default to an item that is too long: ``error`` or ``prompt_left``."""

    diagnostics: str | None = None
    """The default level of diagnostics."""

    deterministic: bool | None = None
    """Whether every item has a forward pass of its own, so that its reward cannot depend on the batch by a bit."""

    batch_invariant: bool | None = None
    """Whether rewards do not depend on the batch composition by a bit, as checked at the start."""

    engine: Engine = Engine()
    """How rewards are computed."""

    reward_rule: RewardRule = RewardRule()
    """How the numbers that the model gives become one reward."""

    calibration: CalibrationInfo = CalibrationInfo()
    """The statistics of calibrated diagnostics."""

    limits: Mapping[str, Any] = field(default_factory=dict)
    """Limits of a request by name, such as ``max_request_items``."""

    notes: tuple[str, ...] = ()
    """Remarks about the checkpoint."""


def read_model(content: bytes) -> ServedModel:
    """Parse an answer of ``/v1/model``.

    Raises:
        BadAnswer: not JSON, it does not name the model and its version, or a member has another type.
    """
    answer = read_object(content)
    model = answer.get("model")
    if not isinstance(model, dict) or not all(isinstance(model.get(name), str) for name in ("name", "version")):
        raise BadAnswer("The response does not name the model and its version")
    own = {"name": model["name"], "version": model["version"], "description": answer}
    return read_fields(ServedModel, answer | own, "the model")
