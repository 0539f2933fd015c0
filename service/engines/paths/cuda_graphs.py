"""CUDA graphs of short packed batches: recorded once and replayed, so that the host launches a pass with one call.

The device completes a small model's short pass faster than the host launches its hundreds of kernels. A graph has fixed
shapes, so a packed batch is padded to one of a few lengths; where its sequences begin and end is data. Pure functions
choose the length and fill the buffers; only ``capture_graphs`` requires a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeAlias

import torch

from service.engines.attention.layout import AttentionChunk, PackedLayout, SequenceSpan
from service.engines.model.classifier import Classifier
from service.errors import SettingsError
from service.scheduling.prefix_tree import SequenceLayout

logger = logging.getLogger(__name__)

GraphChoice: TypeAlias = Literal["auto"] | bool
"""The setting ``model.cuda_graphs``."""

BATCH_LENGTHS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Tokens of the recorded batches: in steps of at most one half, so that at most a third of a batch is padding.

A longer batch of a model below ``MAX_PARAMETERS`` keeps a GPU busy for longer than its launches take."""

TOKENS_PER_SEQUENCE = 64
"""Tokens of a bucket per sequence that it can hold: attention launches thread blocks for the longest possible sequence
times the number of sequences, and thread blocks without work cost time."""

MIN_SEQUENCES = 8
"""Minimum of sequences that every bucket can hold."""

MAX_PARAMETERS = 2_000_000_000
"""Model size up to which ``auto`` records graphs. An estimate that awaits measurement: launching a layer takes the host
some 0.35 ms; at 4e14 operations a second 2,048 tokens through a layer of 50 million weights take the device 0.5 ms."""

WARM_UP_PASSES = 2
"""Passes before one is recorded, in which kernels are chosen and workspaces allocated."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape of a recorded batch."""

    num_tokens: int
    """Tokens, padding included."""

    num_sequences: int
    """Sequences that it can hold."""


