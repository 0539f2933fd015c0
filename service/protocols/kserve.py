"""KServe's Open Inference Protocol, version 2, as tritonclient's HTTP client speaks it.

Tensors of a request are JSON or, after the JSON, raw bytes (the binary tensor extension); answers are JSON, which the
client accepts either way. Texts of the input ``sentences`` or ``text`` are tokenized as they are; ``prompt`` with
``completion`` are rendered by the model's template; ids of ``tokens`` are not changed. The client repeats nothing, so
its requests wait for room in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from service.errors import InvalidRequest, MalformedBody
from service.protocols.base import (
    AS_IT_IS,
    Answer,
    Call,
    Protocol,
    ProtocolContext,
    ReadingRoute,
    ScoringRoute,
    WireRequest,
    check_model,
    is_truncated,
    num_tokens,
    outputs_of,
    reward_of,
)
from service.protocols.json_body import decode_body
from service.protocols.kserve_tensors import WireTensor, items_of, read_tensors
from service.protocols.violations import invalid
from service.records import Encoding, Score

DEADLINE_S = 50.0
"""The client gives up after 60 s."""

HEADER_LENGTH = "inference-header-content-length"
"""Header with the bytes of JSON before the binary tensors, counted after decompression."""

_OUTPUTS = {"rewards": "FP32", "reward": "FP32", "num_tokens": "INT32", "truncated": "BOOL", "ood_p": "FP32"}
"""Datatypes of the outputs by name. ``rewards`` has a column for each output of the model, and ``reward`` is their
combination, which a model with one output does not have. They are answered if a request names none."""


class WireOutput(msgspec.Struct, kw_only=True):
    """An output that is asked for."""

    name: str


class WireInferRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /v2/models/{model}/infer``."""

    inputs: list[WireTensor]
    outputs: list[WireOutput] | None = None
    id: str | None = None


class _Inference(msgspec.Struct, frozen=True):
    """What the answer needs of the request."""

    id: str | None
    outputs: tuple[str, ...]
    num_outputs: int
    """Numbers that the model gives for an item."""


_decoder = msgspec.json.Decoder(WireInferRequest)

_ANSWER = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"enum": list(_OUTPUTS)},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"enum": sorted(set(_OUTPUTS.values()))},
                    "data": {"type": "array"},
                },
            },
        },
    },
}


def _decode(request: WireRequest, context: ProtocolContext) -> Call:
    header, binary = _split(request)
    wire: WireInferRequest = decode_body(_decoder, header)
    tensors = read_tensors(wire.inputs, binary)
    context.check_count(max((tensor.shape[0] for tensor, _ in tensors.values() if tensor.shape), default=0))
    items = items_of(tensors)
    encoding = context.truncating(Encoding() if "prompt" in tensors else AS_IT_IS)
    outputs = _outputs(wire.outputs, context)
    if "ood_p" in outputs and "prompt" not in tensors:
        raise _unknown_p_value()
    return Call(
        items,
        encoding,
        context.level if "ood_p" in outputs else "basic",
        request.path.get("model"),
        wire=_Inference(wire.id, outputs, len(context.item_outputs)),
    )


def _split(request: WireRequest) -> tuple[bytes, bytes]:
    """Return the JSON of a body and the binary tensors behind it."""
    declared = request.headers.get(HEADER_LENGTH)
    if declared is None:
        return request.body, b""
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > len(request.body):
        raise MalformedBody(f"Inference-Header-Content-Length is no number of bytes up to {len(request.body)}")
    return request.body[: int(declared)], request.body[int(declared) :]


def _outputs(asked: Sequence[WireOutput] | None, context: ProtocolContext) -> tuple[str, ...]:
    known = _known_outputs(context)
    default = tuple(name for name in ("rewards", "reward") if name in known)
    names = tuple(output.name for output in asked or ()) or default
    for index, name in enumerate(names):
        if name not in known:
            raise invalid(f"/outputs/{index}/name", "out_of_range", f"The outputs of this model are {', '.join(known)}")
    return names


def _known_outputs(context: ProtocolContext) -> list[str]:
    """Names of the outputs that this model has."""
    absent = {"ood_p": not context.is_calibrated, "reward": len(context.item_outputs) == 1 or not context.has_reward}
    return [name for name in _OUTPUTS if not absent.get(name)]


def _width(name: str, context: ProtocolContext) -> int:
    """Numbers per item of an output."""
    return len(context.item_outputs) if name == "rewards" else 1


