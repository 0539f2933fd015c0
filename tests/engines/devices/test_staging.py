"""Inputs and results of a pass are copied without waiting, and unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_path import ScriptedPath
from tiny_classifiers import load_tiny, packed_path, random_rows, rows_that_share, sequences_of
from tiny_models import DECODER_FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode

from service.engines.attention import interface as attention
from service.engines.attention.layout import PackedLayout
from service.engines.base import EngineInfo, Ready, StateTap
from service.engines.devices.staging import ALIGNMENT, PlainStaging, buffer_offsets, buffer_views, staging_for
from service.engines.model.scalar_head import batch_invariant_head
from service.engines.model.taps import StateQuery
from service.engines.torch import TorchEngine
from service.errors import EngineUnavailable

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.sampled_from([torch.int64, torch.int32, torch.uint8]), st.integers(0, 40)), max_size=9))
def test_a_buffer_returns_what_was_stored(kinds: list[tuple[torch.dtype, int]]) -> None:
    """Tensors of any type and length, empty ones too, have the same values after a copy through one buffer."""
    tensors = [torch.arange(size).to(dtype) for dtype, size in kinds]
    offsets, num_bytes = buffer_offsets(tensors)
    buffer = torch.full((num_bytes,), 255, dtype=torch.uint8)

    for view, tensor in zip(buffer_views(buffer, tensors, offsets), tensors, strict=True):
        view.copy_(tensor)

    for found, tensor in zip(buffer_views(buffer, tensors, offsets), tensors, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


def test_on_a_cpu_nothing_is_copied() -> None:
    """A tensor that is already on the CPU is returned itself, in both directions."""
    tensor = torch.arange(4)

    (there,) = staging_for(CPU).to_device([tensor])
    (back,) = staging_for(CPU).to_host([there]).result()

    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("hidden", [1, 64, 96, 897])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reward_does_not_depend_on_the_number_of_rows(hidden: int, dtype: torch.dtype, num_outputs: int) -> None:
    """The head on all rows at once equals the linear layer, and each row has the bits that it has alone."""
    random = torch.Generator().manual_seed(0)
    states = torch.randn(300, hidden, generator=random).to(dtype)
    head = torch.nn.Linear(hidden, num_outputs)
    weight, bias = head.weight.detach(), head.bias.detach()

    rewards = batch_invariant_head(states, weight, bias)

    scale = (states.float().abs() @ weight.abs().T).max()
    assert (rewards - head(states.float())).abs().max() <= 1e-6 * scale
    for count in (1, 2, 17):
        assert torch.equal(batch_invariant_head(states[:count], weight, bias), rewards[:count])
    assert torch.equal(
        batch_invariant_head(states, weight, None), batch_invariant_head(states, weight, torch.zeros(num_outputs))
    )


# --- Nothing synchronizes with the device ----------------------------------------------------------------------------


class RefusesToSynchronize(TorchDispatchMode):
    """Raises where the host would have to wait for a real device, or would copy from pageable memory.

    All indexing is refused, since a list of indices becomes a tensor that is copied implicitly.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "index")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [
            value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)
        ]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == "meta"}
        assert name not in self.FORBIDDEN or devices == {"cpu"}, f"{func} synchronizes with the device"
        output = func(*args, **(kwargs or {}))
        if name in {"_to_copy", "copy_"} and isinstance(output, torch.Tensor):
            assert devices | {output.device.type} in ({"cpu"}, {"meta"}), f"{func} copies to the device synchronously"
        return output


