"""The start-up probe chooses the fastest path that agrees with plain transformers, and refuses to serve without one."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_classifiers import head_of, load_tiny, probe_and_choose
from tiny_models import DECODER_FAMILIES, ENCODER_FAMILIES
from transformers import AttentionInterface

from service.engines.attention.interface import ATTENTION, packed_attention, register_packed_attention
from service.engines.attention.kv_cache import CacheTransaction
from service.engines.attention.layout import BLOCK, PackedLayout
from service.engines.base import EngineOutput
from service.engines.parity import Reference, probe_sequences, tolerances_of
from service.engines.paths.packed import PackedForward
from service.engines.paths.padded import PaddedForward
from service.errors import ParityError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "path"),
    [*((family, "packed") for family in DECODER_FAMILIES), *((family, "padded") for family in ENCODER_FAMILIES)],
)
def test_decoders_are_packed_and_encoders_padded(tiny_checkpoint, family: str, path: str, dtype: torch.dtype) -> None:
    """The probe chooses the right path for each family, and its comparison is conclusive."""
    chosen, found = probe_and_choose(load_tiny(tiny_checkpoint(family), dtype), "auto", 400)

    assert chosen.name == path
    assert found.agrees
    assert found.conclusive


def test_a_forced_path_is_probed_too(tiny_checkpoint) -> None:
    """A decoder can be forced onto the padded path; an encoder cannot be forced onto the packed one."""
    assert probe_and_choose(load_tiny(tiny_checkpoint("llama")), "padded", 400)[0].name == "padded"
    with pytest.raises(ParityError, match="packed does not run"):
        probe_and_choose(load_tiny(tiny_checkpoint("bert")), "packed", 400)


@pytest.fixture
def leaking_attention():
    """Attention with a bug: it attends across sequence boundaries, and ignores windows."""

    def attend(module, query, key, value, mask, *, packed_layout=None, **kwargs):
        one_sequence = PackedLayout.of([tuple(range(query.shape[2]))], packed_layout.device, block=BLOCK)
        return packed_attention(module, query, key, value, mask, packed_layout=one_sequence, **kwargs)

    register_packed_attention()  # so that no path registers it over this one
    AttentionInterface.register(ATTENTION, attend)
    yield
    AttentionInterface.register(ATTENTION, packed_attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("leaking_attention")
def test_a_wrong_path_is_not_chosen(tiny_checkpoint, dtype: torch.dtype) -> None:
    """A packed path whose attention leaks between sequences is detected in fp32 and bf16, and the padded one serves."""
    chosen, _ = probe_and_choose(load_tiny(tiny_checkpoint("llama"), dtype), "auto", 400)

    assert chosen.name == "padded"


@pytest.mark.usefixtures("leaking_attention")
def test_a_wrong_forced_path_is_refused(tiny_checkpoint) -> None:
    """Where a wrong path is forced, the start fails with an error that contains the measured difference."""
    with pytest.raises(ParityError, match=r"packed differs by \d.*more than 0\.000"):
        probe_and_choose(load_tiny(tiny_checkpoint("llama")), "packed", 400)


@pytest.mark.usefixtures("leaking_attention")
def test_no_agreeing_path_is_refused(tiny_checkpoint, monkeypatch) -> None:
    """When neither path agrees the start fails, and the error names both."""
    monkeypatch.setattr(PaddedForward, "run", lambda self, rows: EngineOutput([0.0 for _ in rows], [0 for _ in rows]))

    with pytest.raises(ParityError, match=r"cannot be served.* padded differs"):
        probe_and_choose(load_tiny(tiny_checkpoint("llama")), "auto", 400)


def test_a_path_is_probed_with_a_warm_cache_and_returned_with_an_empty_one(tiny_checkpoint) -> None:
    """With a prefix cache the probe has read cached prefixes, and the path that serves has none of them."""
    chosen, found = probe_and_choose(load_tiny(tiny_checkpoint("llama")), "auto", 400, cache_bytes=2**20)

    assert isinstance(chosen, PackedForward)
    assert found.agrees
    assert chosen.kv_cache is not None
    assert chosen.kv_cache.layers
    assert chosen.kv_cache.prefix_index.num_tokens == 0


def test_wrong_cached_states_are_detected(tiny_checkpoint, monkeypatch) -> None:
    """A cache that returns other values than were stored does not serve; prefixes are still shared within a pass."""

    def with_cached(self, states: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        cached = 1.5 * pool.index_select(0, self._slots)
        return torch.cat([states[0].transpose(0, 1)[: self._num_packed], cached]).transpose(0, 1)[None]

    monkeypatch.setattr(CacheTransaction, "_with_cached", with_cached)

    chosen, _ = probe_and_choose(load_tiny(tiny_checkpoint("llama")), "auto", 400, cache_bytes=2**20)

    assert not chosen.caches_prefixes
    assert chosen.min_shared_prefix_tokens is not None


def test_an_ignored_window_is_detected(tiny_checkpoint) -> None:
    """The probe has a sequence longer than a small window, so a path that ignores the window does not serve."""

    def attend(module, query, key, value, mask, **kwargs):
        return packed_attention(module, query, key, value, mask, **{**kwargs, "sliding_window": None})

    register_packed_attention()  # so that no path registers it over this one
    AttentionInterface.register(ATTENTION, attend)
    try:
        chosen, _ = probe_and_choose(load_tiny(tiny_checkpoint("mistral")), "auto", 400)
    finally:
        AttentionInterface.register(ATTENTION, packed_attention)

    assert chosen.name == "padded"


def test_probes_cover_endings_lengths_and_the_window() -> None:
    """There are probes of one token, ending in EOS, in EOS and another token and in pad, and one beyond the window."""
    rows = probe_sequences(vocab_size=1000, pad_token_id=0, eos_token_id=9, window=200, max_tokens=4096)

    assert {1, 2} <= {len(row) for row in rows}
    assert {(9,), (0,)} <= {row[-1:] for row in rows}
    assert any(row[-2] == 9 and row[-1] not in {0, 9} for row in rows if len(row) > 2)
    assert (0, 0, 0) in rows
    assert max(len(row) for row in rows) > 200
    assert all(0 <= token < 1000 for row in rows for token in row)


def test_probes_stay_within_their_limits() -> None:
    """No probe is longer than the model's limit, and a large window does not make the probe expensive."""
    short = probe_sequences(vocab_size=1000, pad_token_id=0, eos_token_id=9, window=200, max_tokens=50)
    wide = probe_sequences(vocab_size=1000, pad_token_id=0, eos_token_id=9, window=4096, max_tokens=8192)

    assert max(len(row) for row in short) <= 50
    assert max(len(row) for row in wide) < 200


