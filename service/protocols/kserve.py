"""KServe's Open Inference Protocol, version 2, as tritonclient's HTTP client speaks it.

Tensors of a request are JSON or, after the JSON, raw bytes (the binary tensor extension); answers are JSON, which the
client accepts either way. Texts of the input ``sentences`` or ``text`` are tokenized as they are; ``prompt`` with
``completion`` are rendered by the model's template; ids of ``tokens`` are not changed. The client repeats nothing, so
its requests wait for room in the queue.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

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
from service.protocols.native import decode_body
from service.protocols.violations import invalid
from service.records import Encoding, Exchange, Item, Score, TemplatedText, TokenIds

DEADLINE_S = 50.0
"""The client gives up after 60 s."""

HEADER_LENGTH = "inference-header-content-length"
"""Header with the bytes of JSON before the binary tensors, counted after decompression."""

_TEXT_INPUTS = ("sentences", "text")
_INTEGERS = {"INT64": "q", "INT32": "i", "UINT64": "Q", "UINT32": "I"}
_OUTPUTS = {"rewards": "FP32", "reward": "FP32", "num_tokens": "INT32", "truncated": "BOOL", "ood_p": "FP32"}
"""Datatypes of the outputs by name. ``rewards`` has a column for each output of the model, and ``reward`` is their
combination, which a model with one output does not have. They are answered if a request names none."""

MAX_DIMENSIONS = 8
"""Dimensions of a tensor."""

_Size = Annotated[int, Meta(ge=0, le=2**40)]


class WireTensorParameters(msgspec.Struct, kw_only=True):
    """Parameters of an input."""

    binary_data_size: _Size | None = None


class WireTensor(msgspec.Struct, kw_only=True):
    """An input; its data are in ``data``, or in the bytes after the JSON."""

    name: str
    shape: Annotated[list[_Size], Meta(max_length=MAX_DIMENSIONS)]
    datatype: str
    data: list[Any] | None = None
    parameters: WireTensorParameters | None = None


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
    tensors = _read_tensors(wire.inputs, binary)
    context.check_count(max((tensor.shape[0] for tensor, _ in tensors.values() if tensor.shape), default=0))
    items = _items(tensors)
    encoding = context.truncating(Encoding() if "prompt" in tensors else AS_IT_IS)
    outputs = _outputs(wire.outputs, context)
    if "ood_p" in outputs and "prompt" not in tensors:
        raise _unknown_p_value()
    return Call(
        items,
        encoding,
        context.level if "ood_p" in outputs else "basic",
        request.path.get("model"),
        wire=_Inference(wire.id, outputs, len(context.outputs)),
    )


def _split(request: WireRequest) -> tuple[bytes, bytes]:
    """Return the JSON of a body and the binary tensors behind it."""
    declared = request.headers.get(HEADER_LENGTH)
    if declared is None:
        return request.body, b""
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > len(request.body):
        raise MalformedBody(f"Inference-Header-Content-Length is no number of bytes up to {len(request.body)}")
    return request.body[: int(declared)], request.body[int(declared) :]


def _read_tensors(tensors: Sequence[WireTensor], binary: bytes) -> dict[str, tuple[WireTensor, list[Any]]]:
    read: dict[str, tuple[WireTensor, list[Any]]] = {}
    offset = 0
    for index, tensor in enumerate(tensors):
        pointer = f"/inputs/{index}"
        size = tensor.parameters.binary_data_size if tensor.parameters else None
        if (size is None) == (tensor.data is None):
            raise invalid(pointer, "not_one_form", "An input has either data or parameters.binary_data_size")
        if tensor.datatype not in {"BYTES", *_INTEGERS}:
            raise invalid(f"{pointer}/datatype", "out_of_range", f"Expected BYTES, {', '.join(_INTEGERS)}")
        if size is None:
            values = _check_values(_flat(tensor.data or [], len(tensor.shape)), tensor.datatype, pointer)
        else:
            if offset + size > len(binary):
                raise MalformedBody(f"The binary data end after {len(binary)} bytes, inside of input {index}")
            values = _read_binary(binary[offset : offset + size], tensor.datatype, index)
            offset += size
        if len(values) != math.prod(tensor.shape):
            raise invalid(
                f"{pointer}/shape",
                "wrong_shape",
                f"The shape has {math.prod(tensor.shape)} elements, data {len(values)}",
            )
        if tensor.name in read:
            raise invalid(f"{pointer}/name", "repeated", "Each input has a name of its own")
        read[tensor.name] = tensor, values
    if offset != len(binary):
        raise MalformedBody(f"{len(binary) - offset} bytes of binary data belong to no input")
    return read


def _flat(data: list[Any], num_dimensions: int) -> list[Any]:
    """Return the elements of a tensor in row-major order; ``data`` may be nested as its shape is."""
    for _ in range(num_dimensions - 1):
        if not all(isinstance(entry, list) for entry in data):
            break
        data = [element for entry in data for element in entry]
    return data


def _check_values(values: list[Any], datatype: str, pointer: str) -> list[Any]:
    kind = str if datatype == "BYTES" else int
    if any(type(value) is not kind for value in values):
        raise invalid(f"{pointer}/data", "wrong_type", f"Expected a list of {'strings' if kind is str else 'integers'}")
    return values


def _read_binary(data: bytes, datatype: str, index: int) -> list[Any]:
    if datatype == "BYTES":
        return _read_texts(data, index)
    code = _INTEGERS[datatype]
    size = struct.calcsize(f"<{code}")
    if len(data) % size:
        raise MalformedBody(f"The binary data of input {index} are no multiple of {size} bytes")
    return list(struct.unpack(f"<{len(data) // size}{code}", data))


def _read_texts(data: bytes, index: int) -> list[str]:
    texts: list[str] = []
    offset = 0
    while offset < len(data):
        end = offset + 4
        if end <= len(data):
            end += int.from_bytes(data[offset:end], "little")
        if offset + 4 > len(data) or end > len(data):
            raise MalformedBody(f"The binary data of input {index} end inside of element {len(texts)}")
        try:
            texts.append(data[offset + 4 : end].decode())
        except UnicodeDecodeError:
            raise MalformedBody(f"Element {len(texts)} of input {index} is not UTF-8") from None
        offset = end
    return texts


def _items(tensors: Mapping[str, tuple[WireTensor, list[Any]]]) -> tuple[Item, ...]:
    names = set(tensors)
    for name in _TEXT_INPUTS:
        if names == {name}:
            return tuple(Item(TemplatedText(text)) for text in _texts(tensors, name))
    if names == {"prompt", "completion"}:
        prompts, completions = _texts(tensors, "prompt"), _texts(tensors, "completion")
        if len(prompts) != len(completions):
            raise invalid(
                "/inputs", "lengths_differ", f"There are {len(prompts)} prompts for {len(completions)} completions"
            )
        return tuple(Item(Exchange(*texts)) for texts in zip(prompts, completions, strict=True))
    if names == {"tokens", "sequence_lengths"}:
        return _token_items(tensors)
    raise invalid(
        "/inputs",
        "not_one_form",
        "The inputs are sentences (or text), or prompt and completion, or tokens and sequence_lengths",
    )


def _texts(tensors: Mapping[str, tuple[WireTensor, list[Any]]], name: str) -> list[str]:
    tensor, values = tensors[name]
    if tensor.datatype != "BYTES":
        raise invalid("/inputs", "wrong_type", f"The datatype of {name} is BYTES")
    if not tensor.shape or any(size != 1 for size in tensor.shape[1:]):
        raise invalid("/inputs", "wrong_shape", f"The shape of {name} is [n] or [n, 1]")
    return values


def _token_items(tensors: Mapping[str, tuple[WireTensor, list[Any]]]) -> tuple[Item, ...]:
    """The ids of each row up to its length; what follows is padding."""
    (tensor, ids), (lengths_tensor, lengths) = tensors["tokens"], tensors["sequence_lengths"]
    if "BYTES" in {tensor.datatype, lengths_tensor.datatype}:
        raise invalid("/inputs", "wrong_type", "The datatypes of tokens and sequence_lengths are integers")
    if len(tensor.shape) != 2 or len(lengths) != tensor.shape[0]:
        raise invalid("/inputs", "wrong_shape", "The shape of tokens is [n, length], that of sequence_lengths [n, 1]")
    width = tensor.shape[1]
    if any(not 1 <= length <= width for length in lengths):
        raise invalid("/inputs", "out_of_range", f"Each of sequence_lengths is from 1 to {width}")
    return tuple(Item(TokenIds(tuple(ids[row * width : row * width + length]))) for row, length in enumerate(lengths))


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
    absent = {"ood_p": not context.is_calibrated, "reward": len(context.outputs) == 1 or not context.has_reward}
    return [name for name in _OUTPUTS if not absent.get(name)]


def _width(name: str, context: ProtocolContext) -> int:
    """Numbers per item of an output."""
    return len(context.outputs) if name == "rewards" else 1


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
