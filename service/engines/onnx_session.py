"""ONNX Runtime's sessions: on the requested device without fallback, with options for one engine thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.errors import SettingsError


def open_session(graph: Path, device: str, num_threads: int | None) -> Any:
    """Return ONNX Runtime's session on the device, without fallback to another device.

    Raises:
        SettingsError: ONNX Runtime cannot run there, or cannot read the graph.
    """
    import onnxruntime

    providers = requested_providers(device)
    missing = [name for name, _ in providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise SettingsError(
            f"model.device is {device}, but the installed ONNX Runtime has no {missing[0]}: install onnxruntime-gpu "
            "instead of onnxruntime, or set model.device to cpu."
        )
    if device != "cpu":
        onnxruntime.preload_dlls()  # those that torch contains; otherwise the provider would not load
    try:
        session = onnxruntime.InferenceSession(graph, session_options(num_threads), providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        if is_out_of_memory(error):
            raise
        raise SettingsError(
            f"ONNX Runtime cannot load {graph} on {device} ({type(error).__name__}: {error})"
        ) from error
    refuse_missing_provider(device, session.get_providers())
    return session


def refuse_missing_provider(device: str, active: Sequence[str]) -> None:
    """Verify that the session runs on the requested device.

    Raises:
        SettingsError: ONNX Runtime fell back to the CPU, which it reports in its log only.
    """
    requested = requested_providers(device)[0][0]
    if requested not in active:
        raise SettingsError(
            f"model.device is {device}, but ONNX Runtime could not start its {requested} and would run on "
            f"{', '.join(active) or 'nothing'}: install the CUDA and cuDNN that it was built for, or set model.device "
            "to cpu."
        )


def requested_providers(device: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return ONNX Runtime's providers for a device, with their options; the CPU's runs small shape operations."""
    cpu: tuple[str, Mapping[str, Any]] = ("CPUExecutionProvider", {})
    if device == "cpu":
        return [cpu]
    # Memory is allocated as it is needed, not in powers of two: the largest batch is tried at start.
    options = {"device_id": int(device.partition(":")[2] or 0), "arena_extend_strategy": "kSameAsRequested"}
    return [("CUDAExecutionProvider", options), cpu]


def session_options(num_threads: int | None) -> Any:
    """Return ONNX Runtime's options for one engine thread, batches of changing shapes, and a busy Python process."""
    import onnxruntime

    from service.engines.devices.device import multiplies_int8_exactly, resolve_threads

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = resolve_threads(num_threads)
    # The graph is a chain: it has no branches worth running in parallel.
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    # Spinning threads would take cores from tokenization and the event loop of the same process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Memory plans are made per shape, and shapes hardly repeat. The arena is used: new pages cost more than they save.
    options.enable_mem_pattern = False
    if not multiplies_int8_exactly():
        # ONNX Runtime then multiplies uint8 by uint8, which is slower and does not saturate.
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    return options


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that the device is out of memory; ONNX Runtime has no exception class for it."""
    if isinstance(error, MemoryError):
        return True
    signs = ("Failed to allocate memory", "bad allocation", "bad_alloc", "CUDA out of memory", "out of memory")
    return any(sign in str(error) for sign in signs)
