"""The adapters: what each framework calls, what is sent, what it gets, and that failures are exceptions."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from misbehaving_server import VERSION, FakeServer, Request, ok, problem, running
from ray import cloudpickle
from reward_client import AsyncRewardClient, RetryPolicy, RewardClient
from reward_client.adapters import openrlhf, query_rewards, verl
from reward_client.adapters.callables import ItemRewardFunction, RewardFunction
from reward_client.adapters.ms_swift import AsyncRemoteORM, RemoteORM
from reward_client.adapters.nemo_rl import MessageLogReward
from reward_client.adapters.options import read_options
from reward_client.adapters.trl import AsyncRemoteReward, RemoteReward, RemoteRewards
from reward_client.errors import InvalidArgument, ItemsFailed, RequestRejected, RewardMissing, ServiceUnavailable

USED_ASYNC: list[AsyncRewardClient] = []
ONCE = RetryPolicy(max_attempts=1)
QUESTION = [{"role": "user", "content": "q"}]


class Service(FakeServer):
    """The reward of an item is the number at the end of its text; an item that ends in "bad" has none."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        results = [self._result(index, item) for index, item in enumerate(request.body["items"])]
        yield ok({"model": {"name": "m", "version": VERSION}, "results": results})

    def _result(self, index: int, item: Mapping[str, Any]) -> dict[str, Any]:
        text = item.get("completion") or item["text"]
        if text.endswith("bad"):
            return {"index": index, "error": {"code": "sequence_too_long", "detail": "too long"}}
        # The p-value of the item with the reward 2 is unknown.
        ood = {"p_value": None if text.endswith("2") else 0.25, "flag": False}
        length = {"scored_tokens": 7, "completion_tokens": 3, "truncated": index == 1}
        return {"index": index, "reward": float(text.split()[-1]), "length": length, "ood": ood}


class TwoOutputs(FakeServer):
    """The outputs of an item are the two numbers at the end of its text; there is no weighted sum."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        rows = [item["completion"].split()[-2:] for item in request.body["items"]]
        results = [
            {"index": index, "rewards": {"help": float(first), "brief": float(second)}}
            for index, (first, second) in enumerate(rows)
        ]
        yield ok({"model": {"name": "m", "version": VERSION}, "results": results})


class Broken(FakeServer):
    """Answers 503 to everything."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("503 Service Unavailable", "not_ready")


@pytest.fixture
def server() -> Iterator[Service]:
    with running(Service()) as running_server:
        yield running_server


@pytest.fixture
def broken() -> Iterator[Broken]:
    with running(Broken()) as running_server:
        yield running_server


@pytest.fixture
def in_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets REMOTE_REWARD_ variables; the clients of earlier values are forgotten."""

    def set_variables(**values: str) -> None:
        query_rewards._client.cache_clear()
        for name, value in values.items():
            monkeypatch.setenv("REMOTE_REWARD_" + name, value)

    yield set_variables
    query_rewards._client.cache_clear()


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a synchronous or asynchronous function."""
    result = function(*args, **options)
    return run(result) if inspect.iscoroutine(result) else result


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a loop of its own and close the connections that belong to it."""

    async def run_and_close() -> Any:
        try:
            return await coroutine
        finally:
            for client in USED_ASYNC:
                await client.aclose()

    return asyncio.run(run_and_close())


@pytest.fixture(autouse=True)
def _connections_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record the clients that the adapters own and use, and close their connections."""
    USED_ASYNC.clear()
    used: list[RewardClient] = []
    run_call, open_pool = RewardClient._run, AsyncRewardClient._pool

    def recorded_run(self: RewardClient, call: Any) -> Any:
        used.append(self)
        return run_call(self, call)

    def recorded_pool(self: AsyncRewardClient) -> Any:
        USED_ASYNC.append(self)
        return open_pool(self)

    monkeypatch.setattr(RewardClient, "_run", recorded_run)
    monkeypatch.setattr(AsyncRewardClient, "_pool", recorded_pool)
    yield
    for client in used:
        client.close()


