"""A head with several outputs, read at several tokens of a text in one pass, on every forward path."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny_classifiers import load_tiny, packed_path, random_rows, rows_that_share
from tiny_models import write_tiny_checkpoint
from transformers import AutoModel

from service.checkpoints.configuration import read_config
from service.checkpoints.reward_description import (
    LayeredHead,
    LinearLayer,
    RewardDescription,
    write_description,
)
from service.engines.parity import choose_path, probes_for, reference_of
from service.engines.paths.base import ForwardPath, PathSpec
from service.engines.paths.padded import PaddedForward
from service.engines.torch import TorchEngine, load_torch_engine
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings

OUTPUTS = ("helpful", "honest", "short")
LAYERS = (LinearLayer("head.0.weight", "head.0.bias", "relu"), LinearLayer("head.1.weight", "head.1.bias"))

Rows = list[tuple[int, ...]]
Steps = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose described head gives three numbers."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("steps") / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("score.weight")
    random_numbers = torch.Generator().manual_seed(0)
    shapes = {"head.0.weight": (16, 64), "head.0.bias": (16,), "head.1.weight": (3, 16), "head.1.bias": (3,)}
    head = {name: torch.randn(shape, generator=random_numbers) / 10 for name, shape in shapes.items()}
    save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    write_description(folder, RewardDescription(LayeredHead(LAYERS), outputs=OUTPUTS))
    return folder


def steps_of(rows: Rows, seed: int = 0) -> Steps:
    """Draw positions of each row: none, some or all, first and last included."""
    dice = random.Random(seed)
    return [
        tuple(sorted(dice.sample(range(len(row)), dice.choice([0, 1, 3, len(row)]) % (len(row) + 1)))) for row in rows
    ]


@torch.inference_mode()
def independent(folder: Path, rows: Rows, steps: Steps) -> list[NDArray[np.float32]]:
    """Return for each row [steps + 1, 3].

    Each position is the last one of a text of its own, which a body of plain transformers reads, and the head is
    written out here.
    """
    body = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    head = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "head" in name}

    def read(tokens: Sequence[int]) -> torch.Tensor:
        state = body(torch.tensor([tokens])).last_hidden_state[0, -1]
        hidden = torch.relu(head["head.0.weight"] @ state + head["head.0.bias"])
        outputs: torch.Tensor = head["head.1.weight"] @ hidden + head["head.1.bias"]
        return outputs

    positions = [(*own, len(row) - 1) for row, own in zip(rows, steps, strict=True)]
    return [
        torch.stack([read(row[: position + 1]) for position in own]).numpy()
        for row, own in zip(rows, positions, strict=True)
    ]


def assert_equal(found: Sequence[NDArray[np.float32]] | None, expected: list[NDArray[np.float32]]) -> None:
    assert found is not None
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


def load(folder: Path, **model: object) -> TorchEngine:
    return load_torch_engine(
        folder,
        ModelSettings.model_validate({"device": "cpu", "dtype": "float32", "num_threads": 1, **model}),
        BatchingSettings(),
        pad_token_id=read_config(folder).get_text_config().pad_token_id,
        max_input_tokens=400,
    )


@pytest.mark.parametrize("name", ["padded", "packed", "shared prefixes"])
def test_outputs_at_steps_are_those_of_the_prefixes(folder: Path, name: str) -> None:
    """All outputs at every step equal independent forward passes over the text up to that step."""
    classifier = load_tiny(folder)
    path: ForwardPath
    if name == "padded":
        path = PaddedForward(classifier)
    else:
        path = packed_path(classifier, share_prefixes=name == "shared prefixes")
    rows = rows_that_share(classifier)
    steps = steps_of(rows)

    output = path.run(rows, steps=steps)

    assert_equal(output.outputs, independent(folder, rows, steps))
    assert output.outputs is not None
    assert output.rewards == [float(values[-1, 0]) for values in output.outputs]
    assert any(output.shared_tokens) == (name == "shared prefixes")


def test_outputs_at_steps_with_the_prefix_cache(folder: Path) -> None:
    """A cached prefix ends before the first token that is read, so a cold and a warm cache give the same numbers."""
    classifier = load_tiny(folder)
    path = packed_path(classifier, cache_bytes=2**22)
    path.run([(7, 8, 9)], prompts=[None])
    prompt, *completions = random_rows(classifier, (60, 20, 33, 41))
    rows = [prompt + completion for completion in completions]
    steps: Steps = [(60, 70), (3, 79), ()]
    expected = independent(folder, rows, steps)

    for expects_cached in (False, True):
        output = path.run(rows, prompts=[60] * 3, steps=steps)
        assert_equal(output.outputs, expected)
        assert (output.cached_tokens > 0) == expects_cached
    assert [path.num_cached_tokens(row, None, own) for row, own in zip(rows, steps, strict=True)] == [60, 0, 60]


def test_an_engine_gives_each_sequence_its_own_steps(folder: Path) -> None:
    """Equal token ids with different steps are computed once, and each sequence gets its own positions."""
    engine = load(folder)
    row, other = random_rows(load_tiny(folder), (50, 30))
    sequences = [
        TokenSequence(row, 10, step_positions=(20, 30)),
        TokenSequence(other, 10),
        TokenSequence(row, 10, step_positions=(30, 44)),
        TokenSequence(row, 10),
    ]

    output = engine.forward(sequences)

    steps = [sequence.step_positions for sequence in sequences]
    assert_equal(output.outputs, independent(folder, [sequence.token_ids for sequence in sequences], steps))
    assert engine.info.outputs == OUTPUTS
    assert engine.info.reads_steps
    assert list(output.shared_tokens)[2:] == [50, 50]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_change_no_bit(folder: Path, dtype: str) -> None:
    """The outputs at a token are the same bits whichever other tokens are read, alone and in any batch."""
    engine = load(folder, dtype=dtype)
    rows = rows_that_share(load_tiny(folder))
    plain = engine.forward([TokenSequence(row) for row in rows])
    sequences = [TokenSequence(row, step_positions=own) for row, own in zip(rows, steps_of(rows), strict=True)]

    together = engine.forward(sequences)
    alone = [engine.forward([sequence]) for sequence in sequences]

    assert plain.outputs is not None
    assert together.outputs is not None
    if dtype == "bfloat16":
        assert together.rewards == plain.rewards
    for values, one, without in zip(together.outputs, alone, plain.outputs, strict=True):
        assert one.outputs is not None
        tolerance = 0.0 if dtype == "bfloat16" else 2e-5
        np.testing.assert_allclose(values, one.outputs[0], atol=tolerance, rtol=0)
        np.testing.assert_allclose(values[-1], without[-1], atol=tolerance, rtol=0)


def test_a_path_with_one_wrong_output_is_not_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start-up probe compares all outputs with plain transformers, not the first one alone."""
    classifier = load_tiny(folder)
    reference = reference_of(classifier, probes_for(classifier, 400))
    run = PaddedForward.run

    def wrong_last(self: PaddedForward, *args: object, **options: object):
        output = run(self, *args, **options)  # type: ignore[arg-type]
        for values in output.outputs or ():
            values[:, 2] += 0.01
        return output

    choose_path(classifier, [PathSpec("padded")], reference)
    monkeypatch.setattr(PaddedForward, "run", wrong_last)
    with pytest.raises(Exception, match=r"differs by 0\.01"):
        choose_path(classifier, [PathSpec("padded")], reference)
