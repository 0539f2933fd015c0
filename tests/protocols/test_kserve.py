"""The Open Inference Protocol, in the bytes that tritonclient's HTTP client sends."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx2
import pytest
from http_application import Application, application
from scored_texts import COMPLETION, ITEM, PROMPT, reward_of

from service.engines.oracle import NAN_BYTE, oracle_reward

INFER = "/v2/models/any/infer"


def texts(name: str, *values: str) -> dict[str, Any]:
    return {"name": name, "shape": [len(values), 1], "datatype": "BYTES", "data": list(values)}


def integers(name: str, rows: list[list[int]]) -> dict[str, Any]:
    return {"name": name, "shape": [len(rows), len(rows[0])], "datatype": "INT64", "data": rows}


def bytes_tensor(*values: str) -> bytes:
    return b"".join(struct.pack("<I", len(value.encode())) + value.encode() for value in values)


def binary(header: dict[str, Any], *tensors: bytes) -> tuple[bytes, dict[str, str]]:
    """A body and headers of the binary extension."""
    content = json.dumps(header).encode()
    return content + b"".join(tensors), {"Inference-Header-Content-Length": str(len(content))}


async def post(app: Application, body: bytes, headers: dict[str, str]) -> httpx2.Response:
    """Post without a Content-Type, as the client does."""
    return await app.client.post(INFER, content=body, headers=headers)


def rewards_of(answer: httpx2.Response) -> list[float]:
    (output,) = answer.json()["outputs"]
    assert (output["name"], output["datatype"]) == ("rewards", "FP32")
    assert output["shape"] == [len(output["data"]), 1]
    rewards: list[float] = output["data"]
    return rewards


async def test_texts_in_json(oracle: Application) -> None:
    """Texts are scored as they are; the answer has the served model's name, its version and the request's id."""
    answer = await oracle.post(INFER, {"id": "7", "inputs": [texts("sentences", "first", "second")]})

    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "model_name": "oracle",
        "model_version": "oracle",
        "id": "7",
        "outputs": [
            {
                "name": "rewards",
                "shape": [2, 1],
                "datatype": "FP32",
                "data": [reward_of("first"), reward_of("second")],
            }
        ],
    }


@pytest.mark.parametrize("coding", ["identity", "gzip", "deflate"])
async def test_texts_in_binary(oracle: Application, coding: str) -> None:
    """BYTES behind the JSON are read, also compressed; the length header counts decompressed bytes."""
    data = bytes_tensor("first", "zwölf", "third")
    header = {
        "inputs": [{"name": "text", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}],
        "parameters": {"binary_data_output": True},
    }
    body, headers = binary(header, data)
    if coding != "identity":
        body = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
        headers["Content-Encoding"] = coding

    answer = await post(oracle, body, headers)

    assert rewards_of(answer) == [reward_of("first"), reward_of("zwölf"), reward_of("third")]


async def test_token_ids_in_binary(oracle: Application) -> None:
    """INT64 behind the JSON is read; ids beyond the length of a row are padding."""
    ids, lengths = struct.pack("<6q", 97, 98, 0, 99, 0, 0), struct.pack("<2q", 2, 1)
    tensor = {"datatype": "INT64"}
    header = {
        "inputs": [
            {"name": "tokens", "shape": [2, 3], **tensor, "parameters": {"binary_data_size": len(ids)}},
            {"name": "sequence_lengths", "shape": [2, 1], **tensor, "parameters": {"binary_data_size": len(lengths)}},
        ]
    }

    answer = await post(oracle, *binary(header, ids, lengths))

    assert rewards_of(answer) == [oracle_reward([97, 98]), oracle_reward([99])]


async def test_outputs_on_request(oracle: Application) -> None:
    """Each output has its datatype and one value per item."""
    body = {
        "inputs": [texts("prompt", "p", "pp"), texts("completion", "c", "c")],
        "outputs": [{"name": "truncated"}, {"name": "num_tokens"}, {"name": "rewards"}],
    }

    outputs = (await oracle.post(INFER, body)).json()["outputs"]

    assert [(output["name"], output["datatype"], output["data"]) for output in outputs] == [
        ("truncated", "BOOL", [False, False]),
        ("num_tokens", "INT32", [2, 3]),
        ("rewards", "FP32", [reward_of("pc"), reward_of("ppc")]),
    ]


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [texts("other", "a")],
        [texts("prompt", "a")],
        [texts("prompt", "a"), texts("completion", "a", "b")],
        [texts("text", "a"), texts("text", "a")],
        [texts("text", "a") | {"shape": [2, 1]}],
        [texts("text", "a", "b") | {"shape": [1, 2]}],
        [texts("text", "a") | {"datatype": "FP32"}],
        [texts("text", "a") | {"data": [1]}],
        [integers("text", [[1]])],
        [integers("tokens", [[1, 2]])],
        [integers("tokens", [[1, 2]]), integers("sequence_lengths", [[3]])],
        [integers("tokens", [[1, 2]]), integers("sequence_lengths", [[0]])],
        [integers("tokens", [[1, 2]]), integers("sequence_lengths", [[1], [1]])],
        [integers("tokens", [[1, 999]]), integers("sequence_lengths", [[2]])],
        [texts("text")],
        [texts("text", "a") | {"data": [[["a"]]]}],
        [texts("text", "a") | {"shape": [2**40] * 9}],
        [texts("text", "a") | {"shape": []}],
        [texts("text", "a", "b") | {"data": [["a"], "b"]}],
    ],
)
async def test_inputs_that_are_refused(oracle: Application, inputs: list[Any]) -> None:
    """What is not understood gets no reward, and an error that the client can print."""
    answer = await oracle.post(INFER, {"inputs": inputs})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["error"] == answer.json()["detail"]


@pytest.mark.parametrize(
    ("data", "size", "length"),
    [
        (bytes_tensor("ab")[:-1], 6, None),
        (bytes_tensor("ab")[:-1], 5, None),
        (bytes_tensor("ab") + b"x", 6, None),
        (b"\x01\x00\x00\x00\xff", 5, None),
        (bytes_tensor("ab"), 6, "10000"),
        (bytes_tensor("ab"), 6, "-1"),
    ],
)
async def test_bad_framing(oracle: Application, data: bytes, size: int, length: str | None) -> None:
    """Binary data that do not agree with their declared sizes are a 400."""
    header = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}]}
    body, headers = binary(header, data)
    if length is not None:
        headers["Inference-Header-Content-Length"] = length

    answer = await post(oracle, body, headers)

    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body")
    assert isinstance(answer.json()["error"], str)


async def test_failed_item_fails_the_answer(oracle: Application) -> None:
    """One reward that is not finite makes the whole answer a 500."""
    answer = await oracle.post(INFER, {"inputs": [texts("text", "a", chr(NAN_BYTE))]})

    assert (answer.status_code, answer.json()["code"]) == (500, "non_finite_reward")
    assert isinstance(answer.json()["error"], str)


async def test_decompression_is_limited(tmp_path: Path) -> None:
    """A small stream of a large body is refused by its decompressed size."""
    async with application(tmp_path, limits={"max_request_bytes": 4096}) as oracle:
        answer = await post(oracle, zlib.compress(b" " * 100_000), {"Content-Encoding": "deflate"})

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("model", ["/v2/models/any", "/v2/models/any/versions/1"])
async def test_descriptions(oracle: Application, model: str) -> None:
    """Health, metadata and configuration are answered under any name and version."""
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", f"{model}/ready"):
        assert (await oracle.client.get(path)).status_code == 200
    metadata = (await oracle.client.get(model)).json()
    config = (await oracle.client.get(f"{model}/config")).json()
    infer = await oracle.post(f"{model}/infer", {"inputs": [texts("text", "a")]})

    assert (metadata["name"], metadata["versions"]) == ("oracle", ["oracle"])
    assert [output["name"] for output in metadata["outputs"]] == ["rewards", "num_tokens", "truncated"]
    assert (config["name"], config["max_batch_size"]) == ("oracle", 2048)
    assert {member["name"] for member in config["input"]} == {member["name"] for member in metadata["inputs"]}
    assert rewards_of(infer) == [reward_of("a")]


async def test_strict_model_names(tmp_path: Path) -> None:
    """With strict names the path must name the served model."""
    async with application(tmp_path, protocols={"strict_model_names": True}) as oracle:
        others = [await oracle.client.get(f"/v2/models/any{suffix}") for suffix in ("", "/ready", "/config")]
        others.append(await oracle.post(INFER, {"inputs": [texts("text", "a")]}))
        own = await oracle.post("/v2/models/oracle/infer", {"inputs": [texts("text", "a")]})

    assert {(answer.status_code, answer.json()["code"]) for answer in others} == {(404, "model_not_found")}
    assert own.status_code == 200


async def test_not_ready_while_draining(oracle: Application) -> None:
    """A replica that shuts down is alive and not ready."""
    await oracle.served.scorer.stop(0.0)

    live, ready, model = [
        await oracle.client.get(path) for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/any/ready")
    ]

    assert (live.status_code, ready.status_code, model.status_code) == (200, 503, 503)
    assert ready.json()["code"] == "draining"


@pytest.mark.asyncio(loop_scope="session")
async def test_same_reward_as_the_native_route(model: Application, rendered: str) -> None:
    """A templated text and its prompt and completion get the same reward, and no second BOS."""
    whole = await model.post(INFER, {"inputs": [texts("sentences", rendered)]})
    parts = await model.post(INFER, {"inputs": [texts("prompt", PROMPT), texts("completion", COMPLETION)]})

    assert rewards_of(whole) == rewards_of(parts) == await model.rewards(ITEM)


@pytest.mark.asyncio(loop_scope="session")
async def test_p_values_of_a_calibrated_model(calibrated_model: Application) -> None:
    """``ood_p`` is that of the native route; it is refused for texts without a known completion."""
    asked = {"outputs": [{"name": "ood_p"}, {"name": "rewards"}]}
    native = await calibrated_model.post("/v1/score", {"items": [ITEM], "diagnostics": "full"})

    parts = await calibrated_model.post(
        INFER, {"inputs": [texts("prompt", PROMPT), texts("completion", COMPLETION)], **asked}
    )
    whole = await calibrated_model.post(INFER, {"inputs": [texts("text", PROMPT)], **asked})
    metadata = (await calibrated_model.client.get("/v2/models/any")).json()

    result = native.json()["results"][0]
    assert [output["data"] for output in parts.json()["outputs"]] == [[result["ood"]["p_value"]], [result["reward"]]]
    assert (whole.status_code, whole.json()["code"]) == (422, "invalid_request")
    assert isinstance(whole.json()["error"], str)
    assert metadata["outputs"][-1]["name"] == "ood_p"


async def test_p_values_without_a_calibration(oracle: Application) -> None:
    """``ood_p`` is no output of a model without a calibration."""
    body = {"inputs": [texts("text", "a")], "outputs": [{"name": "ood_p"}]}

    assert (await oracle.post(INFER, body)).status_code == 422
