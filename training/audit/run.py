"""An audit from pairs to a report: scores them, computes all measures and writes the files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from service.console import progress_bar
from service.edits.probe import Probe, ProbePlan
from training.audit.data import MAX_TRAIN_PAIRS, AuditData
from training.audit.findings import Findings, investigate
from training.audit.probing import plan_of, probe_reward
from training.audit.report import write_report
from training.audit.scored_pairs import ScoredPairs
from training.audit.scoring import Scorer, score_pairs
from training.failures import describe_reasons
from training.preferences import PreferencePair


def audit(
    scorer: Scorer,
    data: AuditData,
    out_dir: Path,
    *,
    max_train_pairs: int = MAX_TRAIN_PAIRS,
    hide_texts: bool = False,
    probe_completions: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> Findings:
    """Score the pairs, compute all measures and write the report to ``out_dir``.

    Args:
        scorer: the model.
        data: its held-out pairs and, if known, its training pairs.
        out_dir: created if it does not exist; receives ``audit.html``, ``audit.json`` and ``pictures/``.
        max_train_pairs: number of training pairs that are scored, sampled with a fixed seed.
        hide_texts: leave the texts of the highest completions out of the report.
        probe_completions: number of chosen completions that are edited to show what the reward pays for; 0: none.
        overwrite: replace an earlier report in ``out_dir``.
        console: for the progress bar and the pairs without a reward; None: neither is shown.

    Raises:
        DatasetError: too few pairs have a reward.
        OutputError: there is an earlier report, or the files cannot be written.
        ClientError: the service refuses a request or cannot be reached.
    """
    train_pairs = data.train_pairs or ()
    drawn = random.Random(0).sample(train_pairs, min(max_train_pairs, len(train_pairs)))  # noqa: S311 - no secret
    console = console or Console(quiet=True)
    plan = plan_of(data.pairs, probe_completions)
    scored, trained, probe = _score(scorer, data.pairs, drawn, plan, console)
    for part, name in ((scored, "pairs"), (trained, "training pairs")):
        if part.failures:
            reasons = describe_reasons(part.failures)
            console.print(f"{part.num_failed:,} {name} have no reward: {reasons}.", markup=False, highlight=False)
    findings = investigate(
        scored,
        model=scorer.description(),
        data={
            **data.description,
            "pairs_without_reward": dict(scored.failures),
            "pairs_of_identical_completions": scored.num_ties,
        },
        trained=None if data.train_pairs is None else trained,
        train_pairs=data.train_pairs,
        hide_texts=hide_texts,
        probe=probe,
    )
    write_report(findings, out_dir, overwrite=overwrite)
    return findings


def _score(
    scorer: Scorer,
    pairs: Sequence[PreferencePair],
    train_pairs: Sequence[PreferencePair],
    plan: ProbePlan,
    console: Console,
) -> tuple[ScoredPairs, ScoredPairs, Probe | None]:
    total = 2 * (len(pairs) + len(train_pairs)) + len(plan.exchanges)
    with progress_bar(console, "Scoring", total) as advance:
        return (
            score_pairs(pairs, scorer, advance),
            score_pairs(train_pairs, scorer, advance),
            probe_reward(plan, scorer, advance) if plan.originals else None,
        )
