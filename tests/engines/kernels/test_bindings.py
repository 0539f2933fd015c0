"""The kernels give the numbers of torch's operations in fp32, rounded once, and are found, made or refused in words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, silu

from service.engines.kernels import build
from service.engines.kernels.bindings import Activation, Kernels, Norm, RmsNorm, kernels_for
from service.engines.kernels.build import (
    AMX_BF16,
    AVX512_BF16,
    AVX512_F32,
    AVX512_VNNI,
    TARGETS,
    KernelsUnavailable,
    Target,
    build_all,
    compile_kernels,
    locate_library,
    source_digest,
    target_of_machine,
)
from service.engines.linear.int8 import grouped
from service.errors import SettingsError

CPU = torch.device("cpu")
ROUNDING = 2**-7
"""Relative to the largest number: one of bfloat16's last places."""

ACTIVATIONS = {Activation.SILU: silu, Activation.GELU_TANH: lambda states: gelu(states, approximate="tanh")}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def seen_by(kernels: Kernels, numbers: torch.Tensor) -> torch.Tensor:
    """Return what the kernels' products see of weights or states, in fp32."""
    return grouped(numbers) if kernels.quantizes else numbers.float()


def assert_rounded(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Say nothing where bfloat16 numbers are the fp32 ones, but for their last place."""
    torch.testing.assert_close(found.float(), wanted, atol=ROUNDING * float(wanted.abs().max()), rtol=ROUNDING)


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 32, 1), (5, 96, 64), (33, 64, 96), (300, 1536, 80)])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_linear(kernels: Kernels, rows: int, width: int, outputs: int, bias: bool) -> None:
    """A packed product is the linear layer, for rows and outputs that fill no tile, too."""
    states, weight = random(2, rows, width), random(outputs, width, seed=1)
    added = random(outputs, seed=2) if bias else None

    found = kernels.linear(states, kernels.pack_weight(weight, added))

    wanted = torch.nn.functional.linear(seen_by(kernels, states), seen_by(kernels, weight))
    assert_rounded(found, wanted if added is None else wanted + added.float())


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_gated_layer(kernels: Kernels, rows: int, activation: Activation) -> None:
    """A gated layer is down(act(gate) * up), whatever the number of rows."""
    states, gate, up, down = random(rows, 64), random(96, 64, seed=1), random(96, 64, seed=2), random(64, 96, seed=3)

    found = kernels.gated_layer(states, kernels.pack_gates(gate, up, down, activation))

    seen, gate, up, down = (seen_by(kernels, numbers) for numbers in (states, gate, up, down))
    inner = ACTIVATIONS[activation](seen @ gate.T) * (seen @ up.T)
    assert_rounded(found, seen_by(kernels, inner) @ down.T)


def test_a_number_that_is_none_stays_in_its_row(kernels: Kernels) -> None:
    """NaN and infinity in a row leave nothing finite of its product, and no bit of another row's changes."""
    states, weight = random(40, 96), random(64, 96, seed=1)
    packed = kernels.pack_weight(weight)
    before = kernels.linear(states, packed)
    spoilt = states.clone()
    spoilt[7, 40], spoilt[21, 3] = math.nan, math.inf

    found = kernels.linear(spoilt, packed)

    assert not found[[7, 21]].isfinite().any()
    others = [row for row in range(40) if row not in (7, 21)]
    assert torch.equal(found[others], before[others])


@pytest.mark.parametrize("activation", Activation)
def test_open_gate(kernels: Kernels, activation: Activation) -> None:
    """A gate is opened number by number, with large ones, infinities and NaN as torch has them."""
    special = torch.tensor([0.0, 100.0, -100.0, 3e38, -3e38, math.inf, math.nan], dtype=torch.bfloat16)
    gate, up = torch.cat((random(1000), special)), torch.ones(1007, dtype=torch.bfloat16)
    wanted = ACTIVATIONS[activation](gate.float())

    found = kernels.open_gate(gate.clone(), up, activation)

    torch.testing.assert_close(found.float(), wanted, atol=1e-3, rtol=ROUNDING, equal_nan=True)


@pytest.mark.parametrize("kind", Norm)
@pytest.mark.parametrize("width", [16, 40, 576])
def test_rms_norm(kernels: Kernels, width: int, kind: Norm) -> None:
    """A norm is the states over their root mean square, times the weight, or one more than it."""
    states, weight = random(3, 7, width) * 5, random(width, seed=1)

    found = kernels.rms_norm(states, RmsNorm(weight, 1e-6, kind))

    factor = weight.float() + (kind == Norm.ONE_PLUS_WEIGHT)
    assert_rounded(found, states.float() * (states.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * factor)


@pytest.mark.parametrize("turned", [16, 48], ids=["part", "all"])
def test_rotate(kernels: Kernels, turned: int) -> None:
    """The first numbers of each head are turned in pairs, the rest stay bit for bit."""
    states = random(1, 33, 3, 48).transpose(1, 2)
    angles = torch.randn(33, turned // 2).repeat(1, 2)
    before = states.float().clone()

    kernels.rotate(states, angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16))

    cosines, sines = (part.to(torch.bfloat16).float() for part in (angles.cos(), angles.sin()))
    first, second = before[..., :turned].chunk(2, dim=-1)
    assert_rounded(states[..., :turned], before[..., :turned] * cosines + torch.cat((-second, first), dim=-1) * sines)
    assert torch.equal(states[..., turned:].float(), before[..., turned:])


@pytest.mark.parametrize("head_size", [16, 64, 80])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 3.0), (33, 5.0)])
def test_attend(kernels: Kernels, head_size: int, window: int | None, softcap: float | None) -> None:
    """Each strand attends causally over its pieces of the row, within its window, under its cap."""
    num_tokens, groups = 420, 3
    query = random(1, num_tokens, 2 * groups, head_size).transpose(1, 2)
    key, value = (random(1, num_tokens, 2, head_size, seed=seed).transpose(1, 2) for seed in (1, 2))
    spans = [(0, 300), (0, 41), (300, 370), (370, 371), (371, 420)]
    sequences = [(0, 300, 0, 0, 1), (300, 70, 41, 1, 2), (370, 1, 0, 3, 1), (371, 49, 0, 4, 1)]
    output = torch.zeros(1, num_tokens, 2 * groups, head_size, dtype=torch.bfloat16)

    kernels.attend(
        query, key, value, output, torch.tensor(sequences, dtype=torch.int32), torch.tensor(spans, dtype=torch.int32),
        scaling=head_size**-0.5, window=window, softcap=softcap,
    )  # fmt: skip

    for begin, num_own, num_shared, first, count in sequences:
        places = torch.cat([torch.arange(*span) for span in spans[first : first + count]])
        asking = query[0, :, begin : begin + num_own].float()
        seen, read = (states[0][:, places].float().repeat_interleave(groups, dim=0) for states in (key, value))
        scores = asking @ seen.transpose(1, 2) * head_size**-0.5
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        distance = torch.arange(num_shared, num_shared + num_own)[:, None] - torch.arange(len(places))
        hidden = (distance < 0) | (distance >= (window or 10_000))
        wanted = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ read
        found = output[0, begin : begin + num_own].transpose(0, 1).float()
        torch.testing.assert_close(found, wanted, atol=0.03, rtol=ROUNDING)


