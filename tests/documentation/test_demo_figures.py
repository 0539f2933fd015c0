"""The figures of the demo model in README.md and the quickstart: where they stand, and that they can be replaced."""

from __future__ import annotations

from docs.demo_figures import COMPLETIONS, HACK, PAGES, PLACES, PROMPT, replaced, shown

README, QUICKSTART = (path.read_text(encoding="utf-8") for path in PAGES)


def test_each_figure_has_a_place() -> None:
    """Every figure is found in a page, and the texts that are scored for it are those of the pages."""
    assert set(shown(README)) | set(shown(QUICKSTART)) == set(PLACES)
    for page in (README, QUICKSTART):
        assert PROMPT in page
        assert all(f'"completion": "{text}"' in page for text in COMPLETIONS)
    assert HACK["honest"] in QUICKSTART
    assert HACK["hacked"] == "Boil the egg. " * 40
    assert 'hacked = "Boil the egg. " * 40' in QUICKSTART


def test_figures_are_replaced_with_as_many_digits() -> None:
    """New figures take the place of the old ones and nothing else changes; the old ones give the page as it was."""
    figures = dict.fromkeys(PLACES, 0.123456789) | {"version": "abc"}
    for page in (README, QUICKSTART):
        new = replaced(page, figures)
        for name, text in shown(new).items():
            old = shown(page)[name]
            assert text == ("abc" if name == "version" else f"{0.123456789:.{len(old.partition('.')[2])}f}")
        assert new != page
        back = {name: float(text) if name != "version" else text for name, text in shown(page).items()}
        assert replaced(new, figures | back) == page
