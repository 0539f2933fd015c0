"""The CPU kernels give the results of torch's fp32 operations, rounded once, and are found, compiled or refused."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import gelu, silu

from service.engines.kernels import abi, build
from service.engines.kernels.bindings import Activation, Kernels, Norm, PanelFormat, RmsNorm
from service.engines.kernels.build import (
    AMX_BF16,
    AVX2_F32,
    AVX512_BF16,
    AVX512_F32,
    AVX512_FLOAT,
    AVX512_VNNI,
    TARGETS,
    Arithmetic,
    KernelsUnavailable,
    Target,
    build_all,
    compile_kernels,
    locate_library,
    source_digest,
    target_of_machine,
)
from service.engines.kernels.choice import kernels_for
from service.engines.linear.int8 import fake_quantize
from service.errors import SettingsError

CPU = torch.device("cpu")
ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-17}
"""Relative to the largest magnitude: one unit of bfloat16's last place, and what another order of additions changes."""

ACTIVATIONS = {Activation.SILU: silu, Activation.GELU_TANH: lambda states: gelu(states, approximate="tanh")}


def random(kernels: Kernels, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kernels.dtype)


def operands(kernels: Kernels, elements: torch.Tensor) -> torch.Tensor:
    """Return weights or states as the kernels' products read them, in fp32."""
    return fake_quantize(elements) if kernels.is_int8 else elements.float()


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that results are the fp32 ones up to rounding to their dtype."""
    rounding = ROUNDING[found.dtype]
    torch.testing.assert_close(found.float(), expected, atol=rounding * float(expected.abs().max()), rtol=rounding)


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 32, 1), (5, 96, 64), (33, 64, 96), (300, 1536, 80)])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_linear(kernels: Kernels, rows: int, width: int, outputs: int, bias: bool) -> None:
    """A packed product is the linear layer, also for numbers of rows and outputs that fill no tile."""
    states, weight = random(kernels, 2, rows, width), random(kernels, outputs, width, seed=1)
    added = random(kernels, outputs, seed=2) if bias else None

    found = kernels.linear(states, kernels.pack_weight(weight, added))

    expected = torch.nn.functional.linear(operands(kernels, states), operands(kernels, weight))
    assert_rounded(found, expected if added is None else expected + added.float())


def test_bfloat16_panels_lose_no_bit(kernels: Kernels) -> None:
    """fp32 weights that bfloat16 represents are stored in it, and give the same bits as their fp32 panels."""
    if kernels.dtype != torch.float32:
        pytest.skip("these kernels have bfloat16 weights")
    weight = random(kernels, 64, 96, seed=1).bfloat16().float()
    states, full = random(kernels, 50, 96), torch.cat((weight, torch.full((1, 96), 0.1)))

    narrow, wide = kernels.pack_weight(weight), kernels.pack_weight(full)

    assert (narrow.format, wide.format) == (PanelFormat.AS_BF16, PanelFormat.NATIVE)
    assert narrow.panels.numel() == weight.numel() * 2
    assert torch.equal(kernels.linear(states, narrow), kernels.linear(states, wide)[:, :64])


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_gated_mlp(kernels: Kernels, rows: int, activation: Activation) -> None:
    """A gated feed-forward layer is down(act(gate) * up), for any number of rows."""
    states, down = random(kernels, rows, 64), random(kernels, 64, 96, seed=3)
    gate, up = (random(kernels, 96, 64, seed=seed) for seed in (1, 2))

    found = kernels.gated_mlp(states, kernels.pack_gated_mlp(gate, up, down, activation))

    states, gate, up, down = (operands(kernels, elements) for elements in (states, gate, up, down))
    inner = ACTIVATIONS[activation](states @ gate.T) * (states @ up.T)
    assert_rounded(found, operands(kernels, inner) @ down.T)


@pytest.mark.parametrize("rows", [1, 6, 33, 192, 193, 700])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_the_second_half_of_a_block(kernels: Kernels, rows: int, bias: bool) -> None:
    """It adds output projection and feed-forward layer to the states, with the same bits for 1 to 5 threads.

    For few rows the threads divide the columns of the weights, which have no whole number of panels for each here.
    """
    width, heads, inner = 96, 64, 160
    states, attended = random(kernels, rows, width), random(kernels, rows, heads, seed=1)
    weight, added = random(kernels, width, heads, seed=2), random(kernels, width, seed=3) if bias else None
    gate, up, down = (random(kernels, *shape, seed=4) for shape in ((inner, width), (inner, width), (width, inner)))
    norm = RmsNorm(random(kernels, width, seed=5), 1e-6, Norm.ROUND_AFTER_WEIGHT)
    packed = kernels.pack_weight(weight, added), norm, kernels.pack_gated_mlp(gate, up, down, Activation.SILU)

    found = []
    for num_threads in range(1, 6):
        torch.set_num_threads(num_threads)
        found.append(states.clone())
        kernels.attn_out_mlp(found[-1], attended, *packed)

    assert all(torch.equal(found[0], other) for other in found[1:])
    residual = states.float() + operands(kernels, attended) @ operands(kernels, weight).T
    residual = (residual if added is None else residual + added.float()).to(kernels.dtype)
    normalized = operands(kernels, kernels.rms_norm(residual, norm))
    inner_states = silu(normalized @ operands(kernels, gate).T) * (normalized @ operands(kernels, up).T)
    expected = residual.float() + operands(kernels, inner_states) @ operands(kernels, down).T
    torch.testing.assert_close(found[0].float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_nan_and_infinity_do_not_leave_their_row(kernels: Kernels) -> None:
    """NaN or infinity in a row makes its whole product not finite and changes no bit of another row."""
    states, weight = random(kernels, 40, 96), random(kernels, 64, 96, seed=1)
    packed = kernels.pack_weight(weight)
    before = kernels.linear(states, packed)
    corrupted = states.clone()
    corrupted[7, 40], corrupted[21, 3] = math.nan, math.inf

    found = kernels.linear(corrupted, packed)

    assert not found[[7, 21]].isfinite().any()
    others = [row for row in range(40) if row not in (7, 21)]
    assert torch.equal(found[others], before[others])


@pytest.mark.parametrize("activation", Activation)
def test_act_and_mul(kernels: Kernels, activation: Activation) -> None:
    """Activation and multiplication give torch's results, also for large values, infinities and NaN."""
    special = torch.tensor([0.0, 100.0, -100.0, 3e38, -3e38, math.inf, math.nan], dtype=kernels.dtype)
    gate, up = torch.cat((random(kernels, 1000), special)), torch.ones(1007, dtype=kernels.dtype)
    expected = ACTIVATIONS[activation](gate.float())

    found = kernels.act_and_mul(gate.clone(), up, activation)

    rounding = ROUNDING[kernels.dtype]
    torch.testing.assert_close(found.float(), expected, atol=rounding / 8, rtol=rounding, equal_nan=True)


