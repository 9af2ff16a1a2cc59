"""MLflow's own UI in headless Chromium: filter runs of an experiment, tick some, press Compare, look.

python tests/e2e/mlflow_compare.py TRACKING_URI BACKBONE DIRECTORY RUN_ID RUN_ID ... [--version NAME/VERSION]
"""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlflow import MlflowClient
from playwright.sync_api import Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from foundation.tracking.runs import EXPERIMENT

CHROMIUM = Path("/usr/bin/chromium")

CHROMIUM_OPTIONS = [
    "--no-sandbox",  # root has no user namespace to sandbox in
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextlib.contextmanager
def mlflow_ui(tracking_uri: str, *, timeout_s: float = 120.0) -> Iterator[str]:
    """Serve `mlflow ui` over a store on a free port of 127.0.0.1; yield its address, and stop it on leaving."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking_uri, "--host", "127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--workers", "1"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        try:
            deadline = time.monotonic() + timeout_s
            while not _answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"mlflow ui did not start on {url}:\n{log.read().decode()[-4000:]}")
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@contextlib.contextmanager
def chromium_page(*, width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """An empty page in Debian's Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_OPTIONS)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def open_runs(page: Page, url: str, experiment_id: str) -> None:
    """Walk to an experiment's runs as a user does: Model training, Runs."""
    page.goto(f"{url}/#/experiments/{experiment_id}/runs")
    # MLflow opens every experiment as a GenAI one, with a chat panel, until the browser has been told otherwise.
    page.get_by_role("button", name="Model training").click()
    page.get_by_role("link", name="Runs", exact=True).click()
    close_chat(page)


def close_chat(page: Page) -> None:
    """Close the panel that MLflow opens beside a browser's first page."""
    with contextlib.suppress(PlaywrightTimeout):
        page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]').click(timeout=5_000)


def filter_runs(page: Page, filter_string: str) -> list[str]:
    """Type a filter into the search box over the runs, and return the names of the runs that are left."""
    asked = json.dumps(filter_string)[1:-1]
    with page.expect_response(
        lambda response: "runs/search" in response.url and asked in (response.request.post_data or "")
    ) as answer:
        box = page.get_by_placeholder("metrics.rmse < 1")
        box.fill(filter_string)
        box.press("Enter")
    names = page.locator('[row-id] a[href*="/runs/"]')
    expect(names).to_have_count(len(answer.value.json().get("runs", [])))
    return names.all_inner_texts()


def show_columns(page: Page, names: Sequence[str]) -> None:
    """Show these metrics, parameters or tags as columns of the runs' table, and no others that can be chosen."""
    page.get_by_role("button", name="Columns", exact=True).click()
    menu = page.get_by_role("dialog")
    search = menu.get_by_placeholder("Search columns")
    for name in ("Dataset", "Source", "Models", *names):
        search.fill(name)
        whole = re.compile(rf"^{re.escape(name)}$")  # what was searched for stands out, in names that go on too
        menu.locator("span").filter(has_text=whole).last.click()
    page.keyboard.press("Escape")
    menu.wait_for(state="hidden")


def open_compare_view(page: Page, run_ids: Sequence[str]) -> None:
    """Tick runs of an open table, press Compare, and wait for what it shows."""
    for run_id in run_ids:
        page.locator(f'[row-id="{run_id}"]').get_by_role("checkbox", name="toggle row selection").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text(f"Comparing {len(run_ids)} Runs").wait_for()
    page.get_by_role("switch", name="Metrics - Show diff only").wait_for()


def parallel_coordinates(page: Page, *, parameters: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Choose the axes of the compare view's parallel coordinates, and return what they are called."""
    page.get_by_role("tab", name="Parallel Coordinates Plot").click()
    page.get_by_role("button", name="Clear All").click()
    for box, names in zip(page.get_by_role("combobox").all(), (parameters, metrics), strict=True):
        for name in names:
            box.click()
            page.keyboard.type(name)
            page.get_by_title(name, exact=True).last.wait_for()
            page.keyboard.press("Enter")
        page.keyboard.press("Escape")
    axes = page.locator(".axis-title")
    expect(axes).to_have_count(len(parameters) + len(metrics))
    return axes.all_text_contents()  # SVG has no inner text


def open_version(page: Page, url: str, name: str, version: int) -> None:
    """Walk to the registry's page of a model's version."""
    page.goto(f"{url}/#/models/{name}/versions/{version}")
    page.get_by_text(f"Version {version}").first.wait_for()
    close_chat(page)


def visible_metrics(page: Page) -> dict[str, list[str]]:
    """The metrics table of an open compare view as printed: name -> one value a run, in the order of its columns."""
    names = page.locator('a[title="Plot chart"]')
    names.first.wait_for()
    keys = [key.strip() for key in names.all_inner_texts()]
    # Two grids side by side: the names, then the values row by row.
    values = names.first.locator(
        'xpath=ancestor::*[@role="grid"]/following::*[@role="grid"][1]//span'
    ).all_inner_texts()
    n_runs, rest = divmod(len(values), len(keys))
    assert rest == 0, f"{len(values)} values for the {len(keys)} metrics {keys}"
    return {key: values[i * n_runs : (i + 1) * n_runs] for i, key in enumerate(keys)}


def screenshot(page: Page, out_png: Path) -> None:
    """What the window shows, once it stands still."""
    page.wait_for_timeout(1_500)  # plotly redraws after a change, and says nothing when it is done
    out_png.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=out_png)


