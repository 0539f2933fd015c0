"""The torch engine scores batches as plain transformers does, batch-invariantly, and survives out-of-memory errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scripted_path import ScriptedPath
from tiny_classifiers import load_tiny, measured, random_rows, sequences_of, shuffled_batches
from tiny_models import DECODER_FAMILIES, ENCODER_FAMILIES
from transformers import AutoModelForSequenceClassification

from service.checkpoints.configuration import read_config
from service.engines.base import EngineInfo, EngineOutput
from service.engines.kernels.build import AMX_BF16
from service.engines.torch import TorchEngine, load_torch_engine
from service.errors import EngineOutOfMemory
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings


def load(folder: Path, *, max_input_tokens: int = 400, deterministic: bool = False, **model: object) -> TorchEngine:
    settings = ModelSettings.model_validate({"device": "cpu", "dtype": "float32", "num_threads": 1, **model})
    return load_torch_engine(
        folder,
        settings,
        BatchingSettings(deterministic=deterministic),
        pad_token_id=read_config(folder).get_text_config().pad_token_id,
        max_input_tokens=max_input_tokens,
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "modernbert"])
def test_rewards_are_those_of_transformers_itself(tiny_checkpoint, family: str) -> None:
    """The engine's fp32 rewards equal ``AutoModelForSequenceClassification`` loaded and called by hand, in order."""
    folder = tiny_checkpoint(family)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = random_rows(load_tiny(folder))
    with torch.inference_mode():
        plain = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]

    output = load(folder).forward(sequences_of(rows))

    assert list(output.rewards) == pytest.approx(plain, abs=1e-4, rel=0)
    assert output.shared_tokens == [0] * len(rows)


@pytest.mark.parametrize(("family", "path"), [("llama", "packed"), ("bert", "padded")])
def test_info_describes_how_rewards_are_computed(tiny_checkpoint, family: str, path: str) -> None:
    """The info has the path, batch cost, device, dtype, limits and the measurements of the probe."""
    info = load(tiny_checkpoint(family), dtype="bfloat16").info

    assert (info.engine, info.forward, info.cost, info.device, info.dtype) == ("torch", path, path, "cpu", "bfloat16")
    assert info.architecture.lower().startswith(family)
    uses_amx = info.kernels == AMX_BF16.name
    assert (info.max_input_tokens, info.max_batch_tokens) == (400, 4096 if uses_amx else 2048)
    assert measured(info, "max_difference") <= measured(info, "tolerance")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_equal_sequences_of_a_batch_have_bit_identical_rewards(tiny_checkpoint, family: str, dtype: str) -> None:
    """The same sequence at any index of a batch has the same reward, bit for bit, in the order of the batch."""
    engine = load(tiny_checkpoint(family), dtype=dtype)
    first, second, third = sequences_of(random_rows(load_tiny(tiny_checkpoint(family)), lengths=(31, 8, 60)))

    rewards = engine.forward([first, second, first, third, second, first]).rewards

    assert rewards[0] == rewards[2] == rewards[5]
    assert rewards[1] == rewards[4]
    assert len({rewards[0], rewards[1], rewards[3]}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*DECODER_FAMILIES, *ENCODER_FAMILIES])
def test_deterministic_rewards_are_bit_identical_in_any_batch(tiny_checkpoint, family: str, dtype: str) -> None:
    """With ``deterministic`` neither batch composition nor order changes a bit, also in fp32."""
    folder = tiny_checkpoint(family)
    engine = load(folder, deterministic=True, dtype=dtype)
    rows = random_rows(load_tiny(folder), lengths=(9, 1, 57, 3, 21))
    alone = {row: engine.forward(sequences_of([row])).rewards[0] for row in rows}

    for seed in range(2):
        for batch in shuffled_batches(rows, seed):
            assert list(engine.forward(sequences_of(batch)).rewards) == [alone[row] for row in batch]


def test_long_and_short_sequences_have_their_own_rotary_frequencies(tiny_checkpoint) -> None:
    """With LongRoPE scaling each sequence of a batch of short and long ones has its plain reward."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    }
    folder = tiny_checkpoint("phi3", rope_parameters=scaling, original_max_position_embeddings=64)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = random_rows(load_tiny(folder), lengths=(20, 100, 64, 65))
    with torch.inference_mode():
        plain = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]

    rewards = load(folder).forward(sequences_of(rows)).rewards

    assert list(rewards) == pytest.approx(plain, abs=1e-5, rel=0)


def test_an_empty_sequence_is_an_error(tiny_checkpoint) -> None:
    """A sequence without tokens raises; it never gets the reward of another one."""
    with pytest.raises(ValueError, match="without tokens"):
        load(tiny_checkpoint("llama")).forward([TokenSequence((5, 6)), TokenSequence(())])


class OneSequenceMemory(ScriptedPath):
    """A path on a device that runs out of memory for more than one sequence."""

    def run(self, rows, query=None, prompts=None, steps=()):
        if len(rows) > 1:
            torch.empty(2**60)
        return EngineOutput([float(row[0]) for row in rows], [0] * len(rows))


class Broken(ScriptedPath):
    """A path with a bug that has nothing to do with memory."""

    def run(self, rows, query=None, prompts=None, steps=()):
        raise RuntimeError("shapes do not match")


INFO = EngineInfo("torch", "Llama", "packed", "cpu", "float32", "packed", max_input_tokens=8, max_batch_tokens=8)


def test_out_of_memory_is_translated_and_survived() -> None:
    """A failed allocation becomes EngineOutOfMemory with the size of the batch, and a smaller batch is scored."""
    engine = TorchEngine(OneSequenceMemory(), INFO)

    with pytest.raises(EngineOutOfMemory, match="2 sequences with 3 tokens") as failure:
        engine.forward(sequences_of([(1, 2), (3,)]))

    assert failure.value.__cause__ is None
    assert failure.value.__context__ is None
    assert list(engine.forward(sequences_of([(3,)])).rewards) == [3.0]


def test_other_errors_pass_through() -> None:
    """An error that is not about memory reaches the caller unchanged."""
    with pytest.raises(RuntimeError, match="shapes do not match"):
        TorchEngine(Broken(), INFO).forward(sequences_of([(1,)]))


def test_a_closed_engine_scores_nothing(tiny_checkpoint) -> None:
    """After ``close`` the model is released and a pass raises."""
    engine = load(tiny_checkpoint("llama"))
    engine.close()

    with pytest.raises(RuntimeError, match="closed"):
        engine.forward(sequences_of([(5, 6)]))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "bert"])
def test_rewards_on_cuda_are_batch_invariant(tiny_checkpoint, family: str, deterministic: bool) -> None:
    """On CUDA fp32 rewards are the same in any batch within 1e-5, and bit for bit with ``deterministic``."""
    folder = tiny_checkpoint(family)
    engine = load(folder, device="cuda", deterministic=deterministic)
    rows = random_rows(load_tiny(folder))
    alone = {row: engine.forward(sequences_of([row])).rewards[0] for row in rows}

    for batch in shuffled_batches(rows, seed=0):
        rewards = list(engine.forward(sequences_of(batch)).rewards)
        assert rewards == pytest.approx([alone[row] for row in batch], abs=0 if deterministic else 1e-5, rel=0)
