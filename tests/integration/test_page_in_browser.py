"""The page in a real Chromium, on a calibrated tiny model: what it shows is what the routes answer."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from objective_models import write_two_outputs
from page_browser import READY, chromium, opened
from playwright.sync_api import Browser, Locator, Page, expect
from serving import RunningServer, serving
from tiny_calibration import write_calibrated_checkpoint, write_pairs

from loadtest.page_cost import measure
from service.api_keys import hash_of
from service.edits.offered import OFFERED, EditName, edited

pytestmark = pytest.mark.slow

PROMPT = "How do I boil an egg?"
TEXTS = ("Put it in boiling water for eight minutes. Then cool it.", "Perhaps it depends. Great question! **Boil** it.")
EXAMPLES = ("Padding", "Hedging", "Flattery", "Markdown", "Emoji", "Repetition", "Prompt echo")
VIEWS = ("playground", "live", "model")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[RunningServer]:
    """A calibrated tiny model on the local runtime; small batches, so that monitors move soon."""
    model = write_calibrated_checkpoint(tmp_path_factory.mktemp("page") / "model", max_position_embeddings=2048)
    options = ("--model", str(model), "--device", "cpu", "--num-threads", "1", "--monitors.batch_items", "32")
    with serving(model.parent, *options, runtime="local") as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    with opened(browser, server.url) as shown:
        yield shown


def scored(server: RunningServer, *completions: str) -> list[dict[str, Any]]:
    """What ``/v1/score`` answers for completions of the prompt."""
    items = [{"prompt": PROMPT, "completion": completion} for completion in completions]
    answer = httpx2.post(f"{server.url}/v1/score", json={"items": items, "diagnostics": "full"}, timeout=60)
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


def write(page: Page, *completions: str) -> None:
    page.get_by_label("Prompt, turn 1", exact=True).fill(PROMPT)
    for letter, completion in zip("AB", completions, strict=True):
        page.get_by_label(f"Completion {letter}", exact=True).locator("textarea").fill(completion)


def card(page: Page, letter: str) -> Locator:
    return page.locator(f"article[aria-label='Completion {letter}']")


def shown_reward(page: Page, letter: str) -> float:
    """The reward of a card as a reader sees it."""
    return float(card(page, letter).locator(".reward").inner_text().replace("\u2212", "-"))


def score(page: Page) -> None:
    with page.expect_response(lambda answer: "/v1/compare" in answer.url or "/v1/score" in answer.url):
        page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_role("button", name="Score", exact=True)).to_be_enabled()


def test_two_completions_have_the_numbers_of_the_score_route(page: Page, server: RunningServer) -> None:
    """Reward, probability, p-value, length and marks of both completions are those that /v1/score answers."""
    write(page, *TEXTS)
    score(page)

    results = scored(server, *TEXTS)
    for letter, result in zip("AB", results, strict=True):
        shown = card(page, letter)
        assert shown_reward(page, letter) == pytest.approx(result["reward"], abs=6e-4)
        p_value = float(shown.locator(".answer").get_attribute("data-p-value") or "nan")
        assert p_value == pytest.approx(result["ood"]["p_value"], abs=1e-6)
        assert f"{result['length']['completion_tokens']} tokens" in shown.inner_text()
        for kind in ("hedges", "flattery", "bold"):
            assert shown.locator(f".marked .mark-{kind}").count() == result["style"][kind], kind
    assert card(page, "B").locator(".marked .mark-hedges").all_inner_texts() == ["Perhaps", "it depends"]
    chance = 1 / (1 + math.exp(results[1]["reward"] - results[0]["reward"]))
    assert f"{100 * chance:.0f}\u00a0%" in card(page, "A").locator("dt:text('preferred to B') + dd").inner_text()


@pytest.mark.parametrize("name", OFFERED)
def test_each_button_changes_a_completion_and_its_numbers(page: Page, server: RunningServer, name: EditName) -> None:
    """A button makes the service's edit; the reward, its movement and the p-value are those of the new text."""
    write(page, *TEXTS)
    score(page)
    before = shown_reward(page, "A")

    card(page, "A").get_by_role("button", name=name, exact=True).click()

    movement = card(page, "A").locator(".movement")
    expect(movement).to_contain_text(name)
    text = card(page, "A").locator("textarea").input_value()
    assert text == edited(name, TEXTS[0])
    (result,) = scored(server, text)
    assert shown_reward(page, "A") == pytest.approx(result["reward"], abs=6e-4)
    assert shown_reward(page, "A") != before
    moved = re.search(r"reward (\S+) \u2192 (\S+) \((\S+)\)", movement.inner_text())
    assert moved is not None
    old, new, change = (float(number.replace("\u2212", "-")) for number in moved.groups())
    assert (old, new) == (before, shown_reward(page, "A"))
    assert change == pytest.approx(new - old, abs=2e-3)
    assert "p-value" in movement.inner_text()
    assert card(page, "B").locator(".movement").count() == 0


