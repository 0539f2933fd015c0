"""Each kind of reward model that is published is converted, served over HTTP, and compared with an independent forward.

The forward is transformers' body, one text at a time, and a head written in the tests. To add a layout, add a row to
`KINDS`: a function that writes a checkpoint and returns how it is converted and read.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import published_layouts
import published_objectives
import pytest
import torch
from http_servers import http_server
from quantized_checkpoints import FORMATS, quantize_checkpoint
from several_outputs import PAIRS, Reading
from tiny_models import EOS, write_tiny_checkpoint
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from export.convert import convert
from service.checkpoints.reward_description import MeanOfOutputs


@dataclass(frozen=True)
class Kind:
    """A kind of reward model: how its checkpoint becomes one that is served, and what its outputs are."""

    expected: Callable[[], list[list[float]]]
    """The outputs of `PAIRS` by an independent forward."""

    options: Mapping[str, Any] | None = field(default_factory=dict)
    """Of the conversion; None: the checkpoint is served as it is."""


def read_states(folder: Path, read: Reading, appended: tuple[int, ...] = ()) -> list[list[float]]:
    """What a reading gives for the states of each text that the chat template renders."""
    body, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    outputs = []
    for prompt, completion in PAIRS:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *appended]
        with torch.no_grad():
            outputs.append(read(body(torch.tensor([ids])).last_hidden_state[0], ids).reshape(-1).tolist())
    return outputs


def one_reward(write: Callable[[Path], published_layouts.Published]) -> Callable[[Path], Kind]:
    """The kind of a published layout with one reward."""

    def kind(folder: Path) -> Kind:
        published = write(folder)

        def read(states: torch.Tensor, _: list[int]) -> torch.Tensor:
            return published.read(states[-1])

        return Kind(lambda: read_states(folder.with_name("plain"), read, published.appended))

    return kind


def several_outputs(write: Callable[[Path], published_objectives.Published]) -> Callable[[Path], Kind]:
    """The kind of a published layout with several outputs."""

    def kind(folder: Path) -> Kind:
        published = write(folder)
        return Kind(lambda: read_states(folder.with_name("plain"), published.read), published.options)

    return kind


def plain_scalar(folder: Path) -> Kind:
    """A classifier of transformers with one label."""
    write_tiny_checkpoint(folder)
    return Kind(lambda: classified(folder), None)


def encoder(family: str) -> Callable[[Path], Kind]:
    """An encoder that reads a pair of texts, with token types (BERT) or without (OpenAssistant's DeBERTa)."""

    def kind(folder: Path) -> Kind:
        write_tiny_checkpoint(folder, family)
        return Kind(lambda: classified_texts(folder, list(PAIRS)), None)

    return kind


def tokenizer_adds_end(folder: Path) -> Kind:
    """No chat template renders the text, and the tokenizer's own call adds BOS and EOS, as in training."""
    write_tiny_checkpoint(folder)
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / "tokenizer.json").read_bytes())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    processor = content["post_processor"]
    processor["single"].append({"SpecialToken": {"id": EOS, "type_id": 0}})
    processor["special_tokens"][EOS] = {"id": EOS, "ids": [ids[EOS]], "tokens": [EOS]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Kind(lambda: classified_texts(folder, [(prompt + completion,) for prompt, completion in PAIRS]), None)


@torch.no_grad()
def classified_texts(folder: Path, texts: Sequence[tuple[str, ...]]) -> list[list[float]]:
    """The logits of transformers' own classifier on what the tokenizer's own call gives."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = inspect.signature(model.forward).parameters
    outputs = []
    for text in texts:
        inputs = tokenizer(*text, return_tensors="pt", return_token_type_ids=True)
        outputs.append(model(**{name: tensor for name, tensor in inputs.items() if name in read}).logits[0].tolist())
    return outputs


@torch.no_grad()
def classified(folder: Path) -> list[list[float]]:
    """The logits of transformers' own classifier."""
    head = AutoModelForSequenceClassification.from_pretrained(folder).score
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    return read_states(
        folder, lambda states, ids: head(states[max(place for place, token in enumerate(ids) if token != pad)])
    )


def quantized(folder: Path) -> Kind:
    """A classifier whose matrices are stored in fp8 blocks."""
    plain = write_tiny_checkpoint(folder.with_name("plain"))
    write_tiny_checkpoint(folder)
    quantize_checkpoint(folder, FORMATS["fine-grained fp8"], plain)
    return Kind(lambda: classified(plain), None)


def mixture(folder: Path) -> Kind:
    """A classifier with experts."""
    write_tiny_checkpoint(folder, "qwen3_moe")
    return Kind(lambda: classified(folder), None)


def hybrid(folder: Path) -> Kind:
    """A classifier with layers of linear attention, on the padded path."""
    write_tiny_checkpoint(folder, "qwen3_5_text")
    return Kind(lambda: classified(folder), None)


def ensemble(folder: Path) -> Kind:
    """Two heads on one body."""
    first = write_tiny_checkpoint(folder)
    second = folder.with_name("second")
    model = AutoModelForSequenceClassification.from_pretrained(first)
    model.score.weight.data = model.score.weight.data.flip(1)
    model.save_pretrained(second)
    AutoTokenizer.from_pretrained(first).save_pretrained(second)

    def expected() -> list[list[float]]:
        members = zip(classified(first), classified(second), strict=True)
        return [[*one, *other] for one, other in members]

    return Kind(expected, {"members": (second,), "combine": MeanOfOutputs()})


KINDS: dict[str, Callable[[Path], Kind]] = {
    "plain scalar": plain_scalar,
    "encoder": encoder("deberta-v2"),
    "encoder with token types": encoder("bert"),
    "tokenizer adds an end": tokenizer_adds_end,
    **{write.__name__: one_reward(write) for write in published_layouts.PUBLISHED},
    **{write.__name__: several_outputs(write) for write in published_objectives.PUBLISHED},
    "ensemble": ensemble,
    "quantized": quantized,
    "mixture": mixture,
    "hybrid": hybrid,
}


def outputs_of(url: str, pairs: list[tuple[str, str]]) -> list[list[float]]:
    """The outputs that one request gets for the pairs: the named ones, else the reward alone."""
    items = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    answer = httpx2.post(f"{url}/v1/score", json={"items": items}, timeout=60)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    return [list(result.get("rewards", {}).values()) or [result["reward"]] for result in results]


def converted(folder: Path, kind: Kind) -> Path:
    if kind.options is None:
        return folder
    convert(folder, folder.with_name("out"), **kind.options)
    return folder.with_name("out")


@pytest.mark.parametrize("name", KINDS)
def test_a_published_kind_is_served_over_http(name: str, tmp_path: Path) -> None:
    """Outputs are those of an independent forward, in order, and alone or shuffled they move by rounding alone."""
    kind = KINDS[name](tmp_path / "source")
    expected = kind.expected()
    shuffled = random.Random(1).sample(range(len(PAIRS)), len(PAIRS))

    with http_server(converted(tmp_path / "source", kind)) as url:
        together = outputs_of(url, PAIRS)
        alone = [outputs_of(url, [pair])[0] for pair in PAIRS]
        in_other_order = outputs_of(url, [PAIRS[index] for index in shuffled])

    assert together == [pytest.approx(outputs, abs=1e-4) for outputs in expected]
    assert alone == [pytest.approx(outputs, abs=1e-5) for outputs in together]
    assert in_other_order == [pytest.approx(together[index], abs=1e-5) for index in shuffled]
    assert torch.tensor(expected).std(dim=0).min() > 0.02


@pytest.mark.parametrize("forward", ["packed", "padded"])
def test_a_deeper_head_gives_the_same_bits_in_any_batch(forward: str, tmp_path: Path) -> None:
    """In bfloat16 a described head of two layers gives a text the same bits alone, with others and in another order."""
    published_layouts.grm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")

    with http_server(tmp_path / "out", forward=forward, dtype="bfloat16", kernels="off") as url:
        alone = [outputs_of(url, [pair])[0] for pair in PAIRS]
        together = outputs_of(url, PAIRS)
        backwards = outputs_of(url, PAIRS[::-1])[::-1]

    assert together == alone
    assert backwards == alone
