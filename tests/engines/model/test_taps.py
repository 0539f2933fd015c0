"""States equal transformers' hidden states, are pooled over the right tokens, and do not change a reward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_classifiers import load_tiny, random_rows, rows_that_share
from tiny_models import DECODER_FAMILIES, FAMILIES
from transformers import AutoModelForSequenceClassification

from service.checkpoints.configuration import read_config
from service.engines.paths.packed import PackedForward
from service.engines.torch import TorchEngine, load_torch_engine
from service.errors import SettingsError
from service.records import StateTap, TokenSequence
from service.settings import BatchingSettings, ModelSettings

NUM_BLOCKS = 3
TAPS = tuple(StateTap(layer, pooling) for layer in range(NUM_BLOCKS + 1) for pooling in ("last", "mean"))


def load(folder: Path, dtype: str = "float32", taps: tuple[StateTap, ...] = TAPS, forward: str = "auto") -> TorchEngine:
    return load_torch_engine(
        folder,
        ModelSettings.model_validate({"device": "cpu", "dtype": dtype, "num_threads": 1, "forward": forward}),
        BatchingSettings(),
        pad_token_id=read_config(folder).get_text_config().pad_token_id,
        max_input_tokens=400,
        taps=taps,
    )


def sequences_of(rows: list[tuple[int, ...]]) -> list[TokenSequence]:
    """Sequences with prompts of all lengths, some empty and some unknown."""
    return [
        TokenSequence(row, None if index % 4 == 3 else min(index * 7 % 50, len(row))) for index, row in enumerate(rows)
    ]


def states_of_transformers(folder: Path, sequences: list[TokenSequence], *, decoder: bool) -> np.ndarray:
    """The same states from transformers' own ``output_hidden_states``, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    states = []
    for sequence in sequences:
        with torch.inference_mode():
            output = model.base_model(input_ids=torch.tensor([sequence.token_ids]), output_hidden_states=True)
        layers = [*output.hidden_states[:NUM_BLOCKS], output.last_hidden_state]
        first = sequence.num_prompt_tokens or 0
        first = first if first < sequence.num_tokens else 0
        pooled = [(layer[0, -1 if decoder else 0], layer[0, first:].mean(0)) for layer in layers]
        states.append(torch.stack([state for pair in pooled for state in pair]))
    return torch.stack(states).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_transformers(tiny_checkpoint, family: str) -> None:
    """Embeddings, every block and the final norm, last token and completion mean, equal transformers' hidden states."""
    folder = tiny_checkpoint(family)
    sequences = sequences_of(rows_that_share(load_tiny(folder)))

    output = load(folder).forward(sequences, states=True)

    assert output.states is not None
    assert output.states.dtype == np.float32
    assert output.states.shape == (len(sequences), len(TAPS), 64)
    expected = states_of_transformers(folder, sequences, decoder=family in DECODER_FAMILIES)
    np.testing.assert_allclose(output.states, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "forward"), [("gemma3", "packed"), ("llama", "padded"), ("bert", "padded")])
def test_states_change_no_bit_of_a_reward(tiny_checkpoint, family: str, forward: str, dtype: str) -> None:
    """Rewards are bit-identical with states, without them, and from an engine that has no taps.

    Each pass is the first of its engine: in float32 a prefix from the cache may move a reward by rounding.
    """
    folder = tiny_checkpoint(family)
    sequences = sequences_of(rows_that_share(load_tiny(folder)))

    with_states = load(folder, dtype, forward=forward).forward(sequences, states=True)
    without = load(folder, dtype, forward=forward).forward(sequences)

    assert list(with_states.rewards) == list(without.rewards)
    assert list(with_states.rewards) == list(load(folder, dtype, taps=(), forward=forward).forward(sequences).rewards)
    assert without.states is None


def test_states_with_shared_prefixes_are_bit_identical(tiny_checkpoint) -> None:
    """In bf16 on a CPU the states of a text do not depend on shared prefixes or batch composition."""
    folder = tiny_checkpoint("qwen2")
    engine = load(folder, "bfloat16")
    sequences = sequences_of(rows_that_share(load_tiny(folder)))

    together = engine.forward(sequences, states=True).states

    assert together is not None
    for sequence, states in zip(sequences, together, strict=True):
        alone = engine.forward([sequence], states=True).states
        assert alone is not None
        np.testing.assert_array_equal(alone[0], states)


def test_equal_ids_with_different_prompts_have_their_own_means(tiny_checkpoint) -> None:
    """Texts with the same ids and different prompts have one reward, and each the mean over its own completion."""
    folder = tiny_checkpoint("llama")
    (row,) = random_rows(load_tiny(folder), lengths=(30,))
    engine = load(folder, taps=(StateTap(NUM_BLOCKS, "mean"),))

    output = engine.forward(
        [TokenSequence(row, 10), TokenSequence(row, 20), TokenSequence(row, 10), TokenSequence(row)], states=True
    )

    assert output.states is not None
    assert len(set(output.rewards)) == 1
    np.testing.assert_array_equal(output.states[0], output.states[2])
    assert not np.allclose(output.states[0], output.states[1])
    assert not np.allclose(output.states[0], output.states[3])
    assert list(output.shared_tokens) == [0, 30, 30, 30]


def test_an_engine_without_taps_has_no_states(tiny_checkpoint) -> None:
    """Requesting states without taps returns none; a pass leaves no hook behind."""
    folder = tiny_checkpoint("llama")
    engine = load(folder)
    (row,) = random_rows(load_tiny(folder), lengths=(8,))

    assert load(folder, taps=()).forward([TokenSequence(row)], states=True).states is None
    engine.forward([TokenSequence(row)], states=True)
    assert isinstance(engine._path, PackedForward)
    body = engine._path._classifier.body
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.modules())


@pytest.mark.parametrize("layer", [-1, NUM_BLOCKS + 1])
def test_a_missing_layer_fails_the_start(tiny_checkpoint, layer: int) -> None:
    """A tap beyond the model's depth is refused when the engine is loaded, not when a request comes."""
    with pytest.raises(SettingsError, match="3 blocks"):
        load(tiny_checkpoint("llama"), taps=(StateTap(layer, "last"),))
