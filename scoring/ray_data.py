"""Runs a job with Ray Data: units are read in parallel, and a pool of actors, one model each, scores their blocks.

A block travels as one row of bytes, so that Ray neither splits nor merges it. Part files come back as bytes and are
written by the process that runs the command: the nodes need the input and the model, but no common output folder. Our
own errors travel as values in place of a block, because Ray Data prints an exception and changes its message.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from scoring.blocks import BlockKey
from scoring.encoding import EncodedBlock, OutputPlan
from scoring.run import Input, encode_blocks, unfinished_blocks_of
from service.errors import JobError, StartupError

if TYPE_CHECKING:
    from scoring.blocks import Block
    from scoring.scorers import BlockScorer
    from service.settings import Settings

OBJECT_STORE_BYTES = 1024**3
"""Memory for blocks on their way, of a Ray that is started here."""

IN_FLIGHT_BYTES = 512 * 1024**2
"""Bytes of blocks that Ray Data holds at most between reading and scoring."""

_BLOCKS_PER_BATCH = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """The actors of a job."""

    replicas: int
    cpus: float
    gpus: float


@contextmanager
def started_ray(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start Ray on this machine and stop it in the end.

    Args:
        address: of the cluster, or ``auto``; None: Ray is started here.

    Raises:
        JobError: there is no cluster at the address.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else own),
        )
    except (ConnectionError, ValueError) as error:
        raise JobError(f"Ray cannot be reached at {address or 'this machine'} ({type(error).__name__}).") from error
    try:
        yield
    finally:
        ray.shutdown()


def plan_pool(replicas: int | None, *, on_gpu: bool) -> Pool:
    """Return the pool for the cluster that is connected: one replica a GPU, or on CPUs one with all of them.

    Raises:
        JobError: the cluster has no GPU, though the device was named.
    """
    resources = ray.cluster_resources()
    cpus, gpus = float(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if on_gpu and not gpus:
        raise JobError("The Ray cluster has no GPU: leave --device out, or set it to cpu.")
    if gpus:
        return Pool(replicas or gpus, 1, min(1.0, gpus / (replicas or gpus)))
    # Reading has a part of a core, so that the replicas cannot take all.
    count = replicas or 1
    return Pool(count, max(0.1, (cpus - 0.5) / count), 0)


class RayRunner:
    """Runs a job on the cluster that is connected.

    Args:
        settings: of each replica's model.
        version: of the model, as each replica must have it.
        pool: of the replicas.
    """

    def __init__(self, settings: Settings, pool: Pool, version: str) -> None:
        self._settings = settings
        self._pool = pool
        self._version = version

    @property
    def version(self) -> str:
        """Version of the model."""
        return self._version

    def run(self, data: Input, plan: OutputPlan, finished: Mapping[BlockKey, str]) -> Iterator[EncodedBlock]:
        """Yield every block that is not finished, in the order in which replicas finish them.

        Raises:
            StartupError: a replica could not load the model, or the input was changed; as in one process.
        """
        _configure(DataContext.get_current())
        dataset = ray.data.read_datasource(
            _BlockSource(data, finished), override_num_blocks=len(data.units), num_cpus=0.25
        ).map_batches(
            _Replica,
            batch_size=_BLOCKS_PER_BATCH,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=self._pool.replicas),
            num_cpus=self._pool.cpus,
            num_gpus=self._pool.gpus,
            fn_constructor_args=(self._settings, plan, self._version),
        )
        try:
            for row in dataset.iter_rows():
                encoded = _unpack(row["value"])
                if isinstance(encoded, StartupError):
                    raise encoded
                yield encoded
        except ray.exceptions.RayError as error:
            raise _as_ours(error) from error


def model_version_on_cluster(settings: Settings, pool: Pool) -> str:
    """Load the model once on the cluster and return its version, which decides whether a job may be resumed."""
    task = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_calls=1)(_load_version)
    try:
        return str(ray.get(task.remote(settings)))
    except ray.exceptions.RayError as error:
        raise _as_ours(error) from error


def _load_version(settings: Settings) -> str:
    from service.assembly import assemble

    return assemble(settings).identity.version


def _configure(context: Any) -> None:
    # One row is one block of ours, and a Ray block of its own, so that replicas share them out one by one.
    context.target_max_block_size = 1
    context.target_min_block_size = 0
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=IN_FLIGHT_BYTES
    )
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False


def _as_ours(error: BaseException) -> StartupError:
    """The error of ours with which a replica could not begin, or else Ray's as one sentence."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, StartupError):
        return cause
    return JobError(f"Ray has ended the job ({type(error).__name__}); continue it with --resume.")


class _BlockSource(Datasource):  # type: ignore[misc]
    """One read task for each unit; a task yields its blocks one by one, each as one row."""

    def __init__(self, data: Input, finished: Mapping[BlockKey, str]) -> None:
        super().__init__()
        self._data = data
        self._finished = finished

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        del parallelism  # the units are what is read in parallel
        tasks = []
        for unit in range(len(self._data.units)):
            finished = {key: digest for key, digest in self._finished.items() if key[0] == unit}
            metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)
            tasks.append(ReadTask(partial(_read_unit, unit, self._data, finished), metadata))
        return tasks


def _read_unit(unit: int, data: Input, finished: Mapping[BlockKey, str]) -> Iterator[pa.Table]:
    try:
        for block in unfinished_blocks_of(unit, data, finished):
            yield _packed(block)
    except StartupError as error:
        yield _packed(error)


class _Replica:
    """An actor with a model."""

    def __init__(self, settings: Settings, plan: OutputPlan, version: str) -> None:
        from scoring.local_scorer import LocalScorer

        self._plan = plan
        self._scorer: BlockScorer = LocalScorer(settings)
        self._expected_version = version

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        blocks = [_unpack(value) for value in batch.column("value").to_pylist()]
        try:
            self._check(blocks)
            for encoded in encode_blocks(self._scorer, blocks, self._plan):
                yield _packed(encoded)
        except StartupError as error:
            yield _packed(error)

    def _check(self, blocks: Sequence[Block | StartupError]) -> None:
        for block in blocks:
            if isinstance(block, StartupError):
                raise block
        if self._scorer.version != self._expected_version:
            raise JobError(
                f"A replica has version {self._scorer.version} of the model, and the job began with "
                f"{self._expected_version}: its node has another folder under that name, or another CPU or GPU."
            )


def _packed(value: Block | EncodedBlock | StartupError) -> pa.Table:
    return pa.table({"value": pa.array([pickle.dumps(value)], pa.large_binary())})


def _unpack(value: bytes) -> Any:
    return pickle.loads(value)  # noqa: S301 - written by the tasks of this job