def copy_of(value: Any) -> Any:
    """A value after a round trip through pickle."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - our own bytes


# Each adapter as a function of one prompt and its completions.
def _trl(url: str, **options: Any) -> Callable[[list[str]], Any]:
    return lambda texts: RemoteReward(url, **options)(prompts=["q"] * len(texts), completions=texts)


def _trl_async(url: str, **options: Any) -> Callable[[list[str]], Any]:
    return lambda texts: call(AsyncRemoteReward(url, **options), prompts=["q"] * len(texts), completions=texts)


def _verl(url: str, **options: Any) -> Callable[[list[str]], Any]:
    def scores(texts: list[str]) -> list[float]:
        extra_info = {"prompt": QUESTION}
        return [
            call(verl.compute_score, solution_str=text, extra_info=extra_info, url=url, **options)["score"]
            for text in texts
        ]

    return scores


def _verl_manager(url: str, **options: Any) -> Callable[[list[str]], Any]:
    def scores(texts: list[str]) -> list[float]:
        manager = verl.RemoteRewardManager(verl_config(url=url, **options), Characters())
        return [call(manager.run_single, [verl_sample(text)])["reward_score"] for text in texts]

    return scores


def _ms_swift(kind: Any) -> Callable[..., Callable[[list[str]], Any]]:
    def adapter(url: str, **options: Any) -> Callable[[list[str]], Any]:
        def scores(texts: list[str]) -> Any:
            messages = [[*QUESTION, {"role": "assistant", "content": text}] for text in texts]
            return call(partial(kind, url=url, **options)(args=None), texts, messages=messages, solution=texts)

        return scores

    return adapter


def _generic(url: str, **options: Any) -> Callable[[list[str]], Any]:
    return lambda texts: RewardFunction(url, **options)(["q"] * len(texts), texts)


def _areal(url: str, **options: Any) -> Callable[[list[str]], Any]:
    function = ItemRewardFunction(url, **options)
    return lambda texts: [function("q", text, [1], [2], task="t") for text in texts]


def _nemo_rl(url: str, **options: Any) -> Callable[[list[str]], Any]:
    function = MessageLogReward(url, **options)
    return lambda texts: function([[*QUESTION, {"role": "assistant", "content": text}] for text in texts]).rewards


ADAPTERS = {
    "trl": _trl,
    "trl-async": _trl_async,
    "verl": _verl,
    "verl-manager": _verl_manager,
    "ms-swift": _ms_swift(RemoteORM),
    "ms-swift-async": _ms_swift(AsyncRemoteORM),
    "generic": _generic,
    "areal": _areal,
    "nemo-rl": _nemo_rl,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_returns_the_rewards_in_order(server: Service, name: str) -> None:
    """What the framework gets is the reward of the service for each completion."""
    assert ADAPTERS[name](server.url)(["answer 3", "answer -1.5"]) == [3.0, -1.5]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_item_without_a_reward_is_an_exception(server: Service, name: str) -> None:
    """One failed item fails the call: there is no 0 and no None in its place."""
    with pytest.raises(ItemsFailed):
        ADAPTERS[name](server.url)(["answer 3", "bad"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_service_that_does_not_answer_is_an_exception(broken: Broken, name: str) -> None:
    """When all attempts have failed, the caller gets the client's exception."""
    with pytest.raises(ServiceUnavailable):
        ADAPTERS[name](broken.url, retries=ONCE)(["answer 3"])


def test_trl_gets_a_function_for_each_output() -> None:
    """Each function returns its own output under its name, and the functions of a batch share one request."""
    with running(TwoOutputs()) as server:
        rewards = RemoteRewards(server.url, ["brief", "help"], diagnostics="none")
        batch: dict[str, Any] = {"prompts": ["q", "q"], "completions": ["a 1 2", "b 3 -4"], "trainer_state": None}

        assert [function(**batch) for function in rewards.functions] == [[2.0, -4.0], [1.0, 3.0]]
        assert [function.__name__ for function in rewards.functions] == ["brief", "help"]
        assert len(server.requests) == 1
        other = batch | {"completions": ["a 1 2", "b 5 6"]}
        assert [function(**other) for function in rewards.functions] == [[2.0, 6.0], [1.0, 5.0]]
        assert len(server.requests) == 2
        with pytest.raises(InvalidArgument, match="its outputs are help, brief"):
            RemoteRewards(server.url, ["other"], diagnostics="none").functions[0](**batch)
        with pytest.raises(RewardMissing):
            RemoteReward(server.url, diagnostics="none")(prompts=["q"], completions=["a 1 2"])


def test_nemo_rl_gets_a_row_of_outputs() -> None:
    """With outputs the rewards of a log are a row in their order, each multiplied by its weight."""
    logs = [[*QUESTION, {"role": "assistant", "content": text}] for text in ("a 1 2", "b 3 -4")]
    with running(TwoOutputs()) as server:
        assert MessageLogReward(server.url, outputs=["brief", "help"])(logs).rewards == [[2.0, 1.0], [-4.0, 3.0]]
        weighted = MessageLogReward(server.url, outputs={"help": 0.5, "brief": 10})
        assert torch.tensor(weighted(logs).rewards).shape == (2, 2)
        assert weighted(logs).rewards == [[0.5, 20.0], [1.5, -40.0]]
        with pytest.raises(InvalidArgument, match="no output other"):
            MessageLogReward(server.url, outputs=["other"])(logs)