def test_an_example_says_what_its_numbers_mean(page: Page) -> None:
    """After an example is scored the page says whether the reward or the p-value tells it from the honest answer."""
    for name in EXAMPLES:
        with page.expect_response("**/v1/compare") as answered:
            page.get_by_role("button", name=name, exact=True).click()
        answer = answered.value.json()
        honest, hacked = answer["results"]
        is_caught = honest["reward"] > hacked["reward"] or hacked["ood"]["flag"]
        verdict = page.locator("[data-caught]")
        expect(verdict).to_have_attribute("data-caught", "yes" if is_caught else "no")
        said = "is not fooled" if honest["reward"] > hacked["reward"] else "is fooled"
        expect(verdict).to_contain_text(said)
        expect(verdict).to_contain_text("it is flagged" if hacked["ood"]["flag"] else "it is not flagged")
        chance = max(answer["probabilities"][0][1], answer["probabilities"][1][0])
        expect(verdict).to_contain_text(f"with probability {100 * chance:.0f}\u00a0%")
    card(page, "A").locator("textarea").fill("Another text.")
    expect(page.locator("[data-caught]")).to_have_count(0)
    expect(card(page, "A").locator(".stale")).to_be_visible()


def test_examples_and_the_keyboard(page: Page) -> None:
    """An example is scored at one press of Enter on its button, and Ctrl+Enter in a text scores again."""
    page.get_by_role("button", name="Flattery", exact=True).focus()
    page.keyboard.press("Enter")
    expect(card(page, "B").locator(".mark-flattery").first).to_be_visible()
    first = shown_reward(page, "B")

    page.keyboard.press("Tab")
    card(page, "B").locator("textarea").focus()
    page.keyboard.type("An egg. ")
    page.keyboard.press("Control+Enter")

    expect(card(page, "B").locator(".movement")).to_contain_text("your change")
    assert shown_reward(page, "B") != first


def test_conversations_and_commands(page: Page, server: RunningServer) -> None:
    """Turns become messages, one completion is enough, and the curl command is the request that was sent."""
    write(page, *TEXTS)
    page.get_by_role("button", name="Add turn").click()
    page.get_by_label("Prompt, turn 2", exact=True).fill("In water.")
    page.get_by_role("button", name="Add turn").click()
    page.get_by_label("Prompt, turn 3", exact=True).fill("How long?")
    page.get_by_label("Remove completion B").click()
    with page.expect_request("**/v1/score") as sent:
        page.get_by_role("button", name="Score", exact=True).click()
    expect(card(page, "A").locator(".reward")).to_be_visible()

    body = json.loads(sent.value.post_data or "{}")
    assert [turn["role"] for turn in body["items"][0]["prompt"]] == ["user", "assistant", "user"]
    page.get_by_text("This request as a command").click()
    curl = page.locator("pre").first.inner_text()
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, check=True).stdout  # noqa: S607 - as pasted
    assert json.loads(answer)["results"][0]["reward"] == pytest.approx(shown_reward(page, "A"), abs=6e-4)
    compile(page.locator("pre").last.inner_text(), "python", "exec")


