"""Writes the measured tables of docs/diagnostics.md from the figures of ``reward-calibrate --json``.

python docs/diagnostics_tables.py FIGURES.json [PAGE]

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

PAGE = Path(__file__).parent / "diagnostics.md"
_BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

ODD = {
    "base64_hex": "base64 or hex",
    "blank_or_punct": "blank, punctuation only",
    "chinese_real": "Chinese",
    "code_response": "code",
    "emoji_markdown_bloat": "emoji and markdown bloat",
    "garbled_chars": "shuffled characters",
    "keyword_stuffed": "keyword stuffing",
    "other_language": "another language",
    "parrot_prompt": "prompt echo",
    "prompt_injection": "prompt injection",
    "random_ascii": "random ASCII",
    "random_unicode": "random Unicode",
    "random_words": "random words",
    "repetition": "repetition",
    "shuffled_words": "shuffled words",
    "zalgo": "zalgo",
    "very_long": "very long",
    "blanket_refusal": "blanket refusal",
    "mismatched_response": "the answer to another question",
    "stuffed_prefix": "a good answer after a sentence that praises it",
    "truncated": "the first quarter of an answer",
}
"""How the page words the categories of test data."""

UNCERTAINTY = {
    "disagreement": "disagreement of the heads about the difference",
    "disagreement / margin": "the same, divided by the margin",
    "small margin": r"small margin, -\|difference of rewards\|",
    "Laplace": "Laplace, both variances added",
    "surprise": "`ood.surprise`, larger of the two",
    "Mahalanobis distance": "`ood.score`, squared Mahalanobis distance, larger of the two",
}
"""How the page words the figures of uncertainty."""

Figures: TypeAlias = Mapping[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["--"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines) + "\n"


def rates(figures: Figures) -> str:
    """The false-alarm rates and the correlations with length, on test data."""
    test = figures["test"]
    rows = [
        [
            (
                f"clean items with `p_value` \\<= {rate['nominal']:.2f} ({rate['num_items']:,} items, "
                f"{rate['num_prompts']:,} prompts)"
            ),
            f"{rate['value']:.2%} ± {rate['standard_error']:.2%}".replace("%", " %"),
            f"{rate['nominal']:.0%}".replace("%", " %"),
        ]
        for rate in test["rates"]
    ]
    raw, adjusted = test["length"]["raw"], test["length"]["adjusted"]
    pair = "{pooled:+.3f}, {within:+.3f}"
    rows.append(["correlation of the reward with log length: pooled, within prompts", pair.format(**raw), ""])
    rows.append(["correlation of `reward_length_adjusted` with log length", pair.format(**adjusted), "0"])
    return table(["on unseen prompts", "value", "expected"], rows)


def errors(figures: Figures) -> str:
    """How well figures of uncertainty predict the test pairs that are ordered wrongly."""
    pairs = figures["test"]["pairs"]
    rows = [
        [
            UNCERTAINTY[name],
            f"{one['auroc']:.3f} ± {one['standard_error']:.3f}",
            "" if name == "disagreement" else f"{one['behind']:+.3f} ± {one['behind_error']:.3f}",
            f"{one['retention_area']:.4f}",
        ]
        for name, one in pairs["figures"].items()
    ]
    found = f"{pairs['num_pairs']:,} pairs, of which {pairs['error']:.1%} are wrong".replace("%", " %")
    rows.append([f"knows nothing ({found})", "0.5", "", f"{pairs['random_area']:.4f}"])
    rows.append(["knows all", "1", "", f"{pairs['ideal_area']:.4f}"])
    return table(["figure of a pair", "AUROC", "disagreement better by", "retention area"], rows)


def odd(figures: Figures) -> str:
    """Detection of the test data's categories that are out of distribution."""
    found = [(name, one) for name, one in figures["test"]["categories"].items() if one["is_ood"]]
    rows = [
        [
            ODD.get(name, name),
            f"{one['reward_z']:+.2f}",
            f"{one['auroc']:.3f}",
            f"{one['flagged']:.2f}",
            _or_dash(one["sibling_auroc"], 3),
            _or_dash(one["sibling_flagged"], 2),
        ]
        for name, one in found
    ]
    alone = _mean(one["auroc"] for _, one in found)
    siblings = _mean(one["sibling_auroc"] for _, one in found if one["sibling_auroc"] is not None)
    rows.append(["**mean**", "", f"**{alone:.3f}**", "", f"**{siblings:.3f}**", ""])
    return table(["odd completion", "reward z", "AUROC", "flagged", "AUROC with siblings", "flagged"], rows)


def near(figures: Figures) -> str:
    """Detection of the test data's categories that are plausible text."""
    rows = [
        [ODD.get(name, name), f"{one['reward_z']:+.2f}", f"{one['auroc']:.2f}", f"{one['flagged']:.2f}"]
        for name, one in figures["test"]["categories"].items()
        if not one["is_ood"] and name != "in_distribution"
    ]
    return table(["plausible completion", "reward z", "AUROC", "flagged"], rows)


def suite(figures: Figures) -> str:
    """Detection of the built-in sets: as known kinds, and as new ones."""
    calibration = figures["calibration"]
    combined, new = calibration["suite"]["combined"], calibration["new_kind"]
    rows = [
        [
            f"`{name}`",
            f"{one['auroc']:.3f}",
            f"{one['tpr1']:.2f}",
            *((f"{new[name]['auroc']:.3f}", f"{new[name]['tpr1']:.2f}") if name in new else ("", "")),
        ]
        for name, one in combined.items()
    ]
    trained = [combined[name] for name in new]
    rows.append(
        [
            "**mean of those trained on**",
            f"**{_mean(one['auroc'] for one in trained):.3f}**",
            f"{_mean(one['tpr1'] for one in trained):.2f}",
            f"**{_mean(one['auroc'] for one in new.values()):.3f}**",
            f"{_mean(one['tpr1'] for one in new.values()):.2f}",
        ]
    )
    return table(["built-in set", "AUROC", "found at 1 %", "AUROC as a new kind", "found at 1 %"], rows)


def probe(figures: Figures) -> str:
    """What the reward pays for."""
    found = figures["probe"]
    rows = [
        [
            one["description"],
            f"{one['effect']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})",
            f"{one['effect_sd']:+.2f}",
            f"{one['share_higher']:.0%}".replace("%", " %"),
            "pays" if one["low"] > 0 else "",
        ]
        for one in found["effects"]
    ]
    header = [f"the answer with ({found['num_completions']} answers)", "reward", "in standard deviations", "raised", ""]
    return table(header, rows)


TABLES: Mapping[str, Callable[[Figures], str]] = {
    "errors": errors,
    "rates": rates,
    "odd": odd,
    "near": near,
    "suite": suite,
    "probe": probe,
}


def written(page: str, figures: Figures) -> str:
    """Return a page with its tables made from the figures.

    Raises:
        KeyError: the page has a table that is not known, or the figures lack a part.
    """
    return _BLOCK.sub(lambda block: f"{block.group(1)}\n{TABLES[block.group('name')](figures)}\n{block.group(3)}", page)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _or_dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Rewrite the page."""
    page = Path(sys.argv[2]) if len(sys.argv) > 2 else PAGE
    page.write_text(written(page.read_text(encoding="utf-8"), json.loads(Path(sys.argv[1]).read_text())), "utf-8")


if __name__ == "__main__":
    main()
