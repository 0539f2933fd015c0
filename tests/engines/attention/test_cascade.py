"""Cascade attention, merged by log-sum-exp, equals a softmax over all keys at once."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_classifiers import load_tiny, packed_path, probe_and_choose, rows_that_share
from tiny_models import DECODER_FAMILIES
from torch.nn.functional import scaled_dot_product_attention

from service.engines.attention import interface as attention
from service.engines.attention.cascade import attend_cascade, merge_attention, plan_cascade
from service.engines.attention.layout import PackedLayout
from service.engines.attention.varlen import VarlenMetadata, attend_varlen
from service.engines.parity import plain_rewards
from service.engines.paths import packed
from service.engines.torch import load_torch_engine
from service.errors import SettingsError
from service.settings import BatchingSettings, ModelSettings

CPU = torch.device("cpu")
VARLEN_FAMILIES = [family for family in DECODER_FAMILIES if family != "gemma2"]
"""Families without soft caps; where a window ends within a prefix, its keys are gathered."""


def random_states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_two_halves_merge_into_the_whole(scale: float) -> None:
    """Attention to the first and to the other keys, merged, is attention to all, also where one part has all weight."""
    query, key, value = (random_states(50, 4, 16, seed=seed) * scale for seed in range(3))

    def attend_to(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        metadata = VarlenMetadata(
            torch.tensor([0, 50], dtype=torch.int32), torch.tensor([0, last - first]).int(), 50, 50
        )
        return attend_varlen(query, key[first:last], value[first:last], metadata, scaling=None, causal=False)

    whole, lse = attend_to(0, 50)

    assert torch.allclose(merge_attention(*attend_to(0, 17), *attend_to(17, 50)), whole, atol=1e-5 * scale, rtol=0)
    assert torch.allclose(torch.logaddexp(attend_to(0, 17)[1], attend_to(17, 50)[1]), lse, atol=1e-3)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_reference_is_scaled_dot_product_attention(window: int | None, key_heads: int) -> None:
    """The reference of the kernel computes, sequence by sequence, what torch's own attention computes."""
    lengths = (9, 0, 23, 1)
    begins = torch.tensor([0, 9, 9, 32, 33], dtype=torch.int32)
    query, key, value = (
        random_states(33, 4, 16),
        random_states(33, key_heads, 16, seed=1),
        random_states(33, key_heads, 16),
    )

    found, _ = attend_varlen(query, key, value, VarlenMetadata(begins, begins, 23, 23), scaling=0.3, window=window)

    for begin, length in zip(begins.tolist(), lengths, strict=False):
        queries, keys, values = (states[begin : begin + length].transpose(0, 1) for states in (query, key, value))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (window or length + 1))
        expected = scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, scale=0.3, enable_gqa=True
        ).transpose(0, 1)
        assert torch.allclose(found[begin : begin + length], expected, atol=1e-6)


def nested_rows(seed: int) -> list[tuple[int, ...]]:
    """Return sequences whose prefixes nest three deep, some whole within others, and one unrelated."""
    dice = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(1000) for _ in range(count))

    system = tokens(40)
    rows = [system, system[:25] + tokens(5), tokens(30)]
    for _ in range(3):
        prompt = system + tokens(dice.randrange(8, 60))
        rows += [prompt, *(prompt + tokens(dice.randrange(1, 50)) for _ in range(4))]
    rows += [row + tokens(9) for row in rows[-2:]]
    return dice.sample(rows, len(rows))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, 400])
def test_cascade_attention_is_attention_to_gathered_keys(seed: int, window: int | None) -> None:
    """However prefixes nest, every token has the result of attention to the gathered keys of its sequence."""
    layout = PackedLayout.of(nested_rows(seed), CPU, min_shared_tokens=8)
    query = random_states(layout.num_tokens, 4, 16)
    key, value = (random_states(layout.num_tokens, 2, 16, seed=seed) for seed in (1, 2))
    plan = plan_cascade(layout.sequences)
    assert plan.is_valid_for(window)

    merged = attend_cascade(query, key, value, plan, scaling=None, window=window)

    for chunk in layout.chunks:
        metadata = chunk.metadata
        gathered = attend_varlen(
            query[slice(*chunk.own)], key[chunk.keys], value[chunk.keys], metadata, scaling=None, window=window
        )[0]
        assert torch.allclose(merged[slice(*chunk.own)], gathered, atol=1e-5)


def test_a_prefix_is_read_once_for_all_that_share_it() -> None:
    """The keys of a prefix are gathered once, not for each completion, and never more at once than the batch has."""
    prompt = tuple(range(100))
    layout = PackedLayout.of([(*prompt, 200 + number, 7) for number in range(64)], CPU, min_shared_tokens=8)

    (chunk,) = plan_cascade(layout.sequences).prefix_chunks

    assert len(chunk.keys) == 100
    assert len(chunk.queries) == sum(sequence.num_own for sequence in layout.sequences if sequence.num_shared)
    assert sum(len(gathered.keys) for gathered in layout.chunks) > 60 * 100

    chain = [tuple(range(length)) for length in range(10, 300, 10)]
    layout = PackedLayout.of(chain, CPU, min_shared_tokens=8)
    for chunk in plan_cascade(layout.sequences).prefix_chunks:
        assert len(chunk.keys) <= layout.num_tokens


@pytest.mark.parametrize("family", VARLEN_FAMILIES)
def test_cascade_rewards_are_plain_rewards(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """In fp32 the rewards of nested prefixes equal the plain forward one by one within 1e-5."""
    classifier = load_tiny(tiny_checkpoint(family))
    rows = rows_that_share(classifier)
    plain = plain_rewards(classifier, rows)
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(packed, "BLOCK", 1)  # as on CUDA

    output = packed_path(classifier, cascade=True).run(rows)

    assert output.rewards == pytest.approx(plain, abs=1e-5, rel=0)
    assert sum(output.shared_tokens) > sum(map(len, rows)) / 2


def test_keys_are_gathered_where_a_window_ends_within_a_sequence() -> None:
    """Where a window ends within a sequence some keys of the prefix are hidden, so the plan is not valid."""
    plan = plan_cascade(PackedLayout.of([tuple(range(50)), (*range(40), 99)], CPU, min_shared_tokens=8).sequences)

    assert plan.is_valid_for(50)
    assert not plan.is_valid_for(49)


def test_the_setting_is_refused_on_a_cpu(tiny_checkpoint) -> None:
    """A CPU has no kernel that returns the log-sum-exp, so the setting is refused with an error."""
    with pytest.raises(SettingsError, match="cascade_attention needs a CUDA device"):
        load_torch_engine(
            tiny_checkpoint("llama"),
            ModelSettings(device="cpu", cascade_attention=True),
            BatchingSettings(),
            pad_token_id=0,
            max_input_tokens=99,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_cascade_rewards_pass_the_probe_on_cuda(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """On CUDA, merged by the kernel's log-sum-exp, rewards pass the parity probe and equal those of gathered keys."""
    classifier = load_tiny(tiny_checkpoint(family), dtype, device=torch.device("cuda"))
    rows = rows_that_share(classifier)
    gathered = packed_path(classifier).run(rows).rewards

    path, parity = probe_and_choose(classifier, "packed", 400, cascade=True)

    assert parity.agrees
    assert path.run(rows).rewards == pytest.approx(gathered, abs=0.1, rel=0)