def test_reward_functions_are_pickled_without_connections(server: Service) -> None:
    """A function that was used can be pickled, and its copy scores as well."""
    exchange = {"prompts": ["q"], "completions": ["answer 3"]}
    messages = [[*QUESTION, {"role": "assistant", "content": "answer 3"}]]
    for function, arguments in (
        (RemoteReward(server.url, name="critic"), exchange),
        (AsyncRemoteReward(server.url), exchange),
        (RewardFunction(server.url), exchange),
        (RemoteORM(url=server.url), {"completions": ["answer 3"], "messages": messages}),
        (AsyncRemoteORM(url=server.url), {"completions": ["answer 3"], "messages": messages}),
        (partial(verl.compute_score, url=server.url), {"solution_str": "answer 3", "extra_info": {"prompt": "q"}}),
    ):
        first = call(function, **arguments)
        assert call(copy_of(function), **arguments) == first

    [reward] = copy_of(MessageLogReward(server.url))(messages).rewards
    assert reward == copy_of(ItemRewardFunction(server.url))("q", "answer 3") == 3.0


def test_copies_in_a_process_share_a_client(server: Service) -> None:
    """AReaL pickles the function with every call; a thread and a connection per call would never be closed."""
    function = ItemRewardFunction(server.url, deadline_s=10)
    bytes_of_call = pickle.dumps(function)

    first, second = (pickle.loads(bytes_of_call) for _ in range(2))  # noqa: S301 - our own bytes

    assert first("q", "answer 3") == second("q", "answer 3") == 3.0
    assert first is second
    assert copy_of(ItemRewardFunction(server.url, deadline_s=11)) is not first


