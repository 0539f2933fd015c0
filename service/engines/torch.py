"""The torch engine: a transformers classifier on one device, run by the forward path that the parity probe chose.

It decides what shares a pass and translates a lack of memory; how a pass runs is the path's, what a batch holds the
queue's.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import asdict
from pathlib import Path

import torch

from service.engines.base import EngineInfo, EngineOutput
from service.engines.classifier import Classifier, ForwardPath, load_classifier, read_config, stored_dtype
from service.engines.device import (
    is_out_of_memory,
    keep_freed_memory,
    release_memory,
    resolve_device,
    resolve_dtype,
    resolve_threads,
)
from service.engines.parity import Parity, choose_path
from service.engines.rotary import length_border
from service.errors import EngineOutOfMemory
from service.records import Sequence
from service.settings import BatchingSettings, ModelSettings

DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Enough to keep the device busy; more would only make the next request wait longer."""


class TorchEngine:
    """An Engine over transformers.

    Equal sequences of a batch are computed once, so their rewards are equal bit for bit. ``deterministic`` gives every
    sequence a pass of its own: no neighbour can change a bit of its reward. ``border``: sequences up to that many
    tokens and longer ones never share a pass; None: all may.
    """

    def __init__(
        self, path: ForwardPath, info: EngineInfo, *, deterministic: bool = False, border: int | None = None
    ) -> None:
        self._path: ForwardPath | None = path
        self._info = info
        self._deterministic = deterministic
        self._border = border

    @property
    def info(self) -> EngineInfo:
        """How this engine computes rewards; constant after construction."""
        return self._info

    def forward(self, sequences: Row[Sequence]) -> EngineOutput:
        """Score the sequences; see ``Engine.forward``.

        Raises:
            EngineOutOfMemory: the device had no room; the engine is usable again, a smaller batch may fit.
            ValueError: a sequence has no tokens.
        """
        rewards: dict[tuple[int, ...], float] = {}
        for rows in self._passes(list(dict.fromkeys(sequence.token_ids for sequence in sequences))):
            rewards.update(zip(rows, self._run(rows), strict=True))
        return EngineOutput([rewards[sequence.token_ids] for sequence in sequences])

    def close(self) -> None:
        """Free the device's memory. The engine is not used afterwards."""
        self._path = None
        release_memory(torch.device(self._info.device))

    def _passes(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Share the rows out over as few passes as keep them from changing each other."""
        if self._deterministic:
            return [[row] for row in rows]
        if self._border is None:
            return [rows]
        short = [row for row in rows if len(row) <= self._border]
        long = [row for row in rows if len(row) > self._border]
        return [part for part in (short, long) if part]

    def _run(self, rows: list[tuple[int, ...]]) -> list[float]:
        if self._path is None:
            raise RuntimeError("The engine is closed")
        try:
            return self._path.rewards(rows)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except clause the traceback no longer holds the tensors of the failed pass.
        release_memory(torch.device(self._info.device))
        raise EngineOutOfMemory(
            f"{len(rows)} sequences with {sum(map(len, rows))} tokens do not fit into the memory of {self._info.device}"
        )


def load_torch_engine(
    folder: Path, model: ModelSettings, batching: BatchingSettings, *, pad_token_id: int | None, max_input_tokens: int
) -> TorchEngine:
    """Load a judged checkpoint folder and return an engine whose rewards were compared with plain transformers.

    Args:
        folder: weights (safetensors) and configuration.
        model: device, arithmetic, pooling, forward path and threads; the rest is not read.
        batching: budget and determinism.
        pad_token_id: the checkpoint's own, which decides what the head reads.
        max_input_tokens: longest sequence that will be scored.

    Raises:
        ParityError: no forward path agrees with plain transformers.
        SettingsError: a setting does not fit this machine or this model.
    """
    device = resolve_device(model.device)
    if device.type == "cpu":
        keep_freed_memory()
    max_batch_tokens = batching.max_batch_tokens or DEFAULT_BATCH_TOKENS[device.type]
    torch.set_num_threads(resolve_threads(model.num_threads))
    config = read_config(folder)
    border = length_border(config.get_text_config(), max_input_tokens)
    classifier = load_classifier(
        folder,
        dtype=resolve_dtype(model.dtype, stored_dtype(config), device),
        device=device,
        pooling=model.pooling,
        pad_token_id=pad_token_id,
    )
    path, parity = choose_path(classifier, model.forward, border or max_input_tokens)
    info = _describe(classifier, path, parity, max_input_tokens, max_batch_tokens)
    return TorchEngine(path, info, deterministic=batching.deterministic, border=border)


def _describe(
    classifier: Classifier, path: ForwardPath, parity: Parity, max_input_tokens: int, max_batch_tokens: int
) -> EngineInfo:
    return EngineInfo(
        engine="torch",
        architecture=classifier.architecture,
        forward=path.name,
        device=str(classifier.device),
        dtype=str(classifier.dtype).removeprefix("torch."),
        cost=path.cost,
        max_input_tokens=max_input_tokens,
        max_batch_tokens=max_batch_tokens,
        parity=asdict(parity),
    )