class MetaStaging(PlainStaging):
    """The meta device instead of CUDA: tensors have shapes there, and no values are ever copied back."""

    def to_device(self, tensors: Any) -> list[torch.Tensor]:
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device) for tensor in tensors]

    def to_host(self, tensors: Any) -> Ready[list[torch.Tensor]]:
        assert all(tensor.device.type == "meta" for tensor in tensors)
        return Ready([torch.zeros(tensor.shape) for tensor in tensors])


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The meta device, with the variable-length kernel reported as available."""
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr("service.engines.paths.packed.staging_for", MetaStaging)
    monkeypatch.setattr(
        "service.engines.model.taps.copy_to_device", lambda tensor, _: torch.empty_like(tensor, device="meta")
    )
    monkeypatch.setattr(
        "service.engines.attention.per_sequence.copy_to_device",
        lambda tensor, _: torch.empty_like(tensor, device="meta"),
    )
    return torch.device("meta")


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_launch_does_not_synchronize(tiny_checkpoint, like_cuda: torch.device, family: str) -> None:
    """From the second pass on, a launch reads no device values and copies inputs through the staging alone."""
    on_cpu = load_tiny(tiny_checkpoint(family))
    rows = rows_that_share(on_cpu)
    path = packed_path(load_tiny(tiny_checkpoint(family), torch.bfloat16, device=like_cuda))
    taps = (StateTap(1, "mean"), StateTap(2, "last"))
    path._skip_mask_inference()  # in the first pass transformers would read values, which meta tensors do not have

    with RefusesToSynchronize():
        pending = path.launch(rows, StateQuery(taps, ((0, 0), (3, 5))))

    output = pending.result()
    assert len(output.rewards) == len(rows)
    assert sum(output.shared_tokens) > 0
    assert output.states is not None
    assert output.states.shape[:2] == (2, 2)


def test_synchronization_is_detected() -> None:
    """The guard of the test above raises where a device value is read, and where a list is used as an index."""
    states = torch.empty(4, 8, device="meta")

    with RefusesToSynchronize(), pytest.raises(AssertionError, match="synchronizes with the device"):
        states[[0, 3]]
    with RefusesToSynchronize(), pytest.raises(AssertionError, match="copies to the device"):
        torch.arange(3).to("meta")
    with RefusesToSynchronize(), pytest.raises(AssertionError, match="synchronizes with the device"):
        bool((states == 0).all())


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_the_empty_mask_changes_nothing(tiny_checkpoint, family: str) -> None:
    """With the empty mask, with which transformers does not read position ids, rewards are the same, bit for bit."""
    classifier = load_tiny(tiny_checkpoint(family))
    rows = rows_that_share(classifier)
    path = packed_path(classifier)
    without = path.run(rows).rewards

    path._mask = torch.empty((1, 1, 1, 0), dtype=torch.bool)

    assert path.run(rows).rewards == without


def test_attention_inputs_are_copied_with_the_other_inputs() -> None:
    """All tensors that attention reads are copied in one call with the inputs of the packed batch, unchanged."""
    calls: list[int] = []

    class Counting(PlainStaging):
        def to_device(self, tensors: Any) -> list[torch.Tensor]:
            calls.append(len(tensors))
            return [tensor.clone() for tensor in tensors]

    rows = [tuple(range(40)) + (number,) * 9 for number in range(6)]
    cut = PackedLayout.of(rows, torch.device("meta"), min_shared_tokens=8)

    staged, (ids,) = cut.to_device(Counting(CPU), [torch.arange(5)])

    assert calls == [1 + 4 * len(cut.chunks)]
    assert ids.tolist() == list(range(5))
    for there, here in zip(staged.chunks, cut.chunks, strict=True):
        assert there.sequences == here.sequences
        assert all(torch.equal(copy, own) for copy, own in zip(there.tensors, here.tensors, strict=True))


def test_a_lost_device_is_distinguished_from_a_failed_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after which the device fails at every call is EngineUnavailable; any other one is unchanged."""

    class Asserts(ScriptedPath):
        def run(self, rows, query=None, prompts=None, steps=()):
            raise RuntimeError("CUDA error: device-side assert triggered")

    info = EngineInfo("torch", "Llama", "packed", "cpu", "float32", "packed", max_input_tokens=8, max_batch_tokens=8)
    engine = TorchEngine(Asserts(), info)
    with pytest.raises(RuntimeError, match="assert"):
        engine.forward(sequences_of([(1,)]))

    monkeypatch.setattr("service.engines.torch.is_device_lost", lambda _: True)
    with pytest.raises(EngineUnavailable, match="cpu is lost"):
        engine.forward(sequences_of([(1,)]))


# --- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_launch_does_not_wait_for_a_gpu(tiny_checkpoint, family: str) -> None:
    """Torch detects no synchronization in a launch, and two passes in flight have their own rewards and states."""
    classifier = load_tiny(tiny_checkpoint(family), torch.bfloat16, device=torch.device("cuda"))
    path = packed_path(classifier)
    batches = [rows_that_share(classifier, seed) for seed in range(2)]
    query = StateQuery((StateTap(1, "mean"), StateTap(2, "last")), ((0, 0), (3, 5)))
    expected = [path.run(rows, query) for rows in batches]

    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [path.launch(rows, query) for rows in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    for waiting, expected_output in zip(pending, expected, strict=True):
        output = waiting.result()
        assert output.rewards == expected_output.rewards
        assert output.states is not None
        assert expected_output.states is not None
        assert np.array_equal(output.states, expected_output.states)


@pytest.mark.gpu
def test_many_passes_in_flight_do_not_overwrite_each_other(tiny_checkpoint) -> None:
    """Pinned memory is not reused too early: each of fifty launched passes has the rewards it has alone."""
    classifier = load_tiny(tiny_checkpoint("llama"), device=torch.device("cuda"))
    path = packed_path(classifier)
    batches = [random_rows(classifier, seed=seed) for seed in range(50)]
    expected = [path.run(rows).rewards for rows in batches]

    pending = [path.launch(rows) for rows in batches]

    assert [waiting.result().rewards for waiting in pending] == expected
