"""Compiled blocks give the rewards of the original blocks, in any batch composition."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from tiny_classifiers import (
    load_tiny,
    measured,
    packed_path,
    probe_and_choose,
    random_rows,
    rows_that_share,
    shuffled_batches,
)
from tiny_models import DECODER_FAMILIES

from service.engines.compilation import CompiledBlock, check_compiler
from service.engines.parity import plain_rewards
from service.engines.torch import load_torch_engine
from service.errors import ParityError, SettingsError
from service.settings import BatchingSettings, ModelSettings

# Torch's compiler warns of torch's own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

needs_own_vectors = pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ,
    reason="where the variable names fewer instructions than the CPU has, blocks compiled by torch give rewards "
    "that are not finite, and the parity probe refuses them",
)


@pytest.fixture(autouse=True)
def reset_compiler() -> None:
    """Code compiled by one test must not count towards the recompilation limit of the next."""
    torch.compiler.reset()


@needs_compiler
@needs_own_vectors
@pytest.mark.slow
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_compiled_rewards_are_plain_transformers_rewards(tiny_checkpoint, family: str) -> None:
    """In fp32 every family's compiled blocks give the rewards of its plain forward, shared prefixes included."""
    classifier = load_tiny(tiny_checkpoint(family))
    rows = [*random_rows(classifier), *rows_that_share(classifier)]

    rewards = packed_path(classifier, compiled=True).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)


@needs_compiler
@pytest.mark.slow
def test_batch_composition_changes_no_bit_of_a_compiled_reward(tiny_checkpoint) -> None:
    """A sequence's bf16 reward on a CPU is bit-identical alone and in any batch, compiled too."""
    classifier = load_tiny(tiny_checkpoint("llama", hidden_size=192, intermediate_size=576), torch.bfloat16)
    path = packed_path(classifier, compiled=True)
    rows = [*random_rows(classifier, lengths=(5, 1, 133, 200)), *rows_that_share(classifier)[:4]]
    alone = {row: path.run([row]).rewards[0] for row in rows}

    for batch in shuffled_batches(rows, seed=0):
        assert path.run(batch).rewards == [alone[row] for row in batch]


@needs_compiler
@needs_own_vectors
@pytest.mark.slow
def test_an_engine_compiles_its_blocks(tiny_checkpoint) -> None:
    """``model.compile`` compiles the blocks, passes the parity probe and is reported."""
    settings = ModelSettings(device="cpu", dtype="float32", num_threads=1, compile=True)

    engine = load_torch_engine(
        tiny_checkpoint("llama"), settings, BatchingSettings(), pad_token_id=0, max_input_tokens=200
    )

    assert engine.info.compiled
    assert engine.info.forward == "packed"
    assert measured(engine.info, "max_difference") <= 1e-4


def test_plain_blocks_are_restored(tiny_checkpoint) -> None:
    """A classifier that ran compiled runs plain transformers again, as the parity probe requires."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    packed_path(classifier, compiled=True)
    assert all(isinstance(block.forward, CompiledBlock) for block in classifier.blocks)

    packed_path(classifier)

    assert not any(isinstance(block.forward, CompiledBlock) for block in classifier.blocks)


def test_what_cannot_be_compiled_is_refused(tiny_checkpoint) -> None:
    """Padded batches are not compiled: the start ends with a remedy and does not fall back silently."""
    with pytest.raises(ParityError, match=r"leave model\.compile out"):
        probe_and_choose(load_tiny(tiny_checkpoint("bert")), "auto", 100, compiled=True)


def test_a_missing_compiler_is_reported(monkeypatch) -> None:
    """Without a C++ compiler a CPU cannot compile, and the error names what to install; CUDA needs none."""
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(SettingsError, match="install g"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))