BUCKETS = tuple(Bucket(length, max(MIN_SEQUENCES, length // TOKENS_PER_SEQUENCE)) for length in BATCH_LENGTHS)


def bucket_for(num_tokens: int, num_sequences: int, buckets: Iterable[Bucket] = BUCKETS) -> Bucket | None:
    """Return the shortest bucket that is large enough; None where none is, or more than half of it would be padding."""
    fitting = [one for one in buckets if one.num_tokens >= num_tokens and one.num_sequences >= num_sequences]
    if not fitting:
        return None
    best = min(fitting, key=lambda bucket: bucket.num_tokens)
    is_short = best.num_tokens == BATCH_LENGTHS[0]  # with fewer tokens the cost of a pass does not decrease further
    return best if is_short or best.num_tokens <= 2 * num_tokens else None


def resolve_graphs(
    choice: GraphChoice, device: torch.device, num_parameters: int, *, deterministic: bool = False
) -> bool:
    """Resolve the setting ``model.cuda_graphs``.

    Deterministic rewards exclude graphs: a pass whose states are read is neither recorded nor padded, so its rewards
    may differ in the last bit from those of a recorded one.

    Args:
        choice: the setting.
        device: where the forward pass runs.
        num_parameters: number of parameters of the model; ``auto`` depends on it.
        deterministic: the setting ``batching.deterministic``.

    Raises:
        SettingsError: graphs are required where there is no CUDA device, or together with determinism.
    """
    if deterministic:
        if choice is True:
            raise SettingsError("model.cuda_graphs and batching.deterministic contradict each other: choose one")
        return False
    if device.type != "cuda":
        if choice is True:
            raise SettingsError(f"model.cuda_graphs needs a CUDA device and model.device is {device}: leave it out")
        return False
    return num_parameters <= MAX_PARAMETERS if choice == "auto" else choice


@dataclass(frozen=True, slots=True)
class StaticInputs:
    """The inputs of a bucket, which differ from batch to batch."""

    ids: torch.Tensor
    """Int64 [1, tokens], the token ids."""

    positions: torch.Tensor
    """Int64 [1, tokens], the position of each token in its sequence."""

    cu_seqlens: torch.Tensor
    """Int32 [sequences + 2], where each sequence begins; unused ones are empty, and the last one is the padding."""

    pooled: torch.Tensor
    """Int64 [sequences], the indices of the tokens whose states the head reads; unused sequences read the first."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them, in a fixed order."""
        return [self.ids, self.positions, self.cu_seqlens, self.pooled]


def fill_bucket(
    bucket: Bucket, rows: Sequence[tuple[int, ...]], pooled_positions: Sequence[int], pad_id: int
) -> StaticInputs:
    """Return the inputs of a bucket, on the CPU, for sequences without shared prefixes.

    Args:
        bucket: large enough for them.
        rows: token ids.
        pooled_positions: the position in each sequence that the head reads.
        pad_id: any token.
    """
    num_padding = bucket.num_tokens - sum(map(len, rows))
    begins = list(accumulate(map(len, rows), initial=0))
    unused = bucket.num_sequences - len(rows)
    ids = [token for row in rows for token in row] + [pad_id] * num_padding
    positions = torch.cat([torch.arange(count) for count in (*map(len, rows), num_padding)])
    cu_seqlens = [*begins, *[begins[-1]] * unused, bucket.num_tokens]
    pooled = [begin + position for begin, position in zip(begins, pooled_positions, strict=False)] + [0] * unused
    return StaticInputs(
        torch.tensor([ids]), positions.unsqueeze(0), torch.tensor(cu_seqlens, dtype=torch.int32), torch.tensor(pooled)
    )


class StaticPass:
    """A pass over a batch of fixed shape, from buffers with fixed addresses.

    Its layout has one sequence as long as the batch; only ``cu_seqlens`` contains where the real ones begin.
    """

    def __init__(self, classifier: Classifier, bucket: Bucket, *, batch_invariant: bool = False) -> None:
        self._classifier = classifier
        length, device = bucket.num_tokens, classifier.device
        empty = fill_bucket(bucket, [(0,)], [0], 0)
        self.buffers = StaticInputs(*(tensor.to(device) for tensor in empty.tensors))
        no_indices = torch.empty(0, dtype=torch.long, device=device)
        whole = SequenceSpan((0, length), 0, (0, length), (0, length))
        chunk = AttentionChunk(
            (whole,), (0, length), no_indices, no_indices, self.buffers.cu_seqlens, self.buffers.cu_seqlens
        )
        sequence = SequenceLayout(((0, length),), 0, (0, length))
        self._layout = PackedLayout(
            (sequence,), device, staged_chunks=(chunk,), is_static=True, is_batch_invariant=batch_invariant
        )
        # As in PackedForward: without a mask transformers would wait for the device.
        self._mask = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=device)

    def load(self, inputs: Iterable[torch.Tensor]) -> None:
        """Copy ``StaticInputs.tensors`` into the buffers, in stream order after the passes that still read them."""
        for buffer, tensor in zip(self.buffers.tensors, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    @torch.inference_mode()
    def compute(self) -> torch.Tensor:
        """Return float32 [sequences, outputs] of the loaded batch; those of unused sequences are meaningless."""
        states = self._classifier.body(
            input_ids=self.buffers.ids,
            attention_mask=self._mask,
            position_ids=self.buffers.positions,
            use_cache=False,
            packed_layout=self._layout,
        ).last_hidden_state[0]
        return self._classifier.outputs_of(states.index_select(0, self.buffers.pooled))


class RecordedPass(StaticPass):
    """A static pass recorded as a CUDA graph; the next replay overwrites its outputs."""

    def __init__(self, classifier: Classifier, bucket: Bucket, pool: Any, *, batch_invariant: bool = False) -> None:
        super().__init__(classifier, bucket, batch_invariant=batch_invariant)
        self._graph = torch.cuda.CUDAGraph()
        self._outputs = self._record(pool)

    def _record(self, pool: Any) -> torch.Tensor:
        device = self._classifier.device
        capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        capture_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(capture_stream):
            for _ in range(WARM_UP_PASSES):
                super().compute()
        torch.cuda.current_stream(device).wait_stream(capture_stream)
        # Other threads may use CUDA meanwhile; only the calls of this one are recorded.
        with torch.cuda.graph(self._graph, pool=pool, stream=capture_stream, capture_error_mode="thread_local"):
            return super().compute()

    def compute(self) -> torch.Tensor:
        """Replay the pass; see ``StaticPass.compute``."""
        self._graph.replay()
        return self._outputs


class PassLibrary:
    """Static passes by their bucket."""

    def __init__(self, passes: dict[Bucket, StaticPass]) -> None:
        self._passes = passes

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest batch."""
        return max((bucket.num_tokens for bucket in self._passes), default=0)

    def items(self) -> Iterable[tuple[Bucket, StaticPass]]:
        """Return all of them."""
        return self._passes.items()

    def choose(self, rows: Sequence[tuple[int, ...]]) -> tuple[Bucket, StaticPass] | None:
        """Return the pass for these sequences, which share no prefix, and its bucket; None where no bucket fits."""
        bucket = bucket_for(sum(map(len, rows)), len(rows), self._passes)
        return None if bucket is None else (bucket, self._passes[bucket])


def capture_graphs(classifier: Classifier, max_batch_tokens: int, *, batch_invariant: bool = False) -> PassLibrary:
    """Record a pass of each bucket within the batch budget, the longest first, so that all share its memory.

    Args:
        classifier: ready to run packed batches.
        max_batch_tokens: the batch budget.
        batch_invariant: whether no bit of a reward may depend on the other sequences of its batch.

    Raises:
        Exception: the model does something that cannot be recorded; the classifier is unchanged.
    """
    pool = torch.cuda.graph_pool_handle()
    needed = [bucket for bucket in BUCKETS if bucket.num_tokens <= max_batch_tokens]
    return PassLibrary(
        {bucket: RecordedPass(classifier, bucket, pool, batch_invariant=batch_invariant) for bucket in reversed(needed)}
    )


def record_library(
    classifier: Classifier,
    compute: Callable[[Sequence[tuple[int, ...]]], Sequence[Sequence[float]]],
    max_batch_tokens: int,
    tolerance: float,
    capture: Callable[[Classifier, int], PassLibrary] = capture_graphs,
) -> tuple[PassLibrary, str]:
    """Record passes and compare each with an ordinary one; a failure is logged, and no recorded pass is used then.

    Args:
        classifier: ready to run packed batches.
        compute: returns the head's outputs of each sequence of an ordinary pass.
        max_batch_tokens: the batch budget.
        tolerance: largest difference between the two.
        capture: records the passes; replaced in tests.

    Returns:
        The passes, and in a sentence why there are none; the sentence is empty where there are some.
    """
    try:
        library = capture(classifier, max_batch_tokens)
        failure = _disagreement(library, classifier, compute, tolerance)
    except Exception as error:  # noqa: BLE001 - if recording fails in any way, the ordinary path serves
        library, failure = PassLibrary({}), f"{type(error).__name__}: {error}"
    if not failure:
        return library, ""
    logger.error("CUDA graphs are not used, passes are launched kernel by kernel: %s", failure)
    return PassLibrary({}), failure


def _disagreement(
    library: PassLibrary,
    classifier: Classifier,
    compute: Callable[[Sequence[tuple[int, ...]]], Sequence[Sequence[float]]],
    tolerance: float,
) -> str:
    for bucket, static in library.items():
        rows = probe_of(bucket, classifier.config.vocab_size)
        pooled = [classifier.pooled_position(row) for row in rows]
        static.load(tensor.to(classifier.device) for tensor in fill_bucket(bucket, rows, pooled, rows[0][0]).tensors)
        pairs = zip(static.compute().tolist(), compute(rows), strict=False)
        gap = max((abs(one - other) for pair in pairs for one, other in zip(*pair, strict=True)), default=0.0)
        if not gap <= tolerance:
            return f"a recorded batch of {bucket.num_tokens} tokens differs by {gap:.3g}, more than {tolerance:.3g}"
    return ""


def probe_of(bucket: Bucket, vocab_size: int) -> list[tuple[int, ...]]:
    """Return sequences that nearly fill a bucket and have no common prefix, to compare a recorded pass on them."""
    lengths = [bucket.num_tokens // 5 - 3 * number for number in range(5)]
    tokens = [(7919 * number + 11) % vocab_size for number in range(bucket.num_tokens)]
    return [tuple(tokens[begin:end]) for begin, end in pairwise(accumulate(lengths, initial=0))]