@pytest.mark.parametrize("kind", Norm)
@pytest.mark.parametrize("width", [16, 40, 576])
def test_rms_norm(kernels: Kernels, width: int, kind: Norm) -> None:
    """A norm is the states over their root mean square, times the weight or one plus the weight."""
    states, weight = random(kernels, 3, 7, width) * 5, random(kernels, width, seed=1)

    found = kernels.rms_norm(states, RmsNorm(weight, 1e-6, kind))

    factor = weight.float() + (kind == Norm.ONE_PLUS_WEIGHT)
    assert_rounded(found, states.float() * (states.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * factor)


@pytest.mark.parametrize("rotary_size", [16, 48], ids=["part", "all"])
def test_apply_rope(kernels: Kernels, rotary_size: int) -> None:
    """The first elements of each head are rotated in pairs, the rest stay bit for bit."""
    states = random(kernels, 1, 33, 3, 48).transpose(1, 2)
    angles = torch.randn(33, rotary_size // 2).repeat(1, 2)
    before = states.float().clone()

    kernels.apply_rope(states, angles.cos().to(kernels.dtype), angles.sin().to(kernels.dtype))

    cosines, sines = (part.to(kernels.dtype).float() for part in (angles.cos(), angles.sin()))
    first, second = before[..., :rotary_size].chunk(2, dim=-1)
    assert_rounded(
        states[..., :rotary_size], before[..., :rotary_size] * cosines + torch.cat((-second, first), dim=-1) * sines
    )
    assert torch.equal(states[..., rotary_size:].float(), before[..., rotary_size:])


@pytest.mark.parametrize("head_size", [16, 64, 80])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 3.0), (33, 5.0)])
def test_attention(kernels: Kernels, head_size: int, window: int | None, softcap: float | None) -> None:
    """Each sequence attends causally to its spans of the packed batch, within its window and with its soft cap."""
    num_tokens, groups = 420, 3
    query = random(kernels, 1, num_tokens, 2 * groups, head_size).transpose(1, 2)
    key, value = (random(kernels, 1, num_tokens, 2, head_size, seed=seed).transpose(1, 2) for seed in (1, 2))
    spans = [(0, 300), (0, 41), (300, 370), (370, 371), (371, 420)]
    sequences = [(0, 300, 0, 0, 1), (300, 70, 41, 1, 2), (370, 1, 0, 3, 1), (371, 49, 0, 4, 1)]
    output = torch.zeros(1, num_tokens, 2 * groups, head_size, dtype=kernels.dtype)

    kernels.attention(
        query, key, value, output, torch.tensor(sequences, dtype=torch.int32), torch.tensor(spans, dtype=torch.int32),
        scaling=head_size**-0.5, window=window, softcap=softcap,
    )  # fmt: skip

    for begin, num_own, num_shared, first, count in sequences:
        keys = torch.cat([torch.arange(*span) for span in spans[first : first + count]])
        queries = query[0, :, begin : begin + num_own].float()
        spanned_keys, spanned_values = (
            states[0][:, keys].float().repeat_interleave(groups, dim=0) for states in (key, value)
        )
        scores = queries @ spanned_keys.transpose(1, 2) * head_size**-0.5
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        distance = torch.arange(num_shared, num_shared + num_own)[:, None] - torch.arange(len(keys))
        masked = (distance < 0) | (distance >= (window or 10_000))
        expected = torch.softmax(scores.masked_fill(masked, -math.inf), dim=-1) @ spanned_values
        found = output[0, begin : begin + num_own].transpose(0, 1).float()
        rounding = ROUNDING[kernels.dtype]
        torch.testing.assert_close(found, expected, atol=4 * rounding, rtol=rounding)