def capture(page: Page, out_png: Path) -> None:
    """Screenshot of the compare view with runs and metrics alone: the other sections are folded away."""
    for section in ("Visualizations", "Parameters", "Artifacts"):
        page.get_by_role("button", name=section).click()
    page.get_by_text(re.compile(r"^Comparing \d+ Runs")).scroll_into_view_if_needed()
    screenshot(page, out_png)


def experiment_id_of(tracking_uri: str, name: str = EXPERIMENT) -> str:
    """Id of an experiment."""
    experiment = MlflowClient(tracking_uri=tracking_uri).get_experiment_by_name(name)
    if experiment is None:
        raise ValueError(f"no experiment {name!r} in {tracking_uri}")
    return experiment.experiment_id


def capture_compare_view(tracking_uri: str, run_ids: Sequence[str], out_png: Path) -> dict[str, list[str]]:
    """Compare runs in MLflow's UI, save the screenshot, and return the metrics that it shows."""
    with mlflow_ui(tracking_uri) as url, chromium_page(width=1300, height=960) as page:
        open_runs(page, url, experiment_id_of(tracking_uri))
        open_compare_view(page, run_ids)
        metrics = visible_metrics(page)
        capture(page, out_png)
    return metrics


def capture_parallel_coordinates(
    tracking_uri: str, run_ids: Sequence[str], out_png: Path, *, parameters: Sequence[str], metrics: Sequence[str]
) -> list[str]:
    """Compare runs, choose the axes of the parallel coordinates, save the screenshot, and return the axes' names."""
    with mlflow_ui(tracking_uri) as url, chromium_page(width=1300, height=700) as page:
        open_runs(page, url, experiment_id_of(tracking_uri))
        open_compare_view(page, run_ids)
        axes = parallel_coordinates(page, parameters=parameters, metrics=metrics)
        screenshot(page, out_png)
    return axes


def capture_filtered(tracking_uri: str, filter_string: str, out_png: Path, *, columns: Sequence[str] = ()) -> list[str]:
    """Filter the runs, save the screenshot of the table, and return the names of the runs that it shows."""
    with mlflow_ui(tracking_uri) as url, chromium_page(width=1300, height=620) as page:
        open_runs(page, url, experiment_id_of(tracking_uri))
        names = filter_runs(page, filter_string)
        show_columns(page, columns)
        screenshot(page, out_png)
    return names


def capture_version(tracking_uri: str, name: str, version: int, out_png: Path) -> str:
    """Open the registry's page of a version, save the screenshot, and return the text that it shows."""
    with mlflow_ui(tracking_uri) as url, chromium_page(width=1300, height=1000) as page:
        open_version(page, url, name, version)
        screenshot(page, out_png)
        return page.locator("main").inner_text()


def main() -> None:
    parser = argparse.ArgumentParser(description="Screenshots of MLflow's UI over our runs, for docs/mlflow.md.")
    parser.add_argument("tracking_uri")
    parser.add_argument("backbone", metavar="NAME/VERSION", help="registered, whose adaptations fill the table")
    parser.add_argument("directory", type=Path)
    parser.add_argument("run_ids", nargs="+", metavar="RUN_ID", help="to be compared, two or more")
    parser.add_argument("--version", metavar="NAME/VERSION", help="registered, whose card is shown")
    args = parser.parse_args()
    if len(args.run_ids) < 2:
        parser.error(f"comparing takes two runs or more, not {len(args.run_ids)}")
    uri, directory = args.tracking_uri, args.directory
    for metric, values in capture_compare_view(uri, args.run_ids, directory / "mlflow-compare.png").items():
        print(metric, *values, sep="\t")
    of_backbone = f"tags.`manybrains.backbone` = '{args.backbone}' and tags.`manybrains.kind` = 'adapt'"
    metrics = ("test/voxel_r", "test/pattern_r", "test/mse")
    table = directory / "mlflow-filter.png"
    print(*capture_filtered(uri, of_backbone, table, columns=("sessions", "method", *metrics)))
    found = MlflowClient(tracking_uri=uri).search_runs([experiment_id_of(uri)], of_backbone)
    adaptations, axes = [run.info.run_id for run in found], directory / "mlflow-parallel.png"
    print(*capture_parallel_coordinates(uri, adaptations, axes, parameters=("sessions",), metrics=metrics))
    if args.version:
        name, _, version = args.version.partition("/")
        capture_version(uri, name, int(version), directory / "mlflow-version.png")


if __name__ == "__main__":
    main()
