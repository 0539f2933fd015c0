"""The clients of LLaMA-Factory, AReaL, slime, miles and Triton end with the rewards of ``/v1/score``."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import framework_code
import pytest
import requests
import torch
from reward_client import RewardClient
from reward_client.adapters.callables import ItemRewardFunction
from reward_client.errors import ServiceUnavailable
from serving import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUESTION = "How do I boil an egg?"
COMPLETIONS = ["Put it into boiling water.", "No.", "Seven minutes, then cool it."]

TRITON = (
    "tritonclient==2.73.0",
    "geventhttpclient==2.6.1",
    "gevent==26.9.0",
    "greenlet==3.5.6",
    "zope.event==6.2",
    "zope.interface==8.7",
    "brotli==1.2.1",
    "certifi",
    "python-rapidjson==1.25",
    "urllib3",
)
TRITON_PROGRAM = """
import json, sys
import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

address, model, texts, prompts, completions, ids, compression = json.load(sys.stdin)
client = triton.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
assert client.get_model_metadata(model)["name"] == model

def strings(name, values):
    tensor = triton.InferInput(name, [len(values), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[value.encode()] for value in values], dtype=object))
    return tensor

def rewards(*inputs, outputs=None):
    result = client.infer(
        model, list(inputs), outputs=outputs, request_compression_algorithm=compression
    )
    return result.as_numpy("rewards").reshape(-1).tolist()

length = max(map(len, ids))
tokens = triton.InferInput("tokens", [len(ids), length], "INT64")
tokens.set_data_from_numpy(np.array([row + [0] * (length - len(row)) for row in ids], dtype=np.int64))
lengths = triton.InferInput("sequence_lengths", [len(ids), 1], "INT64")
lengths.set_data_from_numpy(np.array([[len(row)] for row in ids], dtype=np.int64))
print(json.dumps({
    "sentences": rewards(strings("sentences", texts)),
    "named": rewards(strings("text", texts), outputs=[triton.InferRequestedOutput("rewards", binary_data=False)]),
    "exchanges": rewards(strings("prompt", prompts), strings("completion", completions)),
    "tokens": rewards(tokens, lengths),
}))
try:
    client.infer(model, [strings("sentences", ["egg " * 12_000])])
except InferenceServerException as error:
    print(error.status(), error.message(), file=sys.stderr)
else:
    raise AssertionError("a text over the limit got an answer")
"""


@pytest.fixture
def texts(tokenizer: Any) -> list[str]:
    """Whole texts in the template of the model, BOS included."""
    return [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": completion}], tokenize=False
            )
        )
        for completion in COMPLETIONS
    ]


@pytest.fixture
def expected(client: RewardClient) -> list[float]:
    """The rewards of the exchanges."""
    return client.score([QUESTION] * len(COMPLETIONS), COMPLETIONS)


def test_llamafactory(server: RunningServer, texts: list[str], expected: list[float], same: Any) -> None:
    """Its function returns one float per text."""
    rewards = _llamafactory()(f"{server.url}/v1/score/evaluation", texts)

    assert rewards.shape == (len(texts),)
    assert rewards.tolist() == same(expected)


def test_llamafactory_gets_no_number_for_what_cannot_be_scored(server: RunningServer, texts: list[str]) -> None:
    """One text over the limit fails the batch; its function then misses the scores."""
    with pytest.raises(KeyError, match="scores"):
        _llamafactory()(f"{server.url}/v1/score/evaluation", [*texts, "egg " * 12_000])


def _llamafactory() -> Any:
    wheel = framework_code.wheel("llamafactory==0.9.5")
    name = "get_rewards_from_server"
    namespace = {"requests": requests, "json": json, "torch": torch}
    return framework_code.definitions(wheel, "ppo/ppo_utils.py", {name}, namespace)[name]


def test_areal(server: RunningServer, expected: list[float], tokenizer: Any, same: Any) -> None:
    """Its wrapper sends the function to a process with every call; the prompt is in the template already."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    function = ItemRewardFunction(server.url, template="concat", deadline_s=12)

    assert _areal_rewards(function, prompt) == same(expected)


def test_areal_gets_an_exception_in_time() -> None:
    """A deadline below AReaL's own turns a missing service into an exception before AReaL makes it a 0."""
    with pytest.raises(ServiceUnavailable):
        _areal_rewards(ItemRewardFunction("http://127.0.0.1:9", deadline_s=12, wait_for_start_s=0), "q")


