"""MLflow's own UI in headless Chromium: tick runs of an experiment, press Compare, look.

python tests/e2e/mlflow_compare.py TRACKING_URI EXPERIMENT OUT.png [RUN_ID ...]
"""

import argparse
import contextlib
import os
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
from playwright.sync_api import Page, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

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


def open_compare_view(page: Page, url: str, experiment_id: str, run_ids: Sequence[str]) -> None:
    """Walk to the compare view as a user does: Model training, the experiment's runs, tick, Compare."""
    page.goto(f"{url}/#/experiments/{experiment_id}/runs")
    # MLflow opens every experiment as a GenAI one, with a chat panel, until the browser has been told otherwise.
    page.get_by_role("button", name="Model training").click()
    page.get_by_role("link", name="Runs", exact=True).click()
    with contextlib.suppress(PlaywrightTimeout):
        page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]').click(timeout=5_000)
    for run_id in run_ids:
        page.locator(f'[row-id="{run_id}"]').get_by_role("checkbox", name="toggle row selection").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text(f"Comparing {len(run_ids)} Runs").wait_for()
    page.get_by_role("switch", name="Metrics - Show diff only").wait_for()


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


def capture(page: Page, out_png: Path) -> None:
    """Screenshot of the compare view, grown until nothing is scrolled away, with the parameters that differ."""
    page.get_by_role("switch", name="Parameters - Show diff only").click()
    hidden = page.evaluate(
        """() => Math.max(0, ...Array.from(document.querySelectorAll("*"))
            .filter(e => ["auto", "scroll"].includes(getComputedStyle(e).overflowY) && e.clientHeight > 500)
            .map(e => e.scrollHeight - e.clientHeight))"""
    )
    size = page.viewport_size
    assert size is not None
    page.set_viewport_size({"width": size["width"], "height": min(size["height"] + hidden, 2400)})
    page.wait_for_timeout(1_500)  # plotly redraws after a resize, and says nothing when it is done
    out_png.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=out_png)


def capture_compare_view(
    tracking_uri: str, experiment_name: str, run_ids: Sequence[str], out_png: Path
) -> dict[str, list[str]]:
    """Compare runs of an experiment in MLflow's UI, save the screenshot, and return the metrics that it shows."""
    experiment = MlflowClient(tracking_uri=tracking_uri).get_experiment_by_name(experiment_name)
    if experiment is None:
        raise ValueError(f"no experiment {experiment_name!r} in {tracking_uri}")
    with mlflow_ui(tracking_uri) as url, chromium_page() as page:
        open_compare_view(page, url, experiment.experiment_id, run_ids)
        metrics = visible_metrics(page)
        capture(page, out_png)
    return metrics


def newest_runs(tracking_uri: str, experiment_name: str, n_runs: int = 3) -> list[str]:
    """Ids of the newest finished runs of an experiment."""
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        raise ValueError(f"no experiment {experiment_name!r} in {tracking_uri}")
    runs = client.search_runs(
        [experiment.experiment_id],
        filter_string="attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=n_runs,
    )
    return [run.info.run_id for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description="Screenshot of MLflow's compare view over runs of an experiment.")
    parser.add_argument("tracking_uri")
    parser.add_argument("experiment")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "run_ids", nargs="*", metavar="RUN_ID", help="at least two; without them the newest three finished"
    )
    args = parser.parse_args()
    run_ids = args.run_ids or newest_runs(args.tracking_uri, args.experiment)
    if len(run_ids) < 2:
        parser.error(f"comparing takes two runs or more, not {len(run_ids)}")
    for name, values in capture_compare_view(args.tracking_uri, args.experiment, run_ids, args.out).items():
        print(name, *values, sep="\t")


if __name__ == "__main__":
    main()
