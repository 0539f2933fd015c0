"""How the torch engine will run: settings, machine and model configuration resolved into one frozen plan.

Pure: what the machine offers is passed in, and nothing is loaded. The parity probe chooses among the plan's forward
paths afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from service.engines.base import StateTap
from service.engines.devices.device import has_native_bfloat16, resolve_device, resolve_dtype, resolve_threads
from service.engines.kernels.bindings import Kernels
from service.engines.model.classifier import stored_dtype
from service.engines.model.rotary import rope_length_limit
from service.engines.paths.base import PathChoice, PathSpec, candidate_paths
from service.engines.paths.cuda_graphs import GraphChoice, resolve_graphs
from service.errors import SettingsError
from service.records import Pooling
from service.settings import BatchingSettings, ModelSettings

BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Default batch budget: enough to keep the device busy; with more, the next request would only wait longer."""

AMX_BATCH_TOKENS = 4096
"""The same on CPU kernels with AMX: such a pass takes no longer than one over half as many tokens without."""

PREFIX_CACHE_MIB = {"cpu": 512, "cuda": 0}
"""Default size of the prefix cache. On a CPU a cached prefix cannot change a bit of a reward, and memory is allocated
as prompts arrive; on CUDA nothing was measured yet."""

KernelChoice: TypeAlias = Literal["off", "auto", "on", "int8"]
"""Whether the CPU kernels are used: never, where available, or required (as for int8)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The properties of the machine that determine how the engine runs."""

    device: torch.device
    """Where the forward pass runs."""

    num_threads: int
    """CPU threads of the forward pass."""

    native_bfloat16: bool
    """Whether the CPU multiplies bfloat16 in hardware."""

    @classmethod
    def detect(cls, model: ModelSettings) -> Machine:
        """Return this machine, with the device and the threads that the settings choose.

        Raises:
            SettingsError: the name is no device, or this machine lacks it.
        """
        return cls(resolve_device(model.device), resolve_threads(model.num_threads), has_native_bfloat16())


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """How the torch engine will run."""

    device: torch.device
    """Where the forward pass runs."""

    num_threads: int
    """CPU threads of the forward pass."""

    dtype: torch.dtype
    """The dtype of the model's body."""

    dtype_reason: str
    """Why this dtype, in a few words."""

    pooling: Pooling
    """Which token's state the head reads."""

    pad_token_id: int | None
    """The checkpoint's pad token, which pooling depends on."""

    quantization: Literal["none", "fp8", "int8"]
    """The format in which linear layers multiply."""

    forward: PathChoice
    """Which forward paths are allowed."""

    fastest_path: PathSpec
    """A packed path with all optimisations that are allowed, without the CPU kernels."""

    kernels: KernelChoice
    """Whether packed paths run on the CPU kernels."""

    cuda_graphs: GraphChoice
    """Whether short batches are replayed from CUDA graphs; ``auto`` depends on the size of the model."""

    deterministic: bool
    """Whether every sequence runs in a pass of its own."""

    batch_invariant: bool
    """Whether rewards of batches are checked, at the start, not to depend on the batch by a bit."""

    rope_length_limit: int | None
    """Sequences longer than this have other rotary frequencies than shorter ones; None: all have the same."""

    max_input_tokens: int
    """Tokens of the longest sequence that is scored."""

    max_batch_tokens: int | None
    """Batch budget in tokens; None: the default of the path that serves."""

    taps: tuple[StateTap, ...]
    """Where hidden states can be read."""

    @property
    def max_shared_pass_tokens(self) -> int:
        """Tokens of the longest sequence that may share a pass with any other."""
        return self.rope_length_limit or self.max_input_tokens

    def candidates(self, kernels: Kernels | None) -> list[PathSpec]:
        """Return the forward paths to try, fastest first, on these kernels and without them."""
        return candidate_paths(self.forward, replace(self.fastest_path, kernels=kernels))

    def explain(self, kernels: Kernels | None, reason: str) -> str:
        """Return what passes run on and why, in one sentence; ``reason``: why there are no kernels."""
        dtype = str(self.dtype).removeprefix("torch.")
        if kernels is not None:
            operations = f"on the compiled CPU kernels for {kernels.name}"
        elif self.device.type == "cpu":
            operations = f"with torch's own operations, without the CPU kernels: {reason}"
        else:
            operations = "with torch's own operations"
        return f"Passes compute {dtype} on {self.device} ({self.dtype_reason}), {operations}."

    def batch_tokens_on(self, kernels: Kernels | None) -> int:
        """Return the batch budget of a path that runs on these kernels."""
        return self.max_batch_tokens or default_batch_tokens(self.device, kernels)


