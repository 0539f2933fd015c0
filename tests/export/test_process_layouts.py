"""Process reward models are converted and served over HTTP with the step rewards of an independent reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from http_application import checkpoint_client
from process_models import (
    PROMPT,
    STEPS,
    qwen_rewards,
    qwen_text,
    skywork_rewards,
    write_math_shepherd,
    write_qwen_prm,
    write_skywork_prm,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.convert import convert
from service.checkpoints.reward_description import read_description


async def results(folder: Path, *items: dict[str, Any]) -> list[dict[str, Any]]:
    async with checkpoint_client(folder) as client:
        answer = await client.post("/v1/score", json={"items": list(items), "diagnostics": "none"})
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["results"]
        return found


def softmax(logits: list[list[float]]) -> list[float]:
    return torch.tensor(logits).softmax(1)[:, 1].tolist()


async def test_qwen_prm(tmp_path: Path) -> None:
    """Two labels at a marker: texts, marked completions and token ids, with steps or without, agree with the card."""
    source, out = write_qwen_prm(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    logits = qwen_rewards(source, out, STEPS)
    expected = softmax(logits)
    text = qwen_text(STEPS)

    found = await results(
        out,
        {"prompt": PROMPT, "steps": list(STEPS)},
        {"prompt": PROMPT, "completion": "".join(f"{step}<extra_0>" for step in STEPS), "steps": "marker"},
        {"prompt": PROMPT, "completion": "".join(f"{step}<extra_0>" for step in STEPS)},
        {"text": text},
        {"text": text, "steps": "marker"},
        {"token_ids": AutoTokenizer.from_pretrained(source)(text)["input_ids"], "steps": "marker"},
    )

    for result in found:
        assert result["step_rewards"] == pytest.approx(expected, abs=1e-4)
        assert result["reward"] == min(result["step_rewards"])
        for outputs, own in zip(result["step_outputs"], logits, strict=True):
            assert [outputs["negative"], outputs["positive"]] == pytest.approx(own, abs=1e-4)
    description = read_description(out)
    assert description is not None
    assert description.outputs == ("negative", "positive")
    assert max(expected) - min(expected) > 0.1


async def test_completions_are_compared_by_their_steps(tmp_path: Path) -> None:
    """``/v1/compare`` reads a process reward model at the markers; a completion without one is refused."""
    source, out = write_qwen_prm(tmp_path / "source"), tmp_path / "out"
    convert(source, out)
    parts = [STEPS[:1], STEPS[1:]]
    completions = ["".join(f"{step}<extra_0>" for step in steps) for steps in parts]

    async with checkpoint_client(out) as client:
        answer = await client.post("/v1/compare", json={"prompt": PROMPT, "completions": completions})
        unmarked = await client.post("/v1/compare", json={"prompt": PROMPT, "completions": [STEPS[0], completions[1]]})

    expected = [min(softmax(qwen_rewards(source, out, steps))) for steps in parts]
    assert answer.json()["rewards"] == pytest.approx(expected, abs=1e-4)
    assert unmarked.status_code == 422


async def test_an_item_without_a_marker_is_refused(tmp_path: Path) -> None:
    """A model that rewards steps gives no reward where it was not trained to: such items fail alone, on every route."""
    out = tmp_path / "out"
    convert(write_qwen_prm(tmp_path / "source"), out)
    marked = f"{STEPS[0]}<extra_0>"

    async with checkpoint_client(out) as client:
        items = [{"prompt": PROMPT, "completion": STEPS[0]}, {"prompt": PROMPT, "completion": marked}]
        native = (await client.post("/v1/score", json={"items": items})).json()["results"]
        foreign = await client.post("/rm", json={"prompt": PROMPT, "response": STEPS[0]})

    assert native[0]["error"]["code"] == "invalid_request"
    assert len(native[1]["step_rewards"]) == 1
    assert foreign.status_code == 422


async def test_skywork_prm(tmp_path: Path) -> None:
    """A value head at line breaks: each step is tokenized alone, as the authors' code does."""
    source, out = write_skywork_prm(tmp_path / "source"), tmp_path / "out"
    convert(source, out, process="Skywork-o1-PRM")
    steps = [step.replace("\n", " ") for step in STEPS]
    expected = skywork_rewards(source, out, steps)

    (result,) = await results(out, {"prompt": PROMPT, "steps": steps})

    assert result["step_rewards"] == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 3 * min(expected)


async def test_math_shepherd(tmp_path: Path) -> None:
    """Two logits of a language model at the marker's token, by transformers' own class on the whole text."""
    source, out = write_math_shepherd(tmp_path / "source"), tmp_path / "out"
    convert(source, out, process="Math-Shepherd")
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(f"{PROMPT} " + "".join(f"{step} \u043a\u0438\n" for step in STEPS))["input_ids"]
    marker = tokenizer("\u043a\u0438", add_special_tokens=False)["input_ids"][-1]
    labels = tokenizer("+ -", add_special_tokens=False)["input_ids"][-2:]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    expected = logits[:, labels].softmax(1)[[index for index, one in enumerate(ids) if one == marker], 0].tolist()

    (result,) = await results(out, {"prompt": PROMPT, "steps": list(STEPS)})

    assert result["step_rewards"] == pytest.approx(expected, abs=1e-4)
