"""Published layouts whose heads give several numbers are converted and served with those of an independent reading.

The reading is transformers' body, loaded from the same weights, and the head written out here. Where a layout was read
stands beside its function; all weights are random.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_objectives import PUBLISHED, Published, armo_rm, urm
from safetensors.torch import load_file, save_file
from several_outputs import PAIRS, expected_outputs, scores_of, served
from tiny_layouts import HIDDEN_SIZE, random, store
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.conversion_command import main
from export.convert import convert
from service.checkpoints.checkpoint import model_version, open_checkpoint
from service.checkpoints.reward_description import LowerBound, MeanOfOutputs, MinOfOutputs
from service.errors import CheckpointError
from service.settings import ModelSettings


@pytest.mark.parametrize("write", PUBLISHED)
def test_a_layout_with_several_outputs_is_served_with_them(write: Callable[[Path], Published], tmp_path: Path) -> None:
    """Every output is that of the reading, on the packed path with shared prefixes, and the layout is named."""
    published = write(tmp_path / "source")

    conversion = convert(tmp_path / "source", tmp_path / "out", **published.options)
    parts = served(tmp_path / "out")
    scores = scores_of(parts, PAIRS)

    expected = expected_outputs(tmp_path / "plain", published.read)
    assert [list(score.outputs) for score in scores] == [pytest.approx(outputs, abs=1e-4) for outputs in expected]
    is_gated = parts.info.outputs[0] == "reward"
    assert [score.reward for score in scores] == [score.outputs[0] if is_gated else None for score in scores]
    assert (conversion.origin, parts.info.forward, len(parts.info.outputs)) == (
        published.layout,
        "packed",
        len(expected[0]),
    )
    assert torch.tensor(expected).std(dim=0).min() > 0.02
    described = parts.description()["reward_model"]
    assert described["source"]["layout"] == published.layout


@pytest.mark.parametrize(
    ("write", "forward", "kernels"),
    [(armo_rm, "packed", "off"), (armo_rm, "packed", "auto"), (armo_rm, "padded", "off"), (urm, "packed", "off")],
)
def test_outputs_do_not_depend_on_the_batch(
    write: Callable[[Path], Published], forward: str, kernels: str, tmp_path: Path
) -> None:
    """In bfloat16 a text has the same bits alone, in a batch of four in another order, and in one batch with all."""
    published = write(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", **published.options)
    parts = served(tmp_path / "out", forward=forward, dtype="bfloat16", kernels=kernels)

    alone = [score.outputs for score in scores_of(parts, PAIRS, batch=1)]

    assert [score.outputs for score in scores_of(parts, PAIRS)] == alone
    assert [score.outputs for score in scores_of(parts, PAIRS[::-1], batch=4)][::-1] == alone


def test_a_gated_head_needs_the_end_of_the_prompt(tmp_path: Path) -> None:
    """A text without the tokens that the gate reads is an error of its item, and the others are scored."""
    from service.errors import InvalidRequest
    from service.records import Encoding, Exchange, Item, TemplatedText, TokenIds

    published = armo_rm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", **published.options)
    tokenization = served(tmp_path / "out").tokenization

    items = [Item(Exchange("a", "b")), Item(TemplatedText("no prompt")), Item(TokenIds((5, 6, 7)))]
    first, *others = tokenization.encode(items, Encoding())

    assert first.num_tokens > 5  # type: ignore[union-attr]
    assert [type(outcome) for outcome in others] == [InvalidRequest, InvalidRequest]


def test_a_gate_whose_pattern_no_template_writes_is_refused(tmp_path: Path) -> None:
    """A chat template that does not write what stands before the completion ends the start."""
    published = armo_rm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", **published.options)
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (tmp_path / "out" / "chat_template.jinja").write_text(template)

    with pytest.raises(CheckpointError, match=r"does not have the tokens that reward_model\.json names"):
        served(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_log_odds_are_those_of_the_language_model(family: str, tmp_path: Path) -> None:
    """The reward is the difference of two logits of transformers' own language model, capped or tied as there."""
    tied = family == "gemma2"
    write_tiny_causal_lm(tmp_path / "source", family, tie_word_embeddings=tied, final_logit_softcapping=2.0)

    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--log-odds", "y", "n"]) == 0
    scores = scores_of(served(tmp_path / "out"), PAIRS)

    expected = log_odds(tmp_path / "source", "y", "n")
    assert [score.reward for score in scores] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.02
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["score.0.weight"].shape == (2, HIDDEN_SIZE)
    assert not any(name.startswith("lm_head") for name in weights)


@torch.no_grad()
def log_odds(folder: Path, good: str, bad: str) -> list[float]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, completion in PAIRS:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
        pair = torch.log_softmax(logits, dim=0)[tokenizer.convert_tokens_to_ids([good, bad])]
        found.append(float(pair[0] - pair[1]))
    return found