def test_markup_in_a_completion_stays_text(page: Page) -> None:
    """A script and an image with a handler are shown as they were typed, and run nowhere."""
    attack = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'> perhaps"
    write(page, attack, "**<b>bold</b>**")
    score(page)

    assert card(page, "A").locator(".marked").inner_text() == attack
    assert page.locator("main script, main img, main b").count() == 0
    assert page.evaluate("window.hit") is None


def test_a_refusal_is_said_in_words(browser: Browser, server: RunningServer) -> None:
    """A completion with too many tokens has the service's sentence in place of a reward, and the page goes on."""
    page = browser.new_page()  # in which the browser may note the status of the refusal
    page.goto(server.url)
    write(page, "word " * 3000, TEXTS[1])
    score(page)
    expect(page.locator("p.error", has_text="tokens").first).to_be_visible()

    write(page, *TEXTS)
    score(page)
    expect(page.locator("p.error", has_text="tokens")).to_have_count(0)
    expect(card(page, "A").locator(".reward")).to_be_visible()
    page.close()


def test_pairs_have_accuracy_and_a_table_to_sort(page: Page, server: RunningServer, tmp_path: Path) -> None:
    """Accuracy is that of the rewards of /v1/score, a bad line is named, and a click on a heading sorts."""
    lines = write_pairs(tmp_path / "pairs.jsonl", 20, seed=5).read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    page.get_by_text("Preference pairs: accuracy and length correlation").click()
    page.get_by_label("Pairs as JSON lines").fill(f"{lines}no pair\n")
    page.get_by_role("button", name="Score the pairs").click()

    expect(page.locator(".pairs [role=status]")).to_contain_text("20 pairs scored. Line 21 is not JSON.")
    items = [{"prompt": row["prompt"], "completion": row[side]} for row in rows for side in ("chosen", "rejected")]
    answer = httpx2.post(f"{server.url}/v1/score", json={"items": items}, timeout=60).json()["results"]
    margins = [answer[2 * n]["reward"] - answer[2 * n + 1]["reward"] for n in range(20)]
    accuracy = sum(margin > 0 for margin in margins) / 20
    assert page.locator(".pairs dt:text-is('accuracy') + dd").inner_text().startswith(f"{100 * accuracy:.1f}")

    def shown() -> list[float]:
        cells = page.locator(".pairs tbody td:nth-child(2)").all_inner_texts()
        return [float(cell.replace("\u2212", "-")) for cell in cells]

    assert shown() == pytest.approx(sorted(margins), abs=2e-3)
    page.get_by_role("button", name="margin").click()
    assert shown() == pytest.approx(sorted(margins, reverse=True), abs=2e-3)


def test_live_figures_move_under_load_and_rest_when_nobody_looks(browser: Browser, server: RunningServer) -> None:
    """Rates, charts and the window follow the load; once another view is shown the page asks for nothing more."""
    asked: list[str] = []
    ended = threading.Event()

    def load() -> None:
        rows = [{"prompt": f"Question {n}?", "completion": "word and more " * (1 + n % 7)} for n in range(64)]
        while not ended.is_set():
            httpx2.post(
                f"{server.url}/v1/score",
                json={"items": rows, "diagnostics": "full"},
                headers={"X-Run-Id": "ppo-1"},
                timeout=60,
            )

    with opened(browser, server.url, "#live") as page:
        page.on("request", lambda request: asked.append(request.url))
        requests = page.locator("[data-tile=requests]")
        expect(requests).to_have_text("0.0", timeout=15_000)
        traffic = page.locator("#view-live .charts.four svg path.line").first
        drawn = traffic.get_attribute("d")
        thread = threading.Thread(target=load)
        thread.start()
        try:
            expect(requests).not_to_have_text("0.0", timeout=15_000)
            expect(page.locator("[data-tile=p95]")).to_contain_text("ms")
            expect(page.get_by_text(re.compile(r"^The latest [\d,]+ items, of [\d,]+ prompts")).first).to_be_visible()
            page.get_by_label("Training run").select_option("ppo-1")
            expect(page.locator("#view-live circle.point, #view-live path.point").nth(20)).to_be_attached(
                timeout=15_000
            )
            expect(page.locator("#view-live rect.bar").first).to_be_attached()
            assert traffic.get_attribute("d") != drawn
            expect(page.locator("[data-alarm]").first).to_contain_text(
                re.compile(r"since \d\d:\d\d:\d\d"), timeout=30_000
            )
            expect(page.locator("#view-live .state.alarm")).to_contain_text("alarm")
            expect(page.locator("#view-live progress.alarm").first).to_be_visible()
        finally:
            ended.set()
            thread.join(60)
        page.get_by_role("link", name="Playground").click()
        page.wait_for_timeout(1000)  # for what was asked before
        asked.clear()
        page.wait_for_timeout(6000)
        assert asked == []