def _encode(call: Call, answer: Answer) -> bytes:
    inference: _Inference = call.wire
    members: dict[str, Any] = {"model_name": answer.model.name, "model_version": answer.model.version}
    if inference.id is not None:
        members["id"] = inference.id
    members["outputs"] = [
        {
            "name": name,
            "shape": [len(answer.scores), inference.num_outputs if name == "rewards" else 1],
            "datatype": _OUTPUTS[name],
            "data": [value for score in answer.scores for value in _values(name, score)],
        }
        for name in inference.outputs
    ]
    return msgspec.json.encode(members)


def _values(name: str, score: Score) -> tuple[float | bool, ...]:
    if name == "rewards":
        return outputs_of(score)
    if name == "reward":
        return (reward_of(score),)
    if name == "num_tokens":
        return (num_tokens(score),)
    if name == "truncated":
        return (is_truncated(score),)
    if score.ood is None:
        raise _unknown_p_value()
    return (score.ood.p_value,)


def _unknown_p_value() -> InvalidRequest:
    return invalid("/outputs", "unknown_value", "ood_p is known only for the inputs prompt and completion")


def _server(_: WireRequest, context: ProtocolContext) -> bytes:
    members = {"name": "reward-service", "version": context.model.version, "extensions": ["binary_tensor_data"]}
    return msgspec.json.encode(members)


def _health(_: WireRequest, __: ProtocolContext) -> bytes:
    return b"{}"


def _model_health(request: WireRequest, context: ProtocolContext) -> bytes:
    check_model(request.path["model"], context)
    return b"{}"


_INPUTS = (
    ("sentences", "BYTES", "TYPE_STRING", [1]),
    ("prompt", "BYTES", "TYPE_STRING", [1]),
    ("completion", "BYTES", "TYPE_STRING", [1]),
    ("tokens", "INT64", "TYPE_INT64", [-1]),
    ("sequence_lengths", "INT64", "TYPE_INT64", [1]),
)


def _metadata(request: WireRequest, context: ProtocolContext) -> bytes:
    check_model(request.path["model"], context)
    return msgspec.json.encode(
        {
            "name": context.model.name,
            "versions": [context.model.version],
            "platform": "reward-service",
            "inputs": [
                {"name": name, "datatype": datatype, "shape": [-1, *dims]} for name, datatype, _, dims in _INPUTS
            ],
            "outputs": [
                {"name": name, "datatype": _OUTPUTS[name], "shape": [-1, _width(name, context)]}
                for name in _known_outputs(context)
            ],
        }
    )


def _config(request: WireRequest, context: ProtocolContext) -> bytes:
    check_model(request.path["model"], context)
    return msgspec.json.encode(
        {
            "name": context.model.name,
            "platform": "reward-service",
            "max_batch_size": context.limits.max_request_items,
            "input": [
                {"name": name, "data_type": data_type, "dims": dims, "optional": True}
                for name, _, data_type, dims in _INPUTS
            ],
            "output": [
                {"name": name, "data_type": f"TYPE_{_OUTPUTS[name]}", "dims": [_width(name, context)]}
                for name in _known_outputs(context)
            ],
        }
    )


_MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
_READINGS = (
    ("", "metadata of the model", _metadata, False),
    ("/ready", "the model accepts requests", _model_health, True),
    ("/config", "configuration of the model in Triton's form", _config, False),
)

PROTOCOL = Protocol(
    "kserve",
    DEADLINE_S,
    (
        ScoringRoute(
            f"{_MODEL_PATHS[0]}/infer",
            "KServe: rewards of tensors of texts or token ids",
            _decode,
            _encode,
            WireInferRequest,
            _ANSWER,
            answers_vectors=True,
            aliases=(f"{_MODEL_PATHS[1]}/infer",),
        ),
    ),
    (
        ReadingRoute("/v2", "KServe: metadata of the server", _server),
        ReadingRoute("/v2/health/live", "KServe: the process is alive", _health),
        ReadingRoute("/v2/health/ready", "KServe: the model accepts requests", _health, needs_ready=True),
        *(
            ReadingRoute(f"{path}{suffix}", f"KServe: {summary}", encode, needs_ready=needs_ready)
            for path in _MODEL_PATHS
            for suffix, summary, encode, needs_ready in _READINGS
        ),
    ),
    waits_for_room=True,
    takes_any_media_type=True,
    error_members=lambda members: {"error": members["detail"]},
)
