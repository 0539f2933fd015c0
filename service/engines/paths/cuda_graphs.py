"""Short packed rows, recorded once as CUDA graphs and replayed: the host starts a pass with one call.

A small model's short pass is over on the device before the host has launched its hundreds of kernels. A graph needs
fixed shapes, so a row is filled up to one of a few lengths; where its sequences begin and end is data. Which length,
and how its buffers are filled, is pure; only ``capture_graphs`` needs a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeAlias

import torch

from service.engines.attention.layout import AttentionChunk, Packing, SequenceSpan
from service.engines.model.classifier import Classifier
from service.errors import SettingsError
from service.scheduling.prefix_tree import Branch

logger = logging.getLogger(__name__)

GraphChoice: TypeAlias = Literal["auto"] | bool

ROW_LENGTHS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Tokens of the rows that are recorded: in steps of at most one half, so that at most a third of a row is filling.

A longer row of a model below ``LARGEST_MODEL`` keeps a GPU busy for longer than its launches take."""

TOKENS_PER_SEQUENCE = 64
"""A row holds at most one sequence for so many of its tokens: attention starts its blocks for the longest possible
sequence times their number, and those without work are not free."""

FEWEST_SEQUENCES = 8
"""Sequences that also the shortest row holds."""

LARGEST_MODEL = 2_000_000_000
"""Parameters up to which ``auto`` records graphs. An estimate that awaits measurement: launching a layer takes the host
some 0.35 ms; at 4e14 operations a second 2,048 tokens through a layer of 50 million weights take the device 0.5 ms."""

WARM_UPS = 2
"""Passes before one is recorded, in which kernels are chosen and workspaces allocated."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape of a recorded row: its tokens, filling included, and the sequences that it can hold."""

    num_tokens: int
    num_sequences: int