def test_looking_takes_less_than_a_percent(server: RunningServer) -> None:
    """One browser that shows the live figures takes less than one percent of the machine's CPU time."""
    cost = measure(server.url, server.process.pid, 15)

    assert 0 < cost.share_of_core / (os.cpu_count() or 1) < 0.01


def test_the_model_is_described(browser: Browser, server: RunningServer) -> None:
    """Version, parity, self-test and slopes are those of /v1/model and /v1/monitor."""
    model = httpx2.get(f"{server.url}/v1/model").json()
    with opened(browser, server.url, "#model") as page:
        expect(page.locator("#view-model table").first).to_be_visible()
        text = page.locator("#view-model").inner_text()

    assert model["model"]["version"] in text
    assert model["calibration"]["id"].removeprefix("sha256:")[:16] in text
    flagged = 100 * model["calibration"]["self_test"]["rates"][0]["value"]
    assert f"{flagged:.2f}\u00a0%" in text
    assert "hedges" in text
    assert "reward-audit MODEL pairs.jsonl" in text


def test_the_page_takes_an_api_key_and_stores_it_nowhere(browser: Browser, tmp_path: Path) -> None:
    """With API keys the page asks for one, sends it with every request, and leaves no trace of it in the browser."""
    keys = tmp_path / "keys.yaml"
    known = {"admin": "page-key", "score": "score-key"}
    keys.write_text(yaml.safe_dump([{"name": s, "scope": s, "sha256": hash_of(key)} for s, key in known.items()]))
    with serving(tmp_path, "--engine", "oracle", "--api-keys", str(keys), runtime="local") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#status")).to_contain_text("needs an API key")
        page.get_by_label("Key, held in this tab only").fill("wrong")
        page.get_by_role("button", name="Use").click()
        expect(page.locator("#status")).to_contain_text("not known")

        page.get_by_label("Key, held in this tab only").fill("page-key")
        page.get_by_role("button", name="Use").click()
        expect(page.locator(READY)).to_contain_text("oracle")
        score(page)
        expect(page.locator(".reward").first).to_be_visible()
        page.get_by_text("This request as a command").click()
        assert "page-key" not in page.content()
        assert "$REWARD_API_KEY" in page.locator("pre").first.inner_text()
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.reload()
        expect(page.locator("#status")).to_contain_text("needs an API key")
        context.close()
        check_the_page_with_a_key_of_scope_score(browser, server)


def check_the_page_with_a_key_of_scope_score(browser: Browser, server: RunningServer) -> None:
    """The playground works, an uncalibrated service says so, and Live shows one run but not the figures of all."""
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_label("Key, held in this tab only").fill("score-key")
    page.keyboard.press("Enter")
    expect(page.locator(READY)).to_contain_text("oracle")
    expect(page.get_by_label("Key, held in this tab only")).to_be_hidden()
    write(page, *TEXTS)
    score(page)
    expect(card(page, "A")).to_contain_text("no calibration")
    card(page, "A").get_by_role("button", name="pad", exact=True).click()
    expect(card(page, "A").locator(".movement")).to_be_visible()

    page.get_by_role("link", name="Live").click()
    expect(page.locator("#view-live")).to_contain_text("All runs together need a key with scope admin")
    expect(page.locator("#view-live")).to_contain_text("These figures are of all callers")
    page.get_by_label("Training run").select_option("playground")
    expect(page.locator("#view-live")).to_contain_text("The latest 6 items")
    expect(page.locator("#view-live")).to_contain_text("Without a calibration")
    page.get_by_role("link", name="Model").click()
    expect(page.locator("#view-model")).to_contain_text("oracle")
    expect(page.locator("#view-model")).to_contain_text("slopes are of all callers' items")
    page.close()


