"""With ``batching.batch_invariant`` a reward has the same bits in any batch, or the service does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_path import ScriptedPath
from tiny_classifiers import head_of, load_tiny, random_rows, rows_that_share, sequences_of, shuffled_batches
from tiny_models import DECODER_FAMILIES, ENCODER_FAMILIES
from torch import nn

from service.checkpoints.configuration import read_config
from service.engines.attention.interface import attend
from service.engines.base import EngineOutput
from service.engines.devices.device import has_avx512
from service.engines.invariance import InvarianceProbe, accompanying_rows, batches_of, compared_rows
from service.engines.kernels import choice
from service.engines.linear.verified_blocks import CPU_SIZES, VerifiedLinear, verified_sizes
from service.engines.model.classifier import Classifier
from service.engines.torch import TorchEngine, load_torch_engine
from service.errors import InvarianceError
from service.settings import BatchingSettings, ModelSettings

PROBES = [(1, 2, 3), (4,), (1, 2, 5, 6), (7, 8, 9, 10, 11), (4, 4), (12, 13)]


def load(folder: Path, *, batching: dict[str, Any] | None = None, **model: object) -> TorchEngine:
    """Load an engine with batch-invariant rewards; in float32 on torch's own products unless the settings say more."""
    settings = ModelSettings.model_validate({"device": "cpu", "dtype": "float32", "num_threads": 1, **model})
    return load_torch_engine(
        folder,
        settings,
        BatchingSettings.model_validate({"batch_invariant": True, **(batching or {})}),
        pad_token_id=read_config(folder).get_text_config().pad_token_id,
        max_input_tokens=400,
    )


def assert_invariant(engine: TorchEngine, rows: list[tuple[int, ...]], seeds: int = 2) -> None:
    """Check that every reward is finite and has the bits of the reward alone in batches of random orders."""
    rows = list(dict.fromkeys(rows))
    alone = {row: engine.forward(sequences_of([row])).rewards[0] for row in rows}
    assert len(set(alone.values())) > len(rows) // 2
    for seed in range(seeds):
        for batch in shuffled_batches(rows, seed):
            assert list(engine.forward(sequences_of(batch)).rewards) == [alone[row] for row in batch]