def test_a_score_that_is_no_number_is_not_hidden(kernels: Kernels) -> None:
    """NaN among the keys reaches every query that sees it, and none before it."""
    query, key, value = (random(1, 70, 1, 32, seed=seed).transpose(1, 2) for seed in range(3))
    key[0, 0, 40] = math.nan
    output = torch.zeros(1, 70, 1, 32, dtype=torch.bfloat16)

    kernels.attend(
        query, key, value, output, torch.tensor([[0, 70, 0, 0, 1]], dtype=torch.int32),
        torch.tensor([[0, 70]], dtype=torch.int32), scaling=1.0, window=None, softcap=None,
    )  # fmt: skip

    assert output[0, :40].isfinite().all()
    assert output[0, 40:].isnan().all()


def test_kernels_are_made_once(machine_kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process finds what the first one made, without a compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = locate_library(AVX512_F32)
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert locate_library(AVX512_F32) == made
    assert made.is_relative_to(tmp_path)


def test_kernels_that_came_with_the_installation_are_taken(
    machine_kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image brings kernels for all kinds of CPU, so that no compiler is needed where it runs."""
    monkeypatch.setattr(build, "BUILT", tmp_path)
    build_all(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert {locate_library(target).parent.name for target in TARGETS} == {
        f"{target.name}-{source_digest(target)}" for target in TARGETS
    }


def test_a_missing_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the reason says what to install."""
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(KernelsUnavailable, match=r"no-such-compiler.*install g\+\+"):
        compile_kernels(AVX512_F32, tmp_path)


def test_a_failing_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails is named, and nothing half-made stays."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.raises(KernelsUnavailable, match="false failed"):
        locate_library(AVX512_F32)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.float16), ("cuda", torch.bfloat16)], ids=str
)
def test_kernels_are_for_bfloat16_on_a_cpu(device: str, dtype: torch.dtype) -> None:
    """Elsewhere there are none, and a start that insists on them is refused."""
    kernels, reason = kernels_for("auto", torch.device(device), dtype)

    assert kernels is None
    assert "bfloat16 on a CPU" in reason
    with pytest.raises(SettingsError, match=r"model\.kernels is on"):
        kernels_for("on", torch.device(device), dtype)