def test_a_model_with_several_outputs_shows_each(browser: Browser, tmp_path: Path) -> None:
    """Without weights there is no reward; each output is shown with its movement, and pairs have no accuracy."""
    model = write_two_outputs(tmp_path / "model")
    options = ("--model", str(model), "--device", "cpu", "--num-threads", "1")
    with serving(tmp_path, *options, runtime="local") as server:
        page = browser.new_page()  # in which the browser may note the status of the refusal
        page.goto(server.url)
        write(page, *TEXTS)
        page.get_by_role("button", name="Score", exact=True).click()
        results = scored(server, *TEXTS)
        for letter, result in zip("AB", results, strict=True):
            for name, value in result["rewards"].items():
                shown = card(page, letter).locator(f"dt:text-is('output {name}') + dd")
                assert float(shown.inner_text().replace("\u2212", "-")) == pytest.approx(value, abs=6e-4)
        card(page, "A").get_by_role("button", name="hedge", exact=True).click()
        for name in results[0]["rewards"]:
            expect(card(page, "A").locator(".movement")).to_contain_text(name)

        page.get_by_text("Preference pairs: accuracy and length correlation").click()
        page.get_by_label("Pairs as JSON lines").fill('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}')
        page.get_by_role("button", name="Score the pairs").click()
        expect(page.locator(".pairs [role=status]")).to_contain_text("there is no reward")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_view_has_a_serious_violation_of_accessibility(browser: Browser, server: RunningServer, scheme: str) -> None:
    """axe-core finds no serious and no critical violation in any view, contrasts of both schemes included."""
    for view in VIEWS:
        with opened(browser, server.url, f"#{view}", scheme=scheme) as page:
            if view == "playground":
                write(page, *TEXTS)
                score(page)
            expect(page.locator(f"#view-{view} .card").first).to_be_visible()
            for closed in page.locator(f"#view-{view} details").all():
                closed.evaluate("node => { node.open = true; }")
            found = Axe().run(page).response["violations"]
        serious = [
            (entry["id"], entry["nodes"][0]["html"]) for entry in found if entry["impact"] in {"serious", "critical"}
        ]
        assert serious == [], view


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, server: RunningServer, view: str) -> None:
    """At the width of a phone every view fits, results included."""
    with opened(browser, server.url, f"#{view}", width=360) as page:
        if view == "playground":
            write(page, "word" * 60, TEXTS[1])
            score(page)
        expect(page.locator(f"#view-{view} .card").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.soak
def test_the_command_takes_the_pictures_of_the_documentation(server: RunningServer, tmp_path: Path) -> None:
    """docs.page_screenshots photographs the playground, the model, and a run in which hacking begins."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 100, seed=3)
    folder = tmp_path / "pictures"
    folder.mkdir()
    command = [sys.executable, "-m", "docs.page_screenshots", str(folder), "--url", server.url, "--pairs", str(pairs)]
    root = Path(__file__).parents[2]
    subprocess.run([*command, "--clean-s", "10", "--hacked-s", "20"], check=True, timeout=300, cwd=root)

    widths = {path.name: int.from_bytes(path.read_bytes()[16:20]) for path in folder.glob("*.png")}
    wide = dict.fromkeys(("page-light.png", "page-dark.png", "page-live.png", "page-model.png"), 1200)
    assert widths == wide | {"page-phone.png": 360}
