"""Attention of batch-invariant paths: what the kernel chooses by, and which prefixes may be shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_classifiers import load_tiny, packed_path, random_rows, rows_that_share

from service.engines.attention import interface, varlen
from service.engines.attention.call import PackingUnsupportedError
from service.engines.attention.row_attention import attending_by_row, register_row_attention, row_attention
from service.engines.attention.varlen import VarlenMetadata, attend_varlen, batch_invariant_metadata
from service.engines.parity import plain_rewards
from service.engines.paths import packed
from service.errors import InvarianceError

CU_SEQLENS = torch.tensor([0, 1, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("bounds", "window", "expected"),
    [((1, 1), None, (2, 1)), ((1, 40), 16, (2, 40)), ((7, 7), 16, (7, 16)), ((300, 300), None, (300, 300))],
)
def test_the_kernel_chooses_nothing_by_the_longest_sequence(
    bounds: tuple[int, int], window: int | None, expected: tuple[int, int]
) -> None:
    """The bound of the queries is at least two, that of the keys at least the window; the limits are as they were."""
    found = batch_invariant_metadata(VarlenMetadata(CU_SEQLENS, CU_SEQLENS, *bounds), window)

    assert (found.max_seqlen_q, found.max_seqlen_k) == expected
    assert found.cu_seqlens_q is found.cu_seqlens_k is CU_SEQLENS


@pytest.mark.parametrize("has_num_splits", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_the_kernel_is_told_not_to_split_keys(monkeypatch: pytest.MonkeyPatch, has_num_splits: bool) -> None:
    """Where torch can forbid splits it is told to; only for batch-invariant paths, with the bounds of those."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def kernel(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((arguments, options))
        return arguments[0], arguments[0]

    monkeypatch.setattr(varlen, "_has_kernel", lambda device: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "HAS_NUM_SPLITS", has_num_splits)
    states = torch.randn(2, 4, 8)

    for batch_invariant in (False, True):
        metadata = VarlenMetadata(CU_SEQLENS, CU_SEQLENS, 1, 1)
        attend_varlen(states, states, states, metadata, scaling=None, window=16, batch_invariant=batch_invariant)

    (usual, usual_options), (invariant, invariant_options) = calls
    assert (usual[5:7], invariant[5:7]) == ((1, 1), (2, 16))
    assert "num_splits" not in usual_options
    assert invariant_options.get("num_splits") == (1 if has_num_splits else None)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_padded_packed_batch_runs_through_the_variable_length_kernel(tiny_checkpoint, monkeypatch, family) -> None:
    """As on CUDA: padding behind the sequences belongs to none of them, and rewards are those of transformers."""
    monkeypatch.setattr(interface, "_has_varlen_kernel", lambda query, value: True)
    monkeypatch.setattr(packed, "BLOCK", 1)
    classifier = load_tiny(tiny_checkpoint(family))
    rows = [*random_rows(classifier), *rows_that_share(classifier)]

    output = packed_path(classifier, batch_invariant=True).run(rows)

    assert sum(output.shared_tokens) > 100
    assert output.rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gemma2", torch.bfloat16)], ids=str)
def test_prefixes_that_would_change_bits_are_refused(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """Without the variable-length kernel a path that shares prefixes is refused in float32, and with capped scores."""
    classifier = load_tiny(tiny_checkpoint(family), dtype)
    path = packed_path(classifier, batch_invariant=True)

    with pytest.raises(PackingUnsupportedError, match="adds in another order"):
        path.run(rows_that_share(classifier))
    packed_path(classifier, batch_invariant=True, share_prefixes=False).run(rows_that_share(classifier))


# --- Padded batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_each_row_attends_to_itself_without_its_padding(causal: bool) -> None:
    """By definition: softmax over the row's own keys; padding gets zeros, whatever the states there are."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    key[1, :, 3:] = value[1, :, 3:] = float("nan")
    lengths = (5, 3)

    with attending_by_row(lengths):
        attended, weights = row_attention(torch.nn.Module(), query, key, value, None, scaling=0.5, is_causal=causal)

    assert weights is None
    for row, length in enumerate(lengths):
        scores = 0.5 * torch.einsum(
            "hqd,hkd->hqk", query[row, :, :length], key[row, :, :length].repeat_interleave(2, dim=0)
        )
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        expected = torch.softmax(scores, -1) @ value[row, :, :length].repeat_interleave(2, dim=0)
        torch.testing.assert_close(attended[row, :length], expected.transpose(0, 1))
        assert not attended[row, length:].any()


def test_capped_scores_are_refused() -> None:
    """They would be computed otherwise than the model defines."""
    states = torch.randn(1, 1, 3, 8)

    with attending_by_row([3]):
        row_attention(torch.nn.Module(), states, states, states, None)
        with pytest.raises(InvarianceError, match="capped"):
            row_attention(torch.nn.Module(), states, states, states, None, softcap=30.0)


def test_a_model_that_does_not_call_it_is_refused() -> None:
    """Without a call the model's own attention has run, of whose bits nothing is known."""
    register_row_attention()
    states = torch.randn(1, 1, 3, 8)

    with pytest.raises(InvarianceError, match="code of its own"), attending_by_row([3]):
        pass
    with pytest.raises(RuntimeError, match="attending_by_row"):
        row_attention(torch.nn.Module(), states, states, states, None)