def test_a_nan_score_is_not_masked(kernels: Kernels) -> None:
    """NaN in a key reaches every query that attends to it, and no query before it."""
    query, key, value = (random(kernels, 1, 70, 1, 32, seed=seed).transpose(1, 2) for seed in range(3))
    key[0, 0, 40] = math.nan
    output = torch.zeros(1, 70, 1, 32, dtype=kernels.dtype)

    kernels.attention(
        query, key, value, output, torch.tensor([[0, 70, 0, 0, 1]], dtype=torch.int32),
        torch.tensor([[0, 70]], dtype=torch.int32), scaling=1.0, window=None, softcap=None,
    )  # fmt: skip

    assert output[0, :40].isfinite().all()
    assert output[0, 40:].isnan().all()


def test_an_argument_struct_of_another_size_is_refused(
    machine_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library whose argument struct differs from the binding's is not loaded, and the error names the struct."""

    class LongerArgs(abi.AttentionArgs):
        _fields_: ClassVar = [("added", ctypes.c_int64)]

    LongerArgs.__name__ = "AttentionArgs"
    monkeypatch.setitem(abi.KERNEL_ARGS, "attention", LongerArgs)

    with pytest.raises(RuntimeError, match="declare AttentionArgs with"):
        Kernels(ctypes.CDLL(str(locate_library(AVX512_F32))), AVX512_F32)


def test_kernels_are_compiled_once(machine_kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process loads the library that the first one compiled, without a compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = locate_library(AVX512_F32)
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert locate_library(AVX512_F32) == compiled
    assert compiled.is_relative_to(tmp_path)


@pytest.mark.slow
def test_installed_kernels_are_preferred(
    machine_kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image contains the kernels of all targets, so that it needs no compiler at run time."""
    monkeypatch.setattr(build, "BUILT", tmp_path)
    build_all(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert {locate_library(target).parent.name for target in TARGETS} == {
        f"{target.name}-{source_digest(target)}" for target in TARGETS
    }


def test_a_missing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the reason names what to install."""
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(KernelsUnavailable, match=r"no-such-compiler.*install g\+\+"):
        compile_kernels(AVX512_F32, tmp_path)


def test_a_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails is named, and no partial output remains."""
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.raises(KernelsUnavailable, match="false failed"):
        locate_library(AVX512_F32)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float16), ("cuda", torch.float32), ("cuda", torch.bfloat16)], ids=str
)
def test_kernels_need_a_cpu_and_one_of_two_dtypes(device: str, dtype: torch.dtype) -> None:
    """For other devices and dtypes there are no kernels, and ``on`` refuses the start."""
    kernels, reason = kernels_for("auto", torch.device(device), dtype)

    assert kernels is None
    assert "bfloat16 and float32 on a CPU" in reason
    with pytest.raises(SettingsError, match=r"model\.kernels is on"):
        kernels_for("on", torch.device(device), dtype)


def test_kernels_can_be_switched_off() -> None:
    """``off`` checks neither the CPU nor the compiler."""
    assert kernels_for("off", CPU, torch.bfloat16) == (None, "they are switched off")


@pytest.mark.parametrize(
    ("features", "arithmetic", "target"),
    [
        ({"avx512", "intel"}, "bfloat16", AVX512_F32),
        ({"avx512", "avx512_bf16", "intel"}, "bfloat16", AVX512_F32),
        ({"avx512", "avx512_bf16", "amx", "intel"}, "bfloat16", AMX_BF16),
        ({"avx512", "avx512_bf16"}, "bfloat16", AVX512_BF16),
        ({"avx512"}, "bfloat16", AVX512_F32),
        ({"avx512", "avx512_vnni", "amx"}, "int8", AVX512_VNNI),
        ({"intel"}, "float32", AVX2_F32),
        ({"avx512", "intel"}, "float32", AVX512_FLOAT),
        ({"avx512", "avx512_bf16"}, "float32", AVX512_FLOAT),
        (set(), "float32", AVX2_F32),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else None,
)
def test_target_of_each_kind_of_cpu(
    monkeypatch: pytest.MonkeyPatch, features: set[str], arithmetic: Arithmetic, target: Target
) -> None:
    """AMX comes first; bfloat16 pairs are used where they are faster than fp32, which excludes Intel CPUs."""
    simulate_cpu(monkeypatch, {"avx2", *features})

    assert target_of_machine(arithmetic) is target


@pytest.mark.parametrize(
    ("features", "arithmetic", "reason"),
    [
        ({"avx2"}, "bfloat16", "no AVX-512"),
        ({"avx2"}, "int8", "no AVX-512"),
        ({"avx2", "avx512", "avx512_bf16", "amx"}, "int8", "no AVX-512 VNNI"),
        (set(), "float32", "neither AVX-512 nor AVX2"),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else None,
)
def test_a_cpu_without_the_instructions_has_no_kernels(
    monkeypatch: pytest.MonkeyPatch, features: set[str], arithmetic: Arithmetic, reason: str
) -> None:
    """A CPU that lacks an instruction set is refused before anything is compiled, with the reason."""
    simulate_cpu(monkeypatch, features)

    with pytest.raises(KernelsUnavailable, match=reason):
        target_of_machine(arithmetic)


def simulate_cpu(monkeypatch: pytest.MonkeyPatch, features: set[str]) -> None:
    for feature in ("avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx"):
        monkeypatch.setattr(build, f"has_{feature}", lambda feature=feature: feature in features)
    monkeypatch.setattr(build, "is_intel", lambda: "intel" in features)
