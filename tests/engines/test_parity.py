"""The start-up probe picks the fastest path that agrees with plain transformers, and refuses to serve if none does."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_classifiers import load_tiny
from tiny_models import DECODER_FAMILIES, ENCODER_FAMILIES
from transformers import AttentionInterface

from service.engines import parity
from service.engines.packing import ATTENTION, packed_attention
from service.engines.padded import PaddedForward
from service.engines.parity import Parity, choose_path, max_difference, probe_rows, tolerance
from service.errors import ParityError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "path"),
    [*((family, "packed") for family in DECODER_FAMILIES), *((family, "padded") for family in ENCODER_FAMILIES)],
)
def test_decoders_are_packed_and_encoders_padded(tiny_checkpoint, family: str, path: str, dtype: torch.dtype) -> None:
    """The probe finds the right path for each family by itself, with evidence that could have failed."""
    chosen, found = choose_path(load_tiny(tiny_checkpoint(family), dtype), "auto", 400)

    assert chosen.name == path
    assert found.agrees
    assert found.is_conclusive


def test_a_forced_path_is_probed_too(tiny_checkpoint) -> None:
    """A decoder can be made to take the padded path; an encoder cannot be made to take the packed one."""
    assert choose_path(load_tiny(tiny_checkpoint("llama")), "padded", 400)[0].name == "padded"
    with pytest.raises(ParityError, match="packed does not run"):
        choose_path(load_tiny(tiny_checkpoint("bert")), "packed", 400)


@pytest.fixture
def deaf_attention():
    """Attention as a bug would have it: it looks across the borders of the sequences, and ignores windows."""

    def attend(module, query, key, value, mask, *, packing=None, **kwargs):
        whole_row = type(packing)(((0, query.shape[2]),), packing.borders[[0, -1]])
        return packed_attention(module, query, key, value, mask, packing=whole_row, **kwargs)

    AttentionInterface.register(ATTENTION, attend)
    yield
    AttentionInterface.register(ATTENTION, packed_attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("deaf_attention")
def test_a_wrong_path_is_passed_over(tiny_checkpoint, dtype: torch.dtype) -> None:
    """A packed path whose attention leaks between sequences is caught in fp32 and bf16, and the padded one serves."""
    chosen, _ = choose_path(load_tiny(tiny_checkpoint("llama"), dtype), "auto", 400)

    assert chosen.name == "padded"


@pytest.mark.usefixtures("deaf_attention")
def test_a_wrong_forced_path_is_refused(tiny_checkpoint) -> None:
    """Where the path is forced and wrong, the start ends with a sentence that gives the measured difference."""
    with pytest.raises(ParityError, match=r"packed differs by \d.*more than 0\.000"):
        choose_path(load_tiny(tiny_checkpoint("llama")), "packed", 400)


@pytest.mark.usefixtures("deaf_attention")
def test_no_agreeing_path_is_refused(tiny_checkpoint, monkeypatch) -> None:
    """When neither path agrees the start is refused, naming both."""
    monkeypatch.setattr(PaddedForward, "rewards", lambda self, rows: [0.0 for _ in rows])

    with pytest.raises(ParityError, match=r"packed differs .* padded differs"):
        choose_path(load_tiny(tiny_checkpoint("llama")), "auto", 400)


def test_an_ignored_window_is_caught(tiny_checkpoint) -> None:
    """The probe has a sequence longer than a small window, so a path that forgets the window does not serve."""

    def attend(module, query, key, value, mask, **kwargs):
        return packed_attention(module, query, key, value, mask, **{**kwargs, "sliding_window": None})

    AttentionInterface.register(ATTENTION, attend)
    try:
        chosen, _ = choose_path(load_tiny(tiny_checkpoint("mistral")), "auto", 400)
    finally:
        AttentionInterface.register(ATTENTION, packed_attention)

    assert chosen.name == "padded"


def test_the_probe_tries_endings_lengths_and_the_window() -> None:
    """There are rows of one token, ending in EOS, in EOS and another token and in pad, and one beyond the window."""
    rows = probe_rows(vocab_size=1000, pad_token_id=0, eos_token_id=9, window=200, max_tokens=4096)

    assert {1, 2} <= {len(row) for row in rows}
    assert {(9,), (0,)} <= {row[-1:] for row in rows}
    assert any(row[-2] == 9 and row[-1] not in {0, 9} for row in rows if len(row) > 2)
    assert (0, 0, 0) in rows
    assert max(len(row) for row in rows) > 200
    assert all(0 <= token < 1000 for row in rows for token in row)


def test_the_probe_stays_within_its_limits() -> None:
    """No row is longer than the model takes, and a large window does not make the probe expensive."""
    short = probe_rows(vocab_size=1000, pad_token_id=0, eos_token_id=9, window=200, max_tokens=50)
    wide = probe_rows(vocab_size=1000, pad_token_id=0, eos_token_id=9, window=4096, max_tokens=8192)

    assert max(len(row) for row in short) <= 50
    assert max(len(row) for row in wide) < 200


def test_the_probe_does_without_special_tokens() -> None:
    """A model without EOS and pad is probed all the same."""
    assert len(probe_rows(vocab_size=300, pad_token_id=None, eos_token_id=None, window=None, max_tokens=512)) == 5


@pytest.mark.parametrize(
    ("dtype", "rewards", "noise", "expected"),
    [
        (torch.float32, [0.5, -0.2], 0.0, 1e-4),
        (torch.float32, [0.5, -20.0], 0.0, 2e-3),
        (torch.bfloat16, [0.5, -2.0], 0.03, 0.12),
        (torch.bfloat16, [0.5, -2.0], 0.0, 2 * 2**-7),
        (torch.float16, [1.0], 0.0, 2**-10),
    ],
)
def test_the_tolerance_is_what_rounding_explains(
    dtype: torch.dtype, rewards: list[float], noise: float, expected: float
) -> None:
    """fp32: 1e-4, in proportion above one. Half precision: four times the measured noise, at least the last place."""
    assert tolerance(dtype, rewards, noise) == pytest.approx(expected)


def test_a_nan_never_agrees() -> None:
    """A path that answers NaN where plain transformers answers a number differs, whatever the tolerance."""
    difference = max_difference([1.0, math.nan], [1.0, 2.0])

    assert not Parity(difference, 1e9, 0.0, 1.0, 2).agrees


def test_rewards_that_hardly_differ_are_called_inconclusive(tiny_checkpoint, caplog) -> None:
    """Where rounding is as large as all differences between rewards, the log says that the probe proves nothing."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    with torch.no_grad():
        classifier.linear_head.weight.mul_(1e-7)

    _, found = choose_path(classifier, "auto", 400)

    assert not found.is_conclusive
    assert "cannot tell right from wrong" in caplog.text


def test_noise_is_measured_in_half_precision_only(tiny_checkpoint) -> None:
    """The noise of bf16 is measured, larger than fp16's; fp32 needs none. The hook that moves embeddings is removed."""
    folder = tiny_checkpoint("llama")
    noise = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        classifier = load_tiny(folder, dtype)
        noise[dtype] = choose_path(classifier, "auto", 400)[1].noise
        assert not classifier.model.get_input_embeddings()._forward_hooks

    assert noise[torch.float32] == 0.0
    assert 0.0 < noise[torch.float16] < noise[torch.bfloat16] < 0.5


def test_findings_are_plain_values() -> None:
    """What `/v1/model` shows of the probe is numbers and booleans."""
    record = Parity(1e-6, 1e-4, 0.0, 2.0, 10).as_record()

    assert record["conclusive"] is True
    assert all(isinstance(value, (bool, int, float)) for value in record.values())
    assert list(parity.PATHS) == ["packed", "padded"]