def test_probes_need_no_special_tokens() -> None:
    """A model without EOS and pad token is probed too."""
    assert len(probe_sequences(vocab_size=300, pad_token_id=None, eos_token_id=None, window=None, max_tokens=512)) == 8


@pytest.mark.parametrize(
    ("dtype", "plain", "noise", "expected"),
    [
        (torch.float32, [0.5, -0.2, 0.1], [0.0, 0.0, 0.0], [1e-4, 1e-4, 1e-4]),
        (torch.float32, [0.5, -20.0, 0.1], [0.0, 0.0, 0.0], [2e-3, 2e-3, 2e-3]),
        (torch.bfloat16, [0.5, -2.0, 0.1], [0.03, 2.0, 0.01], [0.12, 8.0, 0.12]),
        (torch.bfloat16, [0.5, -2.0, 0.1], [0.0, 0.0, 0.0], [2**-6, 2**-6, 2**-6]),
        (torch.float16, [1.0], [0.0], [2**-10]),
    ],
)
def test_the_tolerance_is_what_rounding_explains(
    dtype: torch.dtype, plain: list[float], noise: list[float], expected: list[float]
) -> None:
    """fp32: 1e-4, in proportion above one. Half precision: four times the measured noise, at least the last place.

    A sensitive probe has a wide tolerance of its own and leaves the others' as narrow as the median noise.
    """
    assert tolerances_of(dtype, plain, noise) == pytest.approx(expected)


