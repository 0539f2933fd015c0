"""The torch engine's plan follows from settings, machine and configuration alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.engines.plan import EnginePlan, Machine, kernel_choice, plan_engine
from service.errors import SettingsError
from service.settings import BatchingSettings, ModelSettings

CPU = Machine(torch.device("cpu"), num_threads=2, native_bfloat16=True)
CUDA = Machine(torch.device("cuda"), num_threads=2, native_bfloat16=False)


def config_with(rope_parameters: dict[str, Any] | None = None) -> SimpleNamespace:
    config = SimpleNamespace(dtype="float16", rope_parameters=rope_parameters, max_position_embeddings=8192)
    config.get_text_config = lambda: config
    return config


def plan(machine: Machine, batching: BatchingSettings | None = None, config: Any = None, **model: Any) -> EnginePlan:
    settings = ModelSettings.model_validate(model)
    return plan_engine(
        settings,
        batching or BatchingSettings(),
        machine,
        config or config_with(),
        pad_token_id=0,
        max_input_tokens=8192,
    )


def test_defaults_depend_on_the_device() -> None:
    """A CPU with native bfloat16 computes in it with a prefix cache; CUDA has the stored dtype and no cache."""
    on_cpu, on_cuda = plan(CPU), plan(CUDA)

    assert (on_cpu.dtype, on_cuda.dtype) == (torch.bfloat16, torch.float16)
    assert (on_cpu.fastest_path.cache_bytes, on_cuda.fastest_path.cache_bytes) == (512 * 2**20, 0)
    assert (on_cpu.batch_tokens_on(None), on_cuda.batch_tokens_on(None)) == (2048, 65_536)


@pytest.mark.parametrize("batching", [BatchingSettings(deterministic=True), BatchingSettings(share_prefixes=False)])
def test_without_shared_prefixes_there_is_no_cache(batching: BatchingSettings) -> None:
    """Determinism and the setting exclude shared prefixes, and with them the prefix cache and cascade attention."""
    (packed, padded) = plan(CPU, batching).candidates(None)

    assert (packed.share_prefixes, packed.cache_bytes, packed.cascade) == (False, 0, False)
    assert padded.name == "padded"


def test_int8_implies_bfloat16_and_the_kernels() -> None:
    """With int8 and ``auto`` the activations are bfloat16 on any CPU, and the CPU kernels are required."""
    found = plan(Machine(torch.device("cpu"), 2, native_bfloat16=False), quantization="int8")

    assert (found.dtype, found.kernels) == (torch.bfloat16, "int8")


@pytest.mark.parametrize(
    ("model", "expected"),
    [({}, "auto"), ({"kernels": "on"}, "on"), ({"kernels": "off"}, "off"), ({"compile": True}, "off")],
    ids=str,
)
def test_kernels_are_excluded_by_compiled_blocks(model: dict[str, Any], expected: str) -> None:
    """The CPU kernels are used as the setting requires, and never in compiled blocks."""
    assert kernel_choice(ModelSettings.model_validate(model)) == expected


@pytest.mark.parametrize(
    ("machine", "model", "words"),
    [
        (CPU, {}, "bfloat16 on cpu (model.dtype is auto, and this CPU multiplies bfloat16 natively), with"),
        (CPU, {"dtype": "float32"}, "float32 on cpu (model.dtype is float32), with torch's own operations, without"),
        (CPU, {"quantization": "int8"}, "bfloat16 on cpu (int8 has states in bfloat16), with"),
        (CUDA, {}, "float16 on cuda (model.dtype is auto: as the checkpoint), with torch's own operations."),
    ],
    ids=["auto", "chosen", "int8", "cuda"],
)  # fmt: skip
def test_what_passes_run_on_is_explained(machine: Machine, model: dict[str, Any], words: str) -> None:
    """The log's sentence has dtype and operations, each with its reason."""
    assert plan(machine, **model).explain(None, "no compiler").startswith(f"Passes compute {words}")


def test_rotary_scaling_limits_what_shares_a_pass() -> None:
    """The plan has the length up to which sequences share a pass, which bounds the probes too."""
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}

    assert plan(CPU, config=config_with(longrope)).max_shared_pass_tokens == 4096
    assert plan(CPU).max_shared_pass_tokens == 8192


@pytest.mark.parametrize(
    ("batching", "model", "name"),
    [
        ({"deterministic": True}, {}, "batching.deterministic"),
        ({}, {"cascade_attention": True}, "model.cascade_attention"),
        ({}, {"compile": True}, "model.compile"),
        ({}, {"quantization": "fp8"}, "model.quantization fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_batch_invariance_is_refused(batching: Any, model: Any, name: str) -> None:
    """A setting under which a reward's bits could depend on the batch fails the plan, with its name and the reason."""
    with pytest.raises(SettingsError, match=rf"batching\.batch_invariant and {name}, which .*: choose one"):
        plan(CUDA, BatchingSettings(batch_invariant=True, **batching), **model)


def test_batch_invariance_reaches_every_path() -> None:
    """Also a padded one; CUDA graphs, shared prefixes and int8 may be combined with it."""
    batching = BatchingSettings(batch_invariant=True)
    found = plan(CUDA, batching, cuda_graphs=True)

    assert found.batch_invariant
    assert all(spec.batch_invariant for spec in found.candidates(None))
    assert found.fastest_path.share_prefixes
    assert plan(CPU, batching, quantization="int8").quantization == "int8"
    assert not any(spec.batch_invariant for spec in plan(CUDA).candidates(None))


def test_a_cuda_option_on_a_cpu_is_refused() -> None:
    """Cascade attention and CUDA graphs fail the plan of a CPU with an error that names the setting."""
    with pytest.raises(SettingsError, match=r"model\.cascade_attention"):
        plan(CPU, cascade_attention=True)
    with pytest.raises(SettingsError, match=r"model\.cuda_graphs"):
        plan(CPU, cuda_graphs=True)