def test_they_import_neither_torch_nor_ray() -> None:
    """In an environment without torch, ray, numpy and the frameworks, every module of the package is imported."""
    program = """
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder
class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        blocked = {"torch", "ray", "numpy", "transformers", "trl", "verl", "openrlhf", "swift", "nemo_rl", "pydantic"}
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import reward_client.adapters as adapters
names = [module.name for module in pkgutil.iter_modules(adapters.__path__)]
for name in names:
    importlib.import_module("reward_client.adapters." + name)
print(len(names))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) >= 6


# TRL


def test_trl_gets_the_diagnostics_as_metrics_and_columns(server: Service) -> None:
    """Columns have one value per completion, None where unknown; metrics are means over the known values."""
    metrics: dict[str, float] = {}
    columns: dict[str, list[Any]] = {}

    RemoteReward(server.url)(
        prompts=[QUESTION] * 2,
        completions=[[{"role": "assistant", "content": f"answer {number}"}] for number in (1, 2)],
        completion_ids=[[1], [2]],
        trainer_state=object(),
        log_metric=metrics.__setitem__,
        log_extra=columns.__setitem__,
    )

    assert columns["rm_ood_p"] == [0.25, None]
    assert columns["rm_truncated"] == [0.0, 1.0]
    assert columns["rm_reward_percentile"] == [None, None]
    assert metrics["reward_model/ood_p"] == 0.25
    assert metrics["reward_model/truncated"] == 0.5
    assert "reward_model/reward_percentile" not in metrics
    assert server.requests[0].body["diagnostics"] == "full"


def test_trl_asks_for_no_diagnostics_where_none_are_wanted(server: Service) -> None:
    """With ``diagnostics="none"`` nothing is logged, and the options of a call are sent."""
    logged: dict[str, Any] = {}
    function = RemoteReward(server.url, diagnostics="none", template="concat", truncation="prompt_left", name="critic")

    function(prompts=["q"], completions=["answer 1"], log_metric=logged.__setitem__, log_extra=logged.__setitem__)

    assert not logged
    sent = server.requests[0].body
    assert (sent["diagnostics"], sent["template"], sent["truncation"]) == ("none", "concat", "prompt_left")
    assert function.__name__ == "critic"
    with pytest.raises(InvalidArgument, match="diagnostics must be one of"):
        RemoteReward(server.url, diagnostics="all")  # type: ignore[arg-type]


# verl


class Characters:
    """A tokenizer whose ids are characters; 0 is a special token."""

    def decode(self, ids: Any, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(number) for number in ids.tolist() if number)


def verl_config(**reward_kwargs: Any) -> Any:
    return SimpleNamespace(reward={"reward_kwargs": reward_kwargs})


def verl_sample(completion: str, *, padding: int = 3) -> Any:
    """A sample of verl: a response that ends in a special token and is padded, after a prompt of two tokens."""
    ids = [ord(character) for character in completion] + [0]
    return SimpleNamespace(
        batch={
            "responses": torch.tensor(ids + [99] * padding),
            "attention_mask": torch.tensor([1, 1] + [1] * len(ids) + [0] * padding),
        },
        non_tensor_batch={"raw_prompt": QUESTION},
    )


def test_verl_gets_the_same_numeric_keys_for_every_sample(server: Service) -> None:
    """An unknown diagnostic is NaN under its key, because verl reads the keys of the first sample in all."""
    extras = ["scored_tokens", "ood_p"]

    answers = [
        run(
            verl.compute_score(
                solution_str=text, extra_info={"q": "text"}, prompt_key="q", url=server.url, extras=extras
            )
        )
        for text in ("answer 1", "answer 2")
    ]

    assert answers[0] == {"score": 1.0, "rm_scored_tokens": 7.0, "rm_ood_p": 0.25}
    assert answers[1].keys() == answers[0].keys()
    assert math.isnan(answers[1]["rm_ood_p"])


def test_verl_takes_the_function_for_an_asynchronous_one() -> None:
    """The framework asks ``inspect.iscoroutinefunction``, which only a plain coroutine function satisfies."""
    assert inspect.iscoroutinefunction(verl.compute_score)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_info": {}}, "extra_info has no 'prompt'"),
        ({"extra_info": {"prompt": "q"}, "url": None}, "reward_kwargs.url"),
        ({"extra_info": {"prompt": "q"}, "deadline": 3}, "deadline is unknown"),
        ({"extra_info": {"prompt": "q"}, "extras": ["ood"]}, "ood_p"),
        ({"extra_info": {"prompt": "q"}, "reward_router_address": "127.0.0.1:1"}, "enable=False"),
    ],
)
def test_verl_is_told_what_is_missing(arguments: dict[str, Any], message: str) -> None:
    """What cannot be scored is refused with the setting to change, before anything is sent."""
    with pytest.raises(InvalidArgument, match=message):
        run(verl.compute_score(solution_str="answer", **{"url": "http://127.0.0.1:1", **arguments}))


def test_verls_manager_decodes_the_response_and_places_the_reward(server: Service) -> None:
    """Padding and special tokens are not sent, and the reward stands at the last token of the response."""
    manager = verl.RemoteRewardManager(verl_config(url=server.url), Characters())

    scored = run(manager.run_single([verl_sample("other 9"), verl_sample("answer 4")]))

    assert scored == {"reward_score": 4.0, "reward_extra_info": {"rm_scored_tokens": 7.0, "rm_truncated": 0.0}}
    assert server.requests[0].body["items"] == [{"prompt": QUESTION, "completion": "answer 4"}]

    batch = {
        "prompts": torch.zeros(2, 2, dtype=torch.long),
        "responses": torch.tensor([[5, 6, 7], [5, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]),
    }
    placed = verl.RemoteRewardManager.assemble_rm_scores(SimpleNamespace(batch=batch), [0.1, -2.0])
    assert placed.dtype == torch.float32
    assert torch.equal(placed, torch.tensor([[0, 0, 0.1], [-2.0, 0, 0]]))


# OpenRLHF


def test_openrlhfs_function_scores_whole_texts(server: Service, in_environment: Callable[..., None]) -> None:
    """Queries are not rendered again, and are split where their completion begins if that is known."""
    in_environment(URL=server.url, EXTRAS="scored_tokens, ood_p", TRUNCATION="prompt_left")

    answer = openrlhf.reward_func(["<u>q<a>answer 1", "cut<a>answer 2"], ["<u>q<a>", "not cut<a>"], [None, None])

    assert answer["rewards"] == answer["scores"] == [1.0, 2.0]
    assert answer["extra_logs"]["rm_scored_tokens"] == [7.0, 7.0]
    assert answer["extra_logs"]["rm_ood_p"][0] == 0.25
    for values in (answer["rewards"], *answer["extra_logs"].values()):
        torch.tensor([values])  # as OpenRLHF does
    sent = server.requests[0].body
    assert sent["items"] == [{"prompt": "<u>q<a>", "completion": "answer 1"}, {"text": "cut<a>answer 2"}]
    assert (sent["template"], sent["truncation"]) == ("concat", "prompt_left")


def test_openrlhfs_function_can_be_loaded_by_its_path_and_pickled(
    server: Service, in_environment: Callable[..., None]
) -> None:
    """OpenRLHF loads the file by its path; Ray then pickles the function by value."""
    in_environment(URL=server.url)
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(['answer 5'], ['p'], [None])['rewards'])"

    finished = subprocess.run(
        [sys.executable, "-c", program], input=cloudpickle.dumps(module.reward_func), capture_output=True, check=False
    )

    assert json.loads(finished.stdout or "null") == [5.0], finished.stderr.decode()


def test_openrlhfs_function_logs_its_reason_and_raises(
    broken: Broken, in_environment: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """OpenRLHF hides exceptions, so the reason is logged too, without any text."""
    in_environment(URL=broken.url, DEADLINE_S="0.2")

    with caplog.at_level("ERROR", logger="reward_client"), pytest.raises(Exception, match="not_ready"):
        openrlhf.reward_func(["secret"], None, None)

    assert "No rewards for 1 queries" in caplog.text
    assert "secret" not in caplog.text


# ms-swift, NeMo-RL, options


def test_ms_swifts_prompt_is_the_conversation_before_the_completion(
    server: Service, in_environment: Callable[..., None]
) -> None:
    """The last message is the completion; the options come from the environment where they are not given."""
    in_environment(URL=server.url)
    conversation = [{"role": "system", "content": "s"}, *QUESTION, {"role": "assistant", "content": "answer 2"}]

    assert RemoteORM(args=object())(["answer 2"], messages=[conversation], solution=["x"]) == [2.0]

    assert server.requests[0].body["items"] == [{"prompt": conversation[:-1], "completion": "answer 2"}]
    with pytest.raises(InvalidArgument, match="no messages"):
        RemoteORM()(["answer 2"])


def test_nemo_rls_log_is_scored_as_messages_or_as_a_templated_text(server: Service) -> None:
    """Tensors in messages are not sent, and templated contents are joined."""
    log = [
        {"role": "user", "content": "<u>q<a>", "token_ids": torch.tensor([1])},
        {"role": "assistant", "content": "answer 3", "token_ids": torch.tensor([2])},
    ]

    step = MessageLogReward(server.url, content="templated")([log], [{"id": 1}])
    MessageLogReward(server.url)([log])

    assert (step.rewards, step.terminateds, step.metadata, step.answers) == ([3.0], [True], [{"id": 1}], ["answer 3"])
    templated, messages = (request.body for request in server.requests)
    assert templated["items"] == [{"prompt": "<u>q<a>", "completion": "answer 3"}]
    assert templated["template"] == "concat"
    assert messages["items"][0]["prompt"] == [{"role": "user", "content": "<u>q<a>"}]
    with pytest.raises(InvalidArgument, match="must end with a message of the assistant"):
        MessageLogReward(server.url)([log[:1]])


def test_options_of_the_environment_are_checked() -> None:
    """Given options beat the environment; what is unknown or malformed is refused without its value."""
    environ = {
        "REMOTE_REWARD_URL": "http://127.0.0.1:1",
        "REMOTE_REWARD_DEADLINE_S": "9",
        "REMOTE_REWARD_HEADERS": '{"X-Run-Id": "r"}',
    }
    read = read_options({"deadline_s": 5.0}, "url", environ)
    assert read.url == "http://127.0.0.1:1"
    assert read.client == {"deadline_s": 5.0, "headers": {"X-Run-Id": "r"}}
    with pytest.raises(InvalidArgument, match="REMOTE_REWARD_TIMEOUT is unknown"):
        read_options({}, "url", {"REMOTE_REWARD_TIMEOUT": "9"})
    with pytest.raises(InvalidArgument, match="REMOTE_REWARD_HEADERS cannot be parsed") as raised:
        read_options({}, "url", {"REMOTE_REWARD_HEADERS": "token-9"})
    assert "token-9" not in str(raised.value)


def test_a_refusal_reaches_the_trainer(server: Service) -> None:
    """A 4xx is raised at once, as an exception that can be pickled."""

    class Refusing(FakeServer):
        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield problem("422 Unprocessable Content", "invalid_request")

    with running(Refusing()) as refusing, pytest.raises(RequestRejected) as raised:
        RemoteReward(refusing.url)(prompts=["q"], completions=["answer 1"])
    assert copy_of(raised.value).status == 422