def test_kernels_can_be_switched_off() -> None:
    """``off`` asks neither the CPU nor a compiler."""
    assert kernels_for("off", CPU, torch.bfloat16) == (None, "they are switched off")


@pytest.mark.parametrize(
    ("wide", "pairs", "tiles", "intel", "target"),
    [
        (True, False, False, True, AVX512_F32),
        (True, True, False, True, AVX512_F32),
        (True, True, True, True, AMX_BF16),
        (True, True, False, False, AVX512_BF16),
        (True, False, False, False, AVX512_F32),
    ],
)
def test_each_kind_of_cpu_has_kernels(
    monkeypatch: pytest.MonkeyPatch, wide: bool, pairs: bool, tiles: bool, intel: bool, target: Target
) -> None:
    """Tiles come first; pairs of bfloat16 are taken where they are faster than fp32, which they are not on Intel's."""
    pretend(monkeypatch, wide=wide, pairs=pairs, tiles=tiles, intel=intel)

    assert target_of_machine() is target


def test_int8_needs_vectors_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for int8, a CPU has kernels of it or none at all, whatever else it could do."""
    pretend(monkeypatch, wide=True, pairs=True, tiles=True, intel=True)
    monkeypatch.setattr(build, "has_avx512_vnni", lambda: True)

    assert target_of_machine(quantizes=True) is AVX512_VNNI

    monkeypatch.setattr(build, "has_avx512_vnni", lambda: False)
    with pytest.raises(KernelsUnavailable, match="VNNI"):
        target_of_machine(quantizes=True)


def test_a_cpu_without_wide_vectors_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without AVX-512 is told apart before anything is compiled."""
    pretend(monkeypatch, wide=False, pairs=False, tiles=False, intel=True)

    with pytest.raises(KernelsUnavailable, match="no AVX-512"):
        target_of_machine()


def pretend(monkeypatch: pytest.MonkeyPatch, *, wide: bool, pairs: bool, tiles: bool, intel: bool) -> None:
    monkeypatch.setattr(build, "has_avx512", lambda: wide)
    monkeypatch.setattr(build, "has_avx512_bf16", lambda: pairs)
    monkeypatch.setattr(build, "has_amx", lambda: tiles)
    monkeypatch.setattr(build, "is_intel", lambda: intel)