def test_a_probability_among_two_tokens_and_the_logit_of_one(tmp_path: Path) -> None:
    """As Math-Shepherd (+ against -) and Nemotron-70B-Reward (one logit) do, with a template from the user."""
    write_tiny_causal_lm(tmp_path / "source")
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}<|im_start|>judge\n"
    )
    (tmp_path / "judge.jinja").write_text(template)
    common = ["--chat-template", str(tmp_path / "judge.jinja")]

    assert main([str(tmp_path / "source"), str(tmp_path / "p"), "--probability", "y", "n", *common]) == 0
    assert main([str(tmp_path / "source"), str(tmp_path / "l"), "--logit", "id:7", *common]) == 0
    probabilities = [score.reward for score in scores_of(served(tmp_path / "p"), PAIRS)]
    logits = [score.reward for score in scores_of(served(tmp_path / "l"), PAIRS)]

    (tmp_path / "source" / "chat_template.jinja").write_text(template)
    difference = torch.tensor(log_odds(tmp_path / "source", "y", "n"))
    assert probabilities == pytest.approx(torch.sigmoid(difference).tolist(), abs=1e-5)
    weight = load_file(tmp_path / "source" / "model.safetensors")["lm_head.weight"]
    expected = expected_outputs(tmp_path / "source", lambda states, _: weight[[7]] @ states[-1])
    assert logits == pytest.approx([value for (value,) in expected], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--log-odds", "y", "y"], "are the same token"),
        (["--log-odds", "quick brown fox", "n"], "is [0-9]+ tokens of the tokenizer"),
        (["--logit", "id:99999"], "is beyond the"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(
    arguments: list[str], refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no single token, twice the same or outside the vocabulary is refused before anything is written."""
    write_tiny_causal_lm(tmp_path / "source")

    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *arguments]) == 1

    import re

    assert re.search(refusal, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def with_head(source: Path, folder: Path, weight: torch.Tensor) -> Path:
    """A copy of a checkpoint with another linear head."""
    import shutil

    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors") | {"score.weight": weight}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("combine", "reward"),
    [
        (MeanOfOutputs(), lambda values: values.mean()),
        (MinOfOutputs(), lambda values: values.min()),
        (LowerBound(0.5), lambda values: values.mean() - 0.5 * values.std(correction=0)),
    ],
)
def test_members_on_one_body_are_an_ensemble(
    combine: Any, reward: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """Members are those of each checkpoint and of each row of a file, and the reward is their aggregate."""
    source = write_tiny_checkpoint(tmp_path / "source")
    rows = [random(1, HIDDEN_SIZE, seed=seed) for seed in range(4)]
    first, second = (with_head(source, tmp_path / f"member{index}", rows[index]) for index in range(2))
    save_file({"heads.weight": torch.cat(rows[2:])}, tmp_path / "heads.safetensors")

    convert(first, tmp_path / "out", members=(second, tmp_path / "heads.safetensors"), combine=combine)
    parts = served(tmp_path / "out")
    scores = scores_of(parts, PAIRS)

    expected = torch.tensor(expected_outputs(source, lambda states, ids: torch.cat(rows) @ states[last(source, ids)]))
    assert torch.tensor([score.outputs for score in scores]).allclose(expected, atol=1e-4)
    assert [score.reward for score in scores] == pytest.approx([float(reward(row)) for row in expected], abs=1e-4)
    assert parts.info.outputs == ("member_0", "member_1", "member_2", "member_3")


def last(folder: Path, ids: list[int]) -> int:
    """The rightmost token that is not the pad token, which transformers' classifier reads."""
    pad = json.loads((folder / "config.json").read_bytes())["pad_token_id"]
    return max(index for index, token in enumerate(ids) if token != pad)


def test_members_with_deeper_heads_are_an_ensemble(tmp_path: Path) -> None:
    """Each member keeps its own layers, and its number is that of the member served alone."""
    alone = []
    for index in range(2):
        head = {
            "v_head.summary.0.weight": random(24, HIDDEN_SIZE, seed=20 + index),
            "v_head.summary.0.bias": random(24, seed=22 + index),
            "v_head.summary.2.weight": random(1, 24, seed=24 + index),
            "v_head.summary.2.bias": torch.tensor([0.5]),
        }
        (tmp_path / f"m{index}").mkdir()
        store(tmp_path / f"m{index}" / "source", head)
        convert(tmp_path / f"m{index}" / "source", tmp_path / f"m{index}" / "out")
        alone.append([score.reward for score in scores_of(served(tmp_path / f"m{index}" / "out"), PAIRS)])

    members = (tmp_path / "m1" / "source",)
    convert(tmp_path / "m0" / "source", tmp_path / "out", members=members, combine=MeanOfOutputs())
    scores = scores_of(served(tmp_path / "out"), PAIRS)

    assert [score.outputs for score in scores] == [pytest.approx(pair, abs=1e-5) for pair in zip(*alone, strict=True)]


def test_members_on_other_bodies_are_refused(tmp_path: Path) -> None:
    """A checkpoint with another body cannot share the pass, and the first tensor that differs is named."""
    first, second = (write_tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in range(2))

    with pytest.raises(CheckpointError, match=r"another body than .*\(model\.embed_tokens\.weight differs\)"):
        convert(first, tmp_path / "out", members=(second,), combine=MeanOfOutputs())


def test_the_version_covers_head_and_rule(tmp_path: Path) -> None:
    """Models with the same weights have other versions where the aggregate or the gate's temperature differ."""
    published = armo_rm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", **published.options)
    file = tmp_path / "out" / "reward_model.json"
    original = json.loads(file.read_bytes())

    def version(content: dict[str, Any]) -> str:
        file.write_text(json.dumps(content))
        checkpoint = open_checkpoint(tmp_path / "out", ModelSettings(path=str(tmp_path / "out")))
        return model_version(checkpoint, dtype="float32", template="chat").version

    warmer = json.loads(file.read_bytes())
    warmer["head"]["gate"]["temperature"] = 3.0
    weighted = original | {"combine": {"kind": "weights", "weights": {"helpful": 1.0}}}
    assert len({version(original), version(warmer), version(weighted)}) == 3