BUCKETS = tuple(Bucket(length, max(FEWEST_SEQUENCES, length // TOKENS_PER_SEQUENCE)) for length in ROW_LENGTHS)


def bucket_for(num_tokens: int, num_sequences: int, buckets: Iterable[Bucket] = BUCKETS) -> Bucket | None:
    """Return the shortest row that holds so much; None where none does, or more than half of it would be filling."""
    fitting = [one for one in buckets if one.num_tokens >= num_tokens and one.num_sequences >= num_sequences]
    if not fitting:
        return None
    best = min(fitting, key=lambda bucket: bucket.num_tokens)
    is_short = best.num_tokens == ROW_LENGTHS[0]  # a pass of so few tokens costs the same, however few they are
    return best if is_short or best.num_tokens <= 2 * num_tokens else None


def resolve_graphs(
    choice: GraphChoice, device: torch.device, num_parameters: int, *, deterministic: bool = False
) -> bool:
    """Resolve the setting ``model.cuda_graphs``.

    Deterministic rewards do without: a pass whose states are read is not recorded, and is not filled up, which may
    move a bit.

    Raises:
        SettingsError: graphs are asked for where there is no CUDA device, or together with determinism.
    """
    if deterministic:
        if choice is True:
            raise SettingsError("model.cuda_graphs and batching.deterministic contradict each other: choose one")
        return False
    if device.type != "cuda":
        if choice is True:
            raise SettingsError(f"model.cuda_graphs needs a CUDA device and model.device is {device}: leave it out")
        return False
    return num_parameters <= LARGEST_MODEL if choice == "auto" else choice


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What differs between two rows of one bucket.

    ``ids``, ``positions``: int64 [1, tokens]. ``borders``: int32 [sequences + 2], where each sequence begins; unused
    ones are empty, and the last holds the filling. ``read``: int64 [sequences], whose states the head reads; unused
    ones read the first.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    borders: torch.Tensor
    read: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them, in a fixed order."""
        return [self.ids, self.positions, self.borders, self.read]


def fill_row(bucket: Bucket, rows: Sequence[tuple[int, ...]], places: Sequence[int], filler_id: int) -> RowInputs:
    """Lay sequences that share nothing out in a row of the bucket, on the CPU.

    Args:
        bucket: that holds them.
        rows: token ids.
        places: of the token in each sequence that the head reads.
        filler_id: any token.
    """
    num_filler = bucket.num_tokens - sum(map(len, rows))
    begins = list(accumulate(map(len, rows), initial=0))
    unused = bucket.num_sequences - len(rows)
    ids = [token for row in rows for token in row] + [filler_id] * num_filler
    positions = torch.cat([torch.arange(count) for count in (*map(len, rows), num_filler)])
    borders = [*begins, *[begins[-1]] * unused, bucket.num_tokens]
    read = [begin + place for begin, place in zip(begins, places, strict=False)] + [0] * unused
    return RowInputs(
        torch.tensor([ids]), positions.unsqueeze(0), torch.tensor(borders, dtype=torch.int32), torch.tensor(read)
    )


class StaticPass:
    """A pass over a row of fixed shape, from buffers that stay where they are.

    Its layout names one sequence as long as the row; where the real ones begin, only ``borders`` says.
    """

    def __init__(self, classifier: Classifier, bucket: Bucket) -> None:
        self._classifier = classifier
        length, device = bucket.num_tokens, classifier.device
        nobody = fill_row(bucket, [(0,)], [0], 0)
        self.buffers = RowInputs(*(tensor.to(device) for tensor in nobody.tensors))
        nothing = torch.empty(0, dtype=torch.long, device=device)
        whole = SequenceSpan((0, length), 0, (0, length), (0, length))
        chunk = AttentionChunk((whole,), (0, length), nothing, nothing, self.buffers.borders, self.buffers.borders)
        branch = Branch(((0, length),), 0, (0, length))
        self._packing = Packing((branch,), device, staged_chunks=(chunk,), is_static=True)
        # As in PackedForward: without a mask transformers would wait for the device.
        self._mask = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=device)

    def load(self, inputs: Iterable[torch.Tensor]) -> None:
        """Copy a row, in the order of ``RowInputs.tensors``, into the buffers, behind whatever still reads them."""
        for buffer, tensor in zip(self.buffers.tensors, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)

    @torch.inference_mode()
    def compute(self) -> torch.Tensor:
        """Return float32 [sequences], the rewards of what the buffers hold; those of unused sequences mean nothing."""
        states = self._classifier.body(
            input_ids=self.buffers.ids,
            attention_mask=self._mask,
            position_ids=self.buffers.positions,
            use_cache=False,
            packing=self._packing,
        ).last_hidden_state[0]
        return self._classifier.rewards_of(states.index_select(0, self.buffers.read))


class RecordedPass(StaticPass):
    """A static pass that the device repeats by itself; its rewards are overwritten by the next one."""

    def __init__(self, classifier: Classifier, bucket: Bucket, pool: Any) -> None:
        super().__init__(classifier, bucket)
        self._graph = torch.cuda.CUDAGraph()
        self._rewards = self._record(pool)

    def _record(self, pool: Any) -> torch.Tensor:
        device = self._classifier.device
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                super().compute()
        torch.cuda.current_stream(device).wait_stream(beside)
        # Other threads may use CUDA meanwhile; only what this one does is recorded.
        with torch.cuda.graph(self._graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
            return super().compute()

    def compute(self) -> torch.Tensor:
        """Replay the pass; see ``StaticPass.compute``."""
        self._graph.replay()
        return self._rewards


class PassLibrary:
    """Static passes by their bucket."""

    def __init__(self, passes: dict[Bucket, StaticPass]) -> None:
        self._passes = passes

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row."""
        return max((bucket.num_tokens for bucket in self._passes), default=0)

    def items(self) -> Iterable[tuple[Bucket, StaticPass]]:
        """Return all of them."""
        return self._passes.items()

    def choose(self, rows: Sequence[tuple[int, ...]]) -> tuple[Bucket, StaticPass] | None:
        """Return the pass that runs these rows, which share nothing; None where none is fit to."""
        bucket = bucket_for(sum(map(len, rows)), len(rows), self._passes)
        return None if bucket is None else (bucket, self._passes[bucket])


def capture_graphs(classifier: Classifier, max_batch_tokens: int) -> PassLibrary:
    """Record a pass of each bucket that a batch can need, the longest first, so that all share its memory.

    Raises:
        Exception: whatever a model does that cannot be recorded; the classifier runs as before.
    """
    pool = torch.cuda.graph_pool_handle()
    needed = [bucket for bucket in BUCKETS if bucket.num_tokens <= max_batch_tokens]
    return PassLibrary({bucket: RecordedPass(classifier, bucket, pool) for bucket in reversed(needed)})


def record_library(
    classifier: Classifier,
    compute: Callable[[Sequence[tuple[int, ...]]], Sequence[float]],
    max_batch_tokens: int,
    tolerance: float,
    capture: Callable[[Classifier, int], PassLibrary] = capture_graphs,
) -> tuple[PassLibrary, str]:
    """Record passes and compare each with an ordinary one; what fails is logged, and nothing is recorded then.

    Args:
        classifier: ready to run packed rows.
        compute: the rewards of rows by an ordinary pass.
        max_batch_tokens: of a batch.
        tolerance: largest difference between the two.
        capture: records; another one in tests.

    Returns:
        The passes, and why there are none: one sentence, empty where there are.
    """
    try:
        library = capture(classifier, max_batch_tokens)
        failure = _disagreement(library, classifier, compute, tolerance)
    except Exception as error:  # noqa: BLE001 - whatever cannot be recorded, the ordinary path serves it
        library, failure = PassLibrary({}), f"{type(error).__name__}: {error}"
    if not failure:
        return library, ""
    logger.error("No CUDA graphs, passes are launched kernel by kernel: %s", failure)
    return PassLibrary({}), failure


def _disagreement(
    library: PassLibrary,
    classifier: Classifier,
    compute: Callable[[Sequence[tuple[int, ...]]], Sequence[float]],
    tolerance: float,
) -> str:
    for bucket, static in library.items():
        rows = probe_of(bucket, classifier.config.vocab_size)
        places = [classifier.pooled_position(row) for row in rows]
        static.load(tensor.to(classifier.device) for tensor in fill_row(bucket, rows, places, rows[0][0]).tensors)
        pairs = zip(static.compute().tolist(), compute(rows), strict=False)
        gap = max((abs(found - wanted) for found, wanted in pairs), default=0.0)
        if not gap <= tolerance:
            return f"a recorded row of {bucket.num_tokens} tokens differs by {gap:.3g}, more than {tolerance:.3g}"
    return ""


def probe_of(bucket: Bucket, vocab_size: int) -> list[tuple[int, ...]]:
    """Return rows that nearly fill a bucket and begin differently, to compare a recorded pass with an ordinary one."""
    lengths = [bucket.num_tokens // 5 - 3 * number for number in range(5)]
    tokens = [(7919 * number + 11) % vocab_size for number in range(bucket.num_tokens)]
    return [tuple(tokens[begin:end]) for begin, end in pairwise(accumulate(lengths, initial=0))]
