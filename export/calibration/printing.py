"""Prints a calibration's facts and the results of a test as lines and tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from export.calibration.pair_uncertainty import MAIN_FIGURE, RETAINED, PairReport
from export.calibration.report import CategoryResult, TestReport
from service.diagnostics.calibration_facts import CalibrationFacts, LengthCorrelations, Rate
from service.edits.probe import Probe


def print_facts(console: Console, facts: CalibrationFacts) -> None:
    """Print how a calibration was made and what was measured on it."""
    console.print(
        f"{facts.num_fit} items to fit, {facts.num_select} to select by, {facts.num_calibrate} for p-values "
        f"(of {facts.num_prompts} prompts). Admitted: {', '.join(facts.admitted)}."
    )
    for rate in facts.self_test.rates:
        console.print(_rate_line("Out of fold", rate), highlight=False)
    _print_length(console, "Calibration", facts.length)
    console.print(_suite_table(facts))


def print_report(console: Console, found: TestReport) -> None:
    """Print the results of a test."""
    for rate in found.rates:
        console.print(_rate_line("Test data", rate), highlight=False)
    for rate in found.sibling_rates:
        console.print(_rate_line("Test data, with siblings", rate), highlight=False)
    _print_length(console, "Test data", found.length)
    if found.pairs is not None:
        console.print(_pair_table(found.pairs))
    if not found.categories:
        return
    console.print(_category_table(found.categories))
    alone, with_siblings = found.mean_auroc(), found.mean_auroc(siblings=True)
    console.print(
        f"Mean AUROC over the categories that are out of distribution: {alone:.3f}"
        + ("" if with_siblings is None else f", with siblings {with_siblings:.3f}")
        + f". In brackets: plausible texts. Left out, since the service refuses them: {found.num_left_out}."
        if alone is not None
        else "No category is out of distribution.",
        highlight=False,
    )


def _print_length(console: Console, data: str, length: Mapping[str, LengthCorrelations]) -> None:
    for name, found in length.items():
        console.print(
            f"{data}: correlation of the {name} reward with log length {found.pooled:+.3f} pooled, "
            f"{found.within:+.3f} within prompts",
            highlight=False,
        )


def _rate_line(data: str, rate: Rate) -> str:
    return (
        f"{data}: p <= {rate.nominal:.2f} for {rate.value:.2%} ± {rate.standard_error:.2%} of "
        f"{rate.num_items} clean items ({rate.num_prompts} prompts)"
    )


def _pair_table(found: PairReport) -> Table:
    """Return a table with, by figure of uncertainty: how well it predicts which pairs the reward orders wrongly."""
    table = Table(
        Column("predicts wrong pairs", no_wrap=True),
        "AUROC",
        "disagreement better by",
        "retention area",
        *(f"wrong in the surest {share:.0%}" for share in RETAINED),
        caption=f"{found.num_pairs} pairs, {found.error:.1%} of them wrong; area of a figure that knows nothing "
        f"{found.random_area:.4f}, of one that knows all {found.ideal_area:.4f}.",
    )
    for name, one in found.figures.items():
        is_compared = name != MAIN_FIGURE and one.behind is not None
        table.add_row(
            name,
            f"{one.auroc:.3f} ± {one.standard_error:.3f}",
            f"{one.behind:+.3f} ± {one.behind_error:.3f}" if is_compared else "",
            f"{one.retention_area:.4f}",
            *(f"{error:.1%}" for error in one.retained_errors),
        )
    return table


def _category_table(categories: Mapping[str, CategoryResult]) -> Table:
    table = Table("category", "items", "reward z", "AUROC", "flagged", "AUROC, siblings", "flagged, siblings")
    for name, one in categories.items():
        table.add_row(
            name if one.is_ood else f"({name})",
            str(one.num_items),
            f"{one.reward_z:+.2f}",
            f"{one.auroc:.3f}",
            f"{one.flagged:.2f}",
            "-" if one.sibling_auroc is None else f"{one.sibling_auroc:.3f}",
            "-" if one.sibling_flagged is None else f"{one.sibling_flagged:.2f}",
        )
    return table


def _suite_table(facts: CalibrationFacts) -> Table:
    """Return a table with, by built-in set: AUROC and detection rate of the combination, AUROC of each component.

    The column ``new kind`` is the combination's AUROC with trees that were fitted without the set's family.
    """
    suite, combined = facts.suite, facts.suite["combined"]
    components = [name for name in suite if name != "combined"]
    table = Table("built-in set", "AUROC", "TPR@1%", *components, "new kind")
    for kind, found in combined.items():
        alone = (f"{suite[name][kind].auroc:.3f}" for name in components)
        new_kind = f"{facts.new_kind[kind].auroc:.3f}" if kind in facts.new_kind else "-"
        table.add_row(kind, f"{found.auroc:.3f}", f"{found.tpr1:.2f}", *alone, new_kind)
    table.add_section()
    trained = [found for kind, found in combined.items() if kind in facts.new_kind] or list(combined.values())
    table.add_row(
        "mean of those trained on",
        f"{np.mean([one.auroc for one in trained]):.3f}",
        f"{np.mean([one.tpr1 for one in trained]):.2f}",
        *("" for _ in components),
        "-" if facts.new_kind_auroc is None else f"{facts.new_kind_auroc:.3f}",
    )
    means = (f"{np.mean([one.auroc for one in suite[name].values()]):.3f}" for name in components)
    auroc, tpr1 = (np.mean([getattr(one, figure) for one in combined.values()]) for figure in ("auroc", "tpr1"))
    table.add_row("mean of all", f"{auroc:.3f}", f"{tpr1:.2f}", *means, "")
    rates = (f"{facts.realised[name].value:.2%}" for name in components)
    table.add_row("false alarms at 1 %", f"{facts.realised['combined'].value:.2%}", "", *rates, "")
    return table


def print_probe(console: Console, probe: Probe) -> None:
    """Print what the reward pays for."""
    table = Table("edit", "answers", "reward", "95 % interval", "in sd", "raised", "")
    for one in probe.effects:
        table.add_row(
            one.description,
            str(one.num_items),
            f"{one.effect:+.3f}",
            f"{one.low:+.3f} to {one.high:+.3f}",
            f"{one.effect_sd:+.2f}",
            f"{one.share_higher:.0%}",
            "pays" if one.pays else "",
        )
    console.print(table)
    paying = ", ".join(one.description for one in probe.paying())
    console.print(
        f"Edits of {probe.num_completions} answers that the reward pays for: {paying or 'none'}.", highlight=False
    )