def test_every_probe_has_its_own_tolerance() -> None:
    """A difference within the tolerance of a sensitive probe exceeds that of another; the worst probe is reported."""
    noise, limits = [[0.01], [1.0], [0.01]], [[0.04], [4.0], [0.04]]

    reference = Reference([(5,), (6,), (7,)], [[1.0], [2.0], [3.0]], noise, limits)

    within = reference.compare([[1.0], [5.0], [3.03]])
    beyond = reference.compare([[1.0], [2.0], [3.5]])

    assert within.agrees
    assert not beyond.agrees
    assert (beyond.max_difference, beyond.tolerance) == (0.5, 0.04)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_never_agrees(bad: float) -> None:
    """A path that returns NaN or infinity where plain transformers returns a number differs, whatever the tolerance."""
    reference = Reference([(5,), (6,)], [[1.0], [2.0]], [[0.0], [0.0]], [[1e9], [1e9]])

    assert not reference.compare([[1.0], [bad]]).agrees


def test_every_output_is_compared_by_itself() -> None:
    """A small output that is wrong is not hidden by a large one, and one inconclusive output makes the probe so."""
    plain, noise, limits = [[1000.0, 0.1], [2000.0, 0.1]], [[1.0, 0.1]] * 2, [[4.0, 0.4]] * 2

    reference = Reference([(5,), (6,)], plain, noise, limits)

    assert reference.compare([[1003.0, 0.1], [2000.0, 0.1]]).agrees
    assert not reference.compare([[1000.0, 0.1], [2000.0, 0.6]]).agrees
    assert not reference.compare(plain).conclusive


def test_a_dtype_that_overflows_is_refused(tiny_checkpoint) -> None:
    """Where plain transformers itself gives no finite reward there is nothing to compare with: the start fails."""
    classifier = load_tiny(tiny_checkpoint("llama"), torch.float16)
    with torch.no_grad():
        head_of(classifier).weight.fill_(math.inf)

    with pytest.raises(ParityError, match=r"no finite reward .* model\.dtype"):
        probe_and_choose(classifier, "auto", 400)


def test_a_head_of_zeros_is_probed(tiny_checkpoint) -> None:
    """Rewards that are all zero in half precision agree, and the comparison is inconclusive."""
    classifier = load_tiny(tiny_checkpoint("llama"), torch.bfloat16)
    with torch.no_grad():
        head_of(classifier).weight.zero_()

    _, found = probe_and_choose(classifier, "auto", 400)

    assert found.agrees
    assert not found.conclusive


def test_rewards_that_hardly_differ_are_inconclusive(tiny_checkpoint, caplog) -> None:
    """Where rounding is as large as the differences between rewards, the log warns that the probe is inconclusive."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    with torch.no_grad():
        head_of(classifier).weight.mul_(1e-7)

    _, found = probe_and_choose(classifier, "auto", 400)

    assert not found.conclusive
    assert "parity probe is inconclusive" in caplog.text


def test_noise_is_measured_in_half_precision_only(tiny_checkpoint) -> None:
    """The noise of bf16 is measured, larger than fp16's; fp32 needs none. The hook that moves embeddings is removed."""
    folder = tiny_checkpoint("llama")
    noise = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        classifier = load_tiny(folder, dtype)
        noise[dtype] = probe_and_choose(classifier, "auto", 400)[1].noise
        assert not classifier.model.get_input_embeddings()._forward_hooks

    assert noise[torch.float32] == 0.0
    assert 0.0 < noise[torch.float16] < noise[torch.bfloat16] < 0.5