def plan_engine(
    model: ModelSettings,
    batching: BatchingSettings,
    machine: Machine,
    config: Any,
    *,
    pad_token_id: int | None,
    max_input_tokens: int,
    taps: Sequence[StateTap] = (),
) -> EnginePlan:
    """Resolve the settings against the machine and the model's configuration.

    Args:
        model: device, dtype, pooling, forward path and optimisations.
        batching: budget, determinism and prefix sharing.
        machine: with the device that the settings name.
        config: the transformers configuration of the checkpoint.
        pad_token_id: the checkpoint's own.
        max_input_tokens: longest sequence that will be scored.
        taps: where states can be read.

    Raises:
        SettingsError: settings contradict each other, the machine or the model.
    """
    device = machine.device
    resolve_graphs(model.cuda_graphs, device, num_parameters=0, deterministic=batching.deterministic)
    if model.cascade_attention and device.type != "cuda":
        raise SettingsError(f"model.cascade_attention needs a CUDA device and model.device is {device}: leave it out")
    check_batch_invariance(model, batching)
    dtype_choice = "bfloat16" if model.quantization == "int8" and model.dtype == "auto" else model.dtype
    return EnginePlan(
        device=device,
        num_threads=machine.num_threads,
        dtype=resolve_dtype(dtype_choice, stored_dtype(config), device, native_bfloat16=machine.native_bfloat16),
        dtype_reason=dtype_reason(model, machine),
        pooling=model.pooling or "hf",
        pad_token_id=pad_token_id,
        quantization=model.quantization,
        forward=model.forward,
        fastest_path=fastest_path(model, batching, device),
        kernels=kernel_choice(model),
        cuda_graphs=model.cuda_graphs,
        deterministic=batching.deterministic,
        batch_invariant=batching.batch_invariant,
        rope_length_limit=rope_length_limit(config.get_text_config(), max_input_tokens),
        max_input_tokens=max_input_tokens,
        max_batch_tokens=batching.max_batch_tokens,
        taps=tuple(taps),
    )


def dtype_reason(model: ModelSettings, machine: Machine) -> str:
    """Return why the model's body has its dtype, in a few words."""
    if model.dtype != "auto":
        return f"model.dtype is {model.dtype}"
    if model.quantization == "int8":
        return "int8 has states in bfloat16"
    if machine.device.type == "cuda":
        return "model.dtype is auto: as the checkpoint"
    native = "multiplies bfloat16 natively" if machine.native_bfloat16 else "does not multiply bfloat16 natively"
    return f"model.dtype is auto, and this CPU {native}"


def fastest_path(model: ModelSettings, batching: BatchingSettings, device: torch.device) -> PathSpec:
    """Return the packed path with all optimisations that the settings allow, without the CPU kernels.

    Determinism excludes shared prefixes, and without shared prefixes there is no prefix cache and no cascade attention.
    """
    share_prefixes = batching.share_prefixes and not batching.deterministic
    cache_mib = PREFIX_CACHE_MIB[device.type] if batching.prefix_cache_mib is None else batching.prefix_cache_mib
    return PathSpec(
        "packed",
        share_prefixes=share_prefixes,
        cache_bytes=cache_mib * 2**20 if share_prefixes else 0,
        compiled=model.compile,
        cascade=model.cascade_attention and share_prefixes,
        batch_invariant=batching.batch_invariant,
    )


def check_batch_invariance(model: ModelSettings, batching: BatchingSettings) -> None:
    """Check that no setting contradicts batch-invariant rewards, where these are requested.

    Raises:
        SettingsError: one does; the message says why.
    """
    if not batching.batch_invariant:
        return
    reasons = {
        "batching.deterministic": (batching.deterministic, "gives the same with a pass for each sequence"),
        "model.cascade_attention": (
            model.cascade_attention,
            "adds in an order that depends on which prefixes are shared",
        ),
        "model.compile": (model.compile, "lets the compiler choose the order of the additions in norms"),
        "model.quantization fp8": (model.quantization == "fp8", "multiplies by kernels that are chosen by the batch"),
    }
    for name, (is_set, reason) in reasons.items():
        if is_set:
            raise SettingsError(
                f"batching.batch_invariant and {name}, which {reason}, contradict each other: choose one"
            )


def kernel_choice(model: ModelSettings) -> KernelChoice:
    """Return whether packed paths run on the CPU kernels, which run neither in compiled blocks nor in padded batches.

    Raises:
        SettingsError: a setting requires the kernels and another one excludes them.
    """
    is_excluded = model.compile or model.forward == "padded"
    if model.quantization == "int8":
        if is_excluded or model.kernels == "off":
            raise SettingsError(
                "model.quantization is int8, which runs on the CPU kernels alone: they run neither in compiled blocks "
                "nor in padded batches, and must not be off"
            )
        return "int8"
    if is_excluded and model.kernels == "on":
        raise SettingsError("model.kernels is on, but compiled blocks and padded batches do not run on them")
    return "off" if is_excluded else model.kernels


def default_batch_tokens(device: torch.device, kernels: Kernels | None) -> int:
    """Return the default batch budget in tokens of a path on this device and these kernels."""
    return AMX_BATCH_TOKENS if kernels is not None and kernels.has_amx else BATCH_TOKENS[device.type]
