"""A report in a browser: nothing is fetched, everything is shown, and it fits a phone and a desk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from foundation.report import Report, report
from tests.e2e.mlflow_compare import CHROMIUM
from tests.tiny_store import make_tiny_store, tiny_recipe
from tests.tiny_trained import train_tiny

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"needs Debian's chromium at {CHROMIUM}: apt-get install chromium"
)
NASTY = "<script>document.title='broken'"
SECTIONS = ["summary", "scores", "differences", "families", "voxels", "calibration", "images", "maps"]
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def written(session_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a tiny run, whose name is a script."""
    directory = tmp_path_factory.mktemp("report")
    make_tiny_store(directory / "tiny.zarr")
    run = train_tiny(tiny_recipe(directory / "tiny.zarr", epochs=1), directory, name=NASTY)
    out = directory / "report.html"
    report(Report(runs=(str(run / "final"),), out=out, title=f"</title>{NASTY}", bootstraps=50))
    return out


@pytest.fixture(params=WIDTHS, ids=[f"{width} px" for width in WIDTHS])
def shown(written: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Page, list[str]]]:
    """The page, opened without a network, and what the browser complained of or asked for."""
    troubles: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": request.param, "height": 800}, offline=True)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
        page.on(
            "request", lambda asked: None if asked.url.startswith(("data:", "file:")) else troubles.append(asked.url)
        )
        page.goto(written.as_uri(), wait_until="load")
        yield page, troubles
        if directory := request.config.getoption("--screenshots"):
            page.screenshot(path=directory / f"report-{request.param}.png", full_page=True)
        browser.close()


def test_the_page_shows_all_that_it_has_and_asks_for_nothing(shown):
    page, troubles = shown
    assert page.eval_on_selector_all("section", "all => all.map(s => s.id)") == SECTIONS
    assert page.eval_on_selector_all("img", "all => all.length") > 20
    assert page.eval_on_selector_all("img", "all => all.filter(i => !(i.complete && i.naturalWidth > 0)).length") == 0
    assert page.evaluate("document.scripts.length") == 0
    assert page.title() == f"</title>{NASTY}"
    assert troubles == []


def test_the_page_never_scrolls_sideways_even_with_everything_open(shown):
    page, _ = shown
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert (
        page.eval_on_selector_all("img", "all => Math.max(...all.map(i => i.getBoundingClientRect().right))")
        <= (page.viewport_size["width"])
    )


def test_every_link_leads_to_a_section(shown):
    page, _ = shown
    links = page.eval_on_selector_all("nav a", "all => all.map(a => a.getAttribute('href'))")
    assert links == [f"#{key}" for key in SECTIONS]


def test_writing_in_figures_keeps_its_size_on_a_phone(shown):
    page, _ = shown
    shrunk = page.eval_on_selector_all(
        "figure > img", "all => Math.min(...all.map(i => i.getBoundingClientRect().width / i.naturalWidth))"
    )
    assert shrunk * 14 >= 10.9  # 10.5 points are 14 pixels
