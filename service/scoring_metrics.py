"""Records requests and batches in the metrics of a replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from service.diagnostics.item_state import ItemState
from service.diagnostics.monitors.observation import MAX_OUTPUTS
from service.errors import HttpError, NonFiniteReward, RequestRefused
from service.metrics import Metrics
from service.pipeline import BatchOutcome
from service.records import Score, TokenSequence
from service.request_state import ScoredRequest
from service.scheduling.budget import BatchBudget, batch_cost


class ScoringMetrics:
    """The metrics that the scorer and the engine loop write; safe to call from both of their threads.

    Args:
        metrics: of the replica.
        outputs: names of the model's outputs.
    """

    def __init__(self, metrics: Metrics, outputs: Sequence[str] = ()) -> None:
        self._metrics = metrics
        # Created once: names of outputs are not from requests, and looking a label up costs as much as the observation.
        several = outputs[:MAX_OUTPUTS] if len(outputs) > 1 else ()
        self._outputs = [metrics.output.labels(output=name) for name in several]

    def read_queue(
        self, num_sequences: Callable[[], int], num_tokens: Callable[[], int], oldest_wait_s: Callable[[], float]
    ) -> None:
        """Read the gauges of the queue through these functions at every scrape."""
        self._metrics.queue_items.set_function(num_sequences)
        self._metrics.queue_tokens.set_function(num_tokens)
        self._metrics.queue_oldest.set_function(oldest_wait_s)

    def set_ready(self, *, is_ready: bool) -> None:
        """Publish whether the replica accepts requests."""
        self._metrics.ready.set(is_ready)

    def set_budget(self, budget: BatchBudget) -> None:
        """Publish the budget of a pass."""
        self._metrics.budget_tokens.set(budget.max_tokens)

    def count_refused(self, refusal: HttpError, num_items: int) -> None:
        """Count a request that was not accepted."""
        self._metrics.shed.labels(reason=refusal.code).inc()
        self.count_items(num_items, "shed")

    def count_items(self, num_items: int, outcome: str) -> None:
        """Count items of one outcome, which is a label of ``rm_items_total``."""
        self._metrics.items.labels(outcome=outcome).inc(num_items)

    def add_in_flight(self, num_items: int) -> None:
        """Count items as accepted and not yet answered; a negative number when they are answered."""
        self._metrics.inflight_items.inc(num_items)

    def observe_request(self, scored: ScoredRequest, items: Sequence[ItemState]) -> None:
        """Observe an answered request: the times of its stages, and the outcome, reward and length of its items."""
        metrics = self._metrics
        metrics.stage_duration.labels(stage="tokenize").observe(scored.timings.tokenize_s)
        metrics.stage_duration.labels(stage="queue").observe(scored.timings.queue_s)
        for label, num_items in Counter(map(outcome_label, items)).items():
            self.count_items(num_items, label)
        for item in items:
            if isinstance(item.outcome, Score) and item.sequence is not None:
                self._observe_outputs(item.outcome)
                if item.sequence.num_written_special:
                    metrics.special_token_items.inc()
                if item.sequence.num_completion_tokens is not None:
                    metrics.completion_length.observe(item.sequence.num_completion_tokens)

    def _observe_outputs(self, score: Score) -> None:
        if score.reward is not None and not score.own_weights:
            self._metrics.reward.observe(score.reward)
        for histogram, value in zip(self._outputs, score.outputs, strict=False):
            histogram.observe(value)

    def observe_batch(self, lengths: Sequence[int], outcome: BatchOutcome, budget: BatchBudget) -> None:
        """Observe a batch that was computed.

        Args:
            lengths: tokens of each of its sequences.
            outcome: outcome of the batch.
            budget: the budget, which defines how the cost of the batch is computed.
        """
        metrics = self._metrics
        real = sum(lengths)
        metrics.batch_items.observe(len(lengths))
        metrics.batch_tokens.observe(real)
        metrics.forwards.inc(outcome.num_forwards)
        metrics.oom.inc(outcome.out_of_memory)
        metrics.tokens.labels(kind="real").inc(real)
        metrics.tokens.labels(kind="padding").inc(batch_cost(lengths, budget.cost) - real)
        metrics.tokens.labels(kind="shared").inc(sum(outcome.shared_tokens))
        metrics.tokens.labels(kind="cached").inc(outcome.cached_tokens)
        metrics.stage_duration.labels(stage="forward").observe(outcome.forward_s)
        metrics.stage_duration.labels(stage="diagnose").observe(outcome.diagnose_s)


def outcome_label(item: ItemState) -> str:
    """Return the label of an answered item in ``rm_items_total``."""
    if isinstance(item.outcome, NonFiniteReward):
        return "non_finite"
    if isinstance(item.outcome, RequestRefused):
        return "invalid"
    if isinstance(item.outcome, HttpError):
        return "error"
    return "truncated" if isinstance(item.encoded, TokenSequence) and item.encoded.truncated else "ok"
