"""Input tensors of KServe's protocol: JSON or raw bytes as values, and the values as items."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from service.errors import MalformedBody
from service.protocols.violations import invalid
from service.records import Exchange, Item, TemplatedText, TokenIds

_TEXT_INPUTS = ("sentences", "text")

_INTEGERS = {"INT64": "q", "INT32": "i", "UINT64": "Q", "UINT32": "I"}

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


def read_tensors(tensors: Sequence[WireTensor], binary: bytes) -> dict[str, tuple[WireTensor, list[Any]]]:
    """Return the values of each input, in row-major order, by its name.

    Args:
        tensors: the inputs of a request.
        binary: the bytes behind the JSON, in the order of the inputs that have their data there.

    Raises:
        InvalidRequest: an input has no data, data of another type or shape, or the name of another one.
        MalformedBody: the bytes do not match the sizes and types of the inputs.
    """
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


def items_of(tensors: Mapping[str, tuple[WireTensor, list[Any]]]) -> tuple[Item, ...]:
    """Return the items that the inputs of a request are.

    Raises:
        InvalidRequest: the inputs are none of the known sets, or their types or shapes do not match.
    """
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