# --- Rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral"])
def test_rewards_of_decoders_have_the_same_bits_in_any_batch(tiny_checkpoint, family: str, dtype: str) -> None:
    """Also in float32 on torch's own products, with prefixes that texts share, and with capped scores and windows."""
    folder = tiny_checkpoint(family)
    engine = load(folder, dtype=dtype, kernels="off")

    assert (engine.info.forward, engine.info.kernels) == ("packed", None)
    assert engine.info.batch_invariance["num_sequences"] > 4
    assert engine.info.batch_invariance["min_block_rows"] in CPU_SIZES
    assert_invariant(engine, rows_that_share(load_tiny(folder)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_rewards_of_encoders_have_the_same_bits_in_any_batch(tiny_checkpoint, family: str, dtype: str) -> None:
    """Padded batches too, with attention of one sequence after the other, and a head of the model's own."""
    folder = tiny_checkpoint(family)
    engine = load(folder, dtype=dtype)

    assert engine.info.forward == "padded"
    assert_invariant(engine, random_rows(load_tiny(folder)))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_padded_decoder_has_the_same_bits_in_any_batch(tiny_checkpoint, family: str) -> None:
    """Causality and sliding windows are kept where a decoder is forced onto the padded path."""
    folder = tiny_checkpoint(family)

    assert_invariant(load(folder, forward="padded"), random_rows(load_tiny(folder)))


def test_prefixes_are_shared_where_that_changes_no_bit(tiny_checkpoint) -> None:
    """In bfloat16 on a CPU they are shared and cached; in float32 and with capped scores they are not."""
    found = {
        (family, dtype): load(tiny_checkpoint(family), dtype=dtype, kernels="off").info
        for family, dtype in (("llama", "bfloat16"), ("llama", "float32"), ("gemma2", "bfloat16"))
    }

    assert found["llama", "bfloat16"].min_shared_prefix_tokens is not None
    assert found["llama", "bfloat16"].prefix_cache_mib > 0
    assert found["llama", "float32"].min_shared_prefix_tokens is None
    assert found["gemma2", "bfloat16"].min_shared_prefix_tokens is None


def test_the_cpu_kernels_keep_their_layers(tiny_checkpoint) -> None:
    """Where the compiled CPU kernels run, they run with the setting too: their rewards are batch-invariant anyway."""
    dtype = "bfloat16" if has_avx512() else "float32"
    kernels, reason = choice.kernels_for("auto", torch.device("cpu"), getattr(torch, dtype))
    if kernels is None:
        pytest.skip(f"no CPU kernels: {reason}")
    folder = tiny_checkpoint("llama")
    engine = load(folder, dtype=dtype)

    assert engine.info.kernels == kernels.name
    assert engine.info.min_shared_prefix_tokens is not None
    assert engine.info.batch_invariance["min_block_rows"] == 1
    assert_invariant(engine, rows_that_share(load_tiny(folder)))


def test_without_the_setting_nothing_is_checked_or_replaced(tiny_checkpoint) -> None:
    """The default has no verified layers and reports no check."""
    engine = load(tiny_checkpoint("llama"), batching={"batch_invariant": False})

    assert engine.info.batch_invariance == {}
    assert not any(isinstance(module, VerifiedLinear) for module in body_of(engine).modules())


def body_of(engine: TorchEngine) -> nn.Module:
    classifier: Classifier = engine._path._classifier  # type: ignore[union-attr]
    assert head_of(classifier).weight.dtype == torch.float32
    body: nn.Module = classifier.body
    return body


# --- Starts that fail ------------------------------------------------------------------------------------------------


def test_a_linear_layer_that_depends_on_the_batch_fails_the_start(tiny_checkpoint, monkeypatch) -> None:
    """Rewards that agree with transformers to rounding, and whose bits depend on the number of rows, are not served."""

    def shape_dependent(self: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        if states.numel() // self.in_features % 256:
            return nn.functional.linear(states.flip(-1), self.weight.flip(-1), self._parameters["bias"])
        return nn.functional.linear(states, self.weight, self._parameters["bias"])

    monkeypatch.setattr(VerifiedLinear, "forward", shape_dependent)

    with pytest.raises(InvarianceError, match=r"LlamaForSequenceClassification cannot .*rewards change with the batch"):
        load(tiny_checkpoint("llama"), kernels="off", forward="packed")


def test_attention_that_depends_on_the_batch_fails_the_start(tiny_checkpoint, monkeypatch) -> None:
    """Rounding that depends on the number of sequences is detected whichever module causes it."""

    def dependent(call):
        attended = attend(call)
        return attended * (1 + 1e-6 * (len(call.layout.sequences) > 2))

    monkeypatch.setattr(
        "service.engines.paths.packed.register_packed_attention", lambda: register_as("dependent_attention", dependent)
    )

    with pytest.raises(InvarianceError, match="packed is not batch-invariant"):
        load(tiny_checkpoint("llama"), kernels="off", forward="packed")


def register_as(name: str, function) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    from service.engines.attention.call import transformers_attention
    from service.engines.attention.interface import no_mask

    AttentionInterface.register(name, transformers_attention(function))
    AttentionMaskInterface.register(name, no_mask)
    return name


def test_products_without_a_passing_size_fail_the_start(tiny_checkpoint, monkeypatch) -> None:
    """Where a product's bits depend on the position in blocks of every size, the error has its shape."""

    def multiply(output, rows, weight, bias):
        torch.mm(rows, weight.T, out=output)
        output[1::2] = rows[1::2].flip(1) @ weight.T.flip(0)

    monkeypatch.setattr("service.engines.linear.verified_blocks.multiply_into", multiply)
    verified_sizes.cache_clear()

    with pytest.raises(InvarianceError, match=r"other bits at other positions.*Use batching\.deterministic"):
        load(tiny_checkpoint("llama"), kernels="off")
    verified_sizes.cache_clear()


@pytest.mark.parametrize(
    ("family", "words"), [("deberta-v2", "attention by code of its own"), ("mixtral", "multiplies otherwise")]
)
def test_a_model_that_is_not_covered_is_refused(tiny_checkpoint, family: str, words: str) -> None:
    """Attention that does not go through transformers' interface, and experts, end the start with the reason."""
    with pytest.raises(InvarianceError, match=words):
        load(tiny_checkpoint(family))


# --- The check -------------------------------------------------------------------------------------------------------


class DependentPath(ScriptedPath):
    """A path whose reward of one sequence is another one behind a certain number of others."""

    def __init__(self, *, changes: bool) -> None:
        self.changes = changes

    def run(self, rows, query=None, prompts=None, steps=()):
        rewards = [float(sum(row)) for row in rows]
        if self.changes and (1, 2, 3) in rows[1:]:
            rewards[rows.index((1, 2, 3))] += 0.5
        return EngineOutput(rewards, [0] * len(rows))


def test_a_path_whose_rewards_never_change_passes() -> None:
    """The evidence has the numbers of what was compared."""
    probe = InvarianceProbe(PROBES, max_tokens=100, fill_tokens=200)

    probe.check(DependentPath(changes=False))

    assert probe.evidence["num_sequences"] == len(PROBES)
    assert probe.evidence["num_batches"] > 3
    assert probe.evidence["max_batch_tokens"] >= 200


def test_a_reward_that_changes_is_found_with_its_difference() -> None:
    """One of all compared rewards changes, in some batches only."""
    probe = InvarianceProbe(PROBES, max_tokens=100, fill_tokens=200)

    with pytest.raises(InvarianceError, match=r"1 of 6 rewards change with the batch, by up to 0\.5"):
        probe.check(DependentPath(changes=True))
    assert probe.evidence == {}


@given(
    probes=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=12).map(tuple), min_size=1, max_size=20),
    num_tokens=st.integers(1, 500),
)
def test_batches_are_of_different_sequences_within_the_limit(probes: list[tuple[int, ...]], num_tokens: int) -> None:
    """Every compared sequence is in each batch once, at different indices, and no sequence is too long."""
    compared = compared_rows(probes)
    fill = accompanying_rows(probes, num_tokens, max_tokens=200)
    batches = batches_of(probes, compared, fill)

    assert set(compared) <= set(probes)
    assert 1 <= len(compared) <= 8
    for batch in batches:
        assert len(set(batch)) == len(batch)
        assert set(compared) <= set(batch)
        assert max(map(len, batch)) <= 200
    if len(compared) > 1:
        assert len({tuple(batch.index(row) for row in compared) for batch in batches}) > 1


def test_filling_sequences_have_the_tokens_that_a_gate_reads() -> None:
    """Each ends in a probe; together they have the requested number of tokens."""
    rows = accompanying_rows(PROBES, 3000, max_tokens=300)

    assert sum(map(len, rows)) >= 2500
    assert all(any(row[-len(probe) :] == probe for probe in PROBES) for row in rows)
    assert accompanying_rows(PROBES, 50, max_tokens=3) == []


# --- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", [*DECODER_FAMILIES, *(set(ENCODER_FAMILIES) - {"deberta-v2"})])
def test_rewards_on_cuda_have_the_same_bits_in_any_batch(tiny_checkpoint, family: str, dtype: str) -> None:
    """On CUDA in any dtype: packed with what may be shared, padded for encoders."""
    folder = tiny_checkpoint(family)
    engine = load(folder, device="cuda", dtype=dtype, cuda_graphs=False)

    assert_invariant(engine, rows_that_share(load_tiny(folder)), seeds=4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prefixes_are_shared_on_cuda(tiny_checkpoint, family: str) -> None:
    """With variable-length attention shared prefixes change no bit, so they are shared."""
    engine = load(tiny_checkpoint(family), device="cuda", dtype="bfloat16", cuda_graphs=False)

    assert engine.info.min_shared_prefix_tokens is not None


@pytest.mark.gpu
def test_cuda_graphs_have_the_same_bits(tiny_checkpoint) -> None:
    """Recorded passes are compared with ordinary ones bit by bit, and serve."""
    folder = tiny_checkpoint("llama")
    engine = load(folder, device="cuda", dtype="bfloat16", cuda_graphs=True)

    assert engine.info.cuda_graph_max_tokens > 0
    assert_invariant(engine, random_rows(load_tiny(folder), lengths=(5, 33, 1, 70, 300, 2)), seeds=4)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 896, 4096, 8192])
def test_the_mean_of_a_norm_has_the_same_bits_from_the_shortest_batch_on(hidden: int) -> None:
    """CUDA's mean over a row does not depend on the number of rows, from the 128 rows of the shortest batch on."""
    states = torch.randn(20_000, hidden, device="cuda")
    together = states.pow(2).mean(-1)

    for num_rows in (128, 256, 1152, 8192):
        assert torch.equal(states[:num_rows].pow(2).mean(-1), together[:num_rows])