def _areal_rewards(function: Any, prompt: str) -> list[float]:
    name = "AsyncRewardWrapper"
    namespace: dict[str, Any] = {
        "asyncio": asyncio,
        "atexit": atexit,
        "os": os,
        "partial": partial,
        "threading": threading,
        "logger": logging.getLogger("areal"),
        "BrokenProcessPool": BrokenProcessPool,
        # Started anew instead of forked: this process has threads.
        "ProcessPoolExecutor": partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn")),
    }
    wheel = framework_code.wheel("areal==1.0.4")
    wrapper_class = framework_code.definitions(wheel, "api/reward_api.py", {name}, namespace)[name]
    wrapper = wrapper_class(function, max_workers=1)

    async def rewards() -> list[float]:
        await asyncio.get_running_loop().run_in_executor(wrapper._executors[1], abs, 1)  # the process has started
        return [
            await wrapper(prompt, f"{text}<|im_end|>\n", [1], [2], answer="column of the data set")
            for text in COMPLETIONS
        ]

    try:
        return asyncio.run(rewards())
    finally:
        wrapper_class._atexit_shutdown_all()


def test_slime(server: RunningServer, texts: list[str], expected: list[float], tokenizer: Any, same: Any) -> None:
    """Prompts as texts, conversations and templated texts have the same reward, bare or in an object."""
    slime = _slime()
    conversation = [{"role": "user", "content": QUESTION}]
    templated = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    async def rewards(prompt: Any, url: str) -> list[Any]:
        end = "<|im_end|>\n" if prompt is templated else ""
        samples = [SimpleNamespace(prompt=prompt, label=None, response=completion + end) for completion in COMPLETIONS]
        return await asyncio.gather(*(slime["remote_rm"](SimpleNamespace(rm_url=url), sample) for sample in samples))

    async def all_rewards() -> list[list[Any]]:
        try:
            bare = [await rewards(prompt, f"{server.url}/rm") for prompt in (QUESTION, conversation, templated)]
            objects = await rewards(QUESTION, f"{server.url}/rm?format=dict")
        finally:
            await slime["_get_shared_session"]().close()
        return [*bare, [answer["reward"] for answer in objects]]

    for found in asyncio.run(all_rewards()):
        assert found == same(expected)


def test_miles(server: RunningServer, expected: list[float], same: Any) -> None:
    """Its function opens a session for each sample, tries once, and returns the bare reward."""
    remote_rm = _checkout("miles", {"remote_rm"}, {"aiohttp": aiohttp})["remote_rm"]
    samples = [SimpleNamespace(prompt=QUESTION, label=None, response=completion) for completion in COMPLETIONS]

    async def rewards() -> list[float]:
        address = SimpleNamespace(rm_url=f"{server.url}/rm")
        return list(await asyncio.gather(*(remote_rm(address, sample) for sample in samples)))

    assert asyncio.run(rewards()) == same(expected)


def _slime() -> dict[str, Any]:
    modules = {"asyncio": asyncio, "aiohttp": aiohttp, "random": random, "logger": logging.getLogger("slime")}
    return _checkout("slime", {"_get_shared_session", "remote_rm"}, {**modules, "_shared_session": None})


def _checkout(project: str, names: set[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Functions of a checkout of slime or miles, which are not on the package index."""
    variable = f"{project.upper()}_CHECKOUT"
    checkout = os.environ.get(variable)
    if not checkout:
        pytest.skip(f"{project} is not on the package index: set {variable} to a checkout of it")
    code = (Path(checkout) / project / "rollout/rm_hub/__init__.py").read_text(encoding="utf-8")
    return framework_code.run_definitions(code, names, namespace)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_tritonclient(
    compression: str | None,
    server: RunningServer,
    texts: list[str],
    expected: list[float],
    client: RewardClient,
    tokenizer: Any,
    same: Any,
) -> None:
    """Texts, exchanges and token ids in binary tensors have the same reward; what cannot be scored has a reason."""
    folder = framework_code.installed("tritonclient", *TRITON)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [QUESTION] * len(COMPLETIONS)
    given = [urlsplit(server.url).netloc, client.model().name, texts, prompts, COMPLETIONS, ids, compression]

    finished = subprocess.run(
        [sys.executable, "-c", TRITON_PROGRAM],
        input=json.dumps(given),
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert finished.returncode == 0, finished.stderr
    rewards = json.loads(finished.stdout)
    assert rewards.keys() == {"sentences", "named", "exchanges", "tokens"}
    for form, found in rewards.items():
        assert found == same(expected), form
    assert "tokens" in finished.stderr.splitlines()[-1]
