"""`openrft ui`: Prefect's and MLflow's pages on the same data, seen in a browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

chromium = shutil.which("chromium") or shutil.which("chromium-browser")
chromedriver = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (chromium and chromedriver), reason="needs chromium and chromedriver")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pages(finished):
    """{prefect, mlflow} addresses of a running `openrft ui`."""
    _, home, _ = finished
    ports = ("--prefect-port", str(_free_port()), "--mlflow-port", str(_free_port()))
    command = [Path(sys.executable).with_name("openrft"), "ui", "--json", "--home", str(home), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield json.loads(server.stdout.readline())
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()


def _read(browser, url: str, *wanted: str) -> str:
    """The page's text once it shows all of `wanted`."""
    browser.get(url)
    deadline = time.monotonic() + 60
    text = ""
    while time.monotonic() < deadline:
        text = browser.find_element("tag name", "body").text
        if all(word in text for word in wanted):
            return text
        time.sleep(0.3)
    raise AssertionError(f"{url} does not show {wanted}; it shows:\n{text[:2000]}")


def test_prefect_shows_the_flow_run(pages, browser, finished):
    document = json.loads(finished[2].stdout)
    _read(browser, f"{pages['prefect']}/runs", "toy")
    _read(browser, f"{pages['prefect']}/runs/flow-run/{document['flow_run_id']}", "Completed")


def test_mlflow_shows_the_run_and_the_model(pages, browser, finished):
    document = json.loads(finished[2].stdout)
    experiment = _experiment(finished[1])
    run = f"{pages['mlflow']}/#/experiments/{experiment}/runs/{document['mlflow_run_id']}"
    _read(browser, run, "toy", "openrft.job_id")
    _read(browser, f"{pages['mlflow']}/#/models/toy", "Versions", "@ champion")


def _experiment(home: Path) -> str:
    from tasks.home import open_home
    from tasks.tracking import EXPERIMENT, client

    return client(open_home(str(home))).get_experiment_by_name(EXPERIMENT).experiment_id


def test_the_report_opens_without_a_network(browser, finished):
    document = json.loads(finished[2].stdout)
    text = _read(browser, Path(document["report"]).as_uri(), "95 %", "toy")
    gain = document["evaluation"]["gain"]
    assert f"{gain['mean']:+.3f}"[:5] in text.replace("−", "-")


def test_deployments_are_accepted_and_draw_the_job_form(pages, browser, finished, tmp_path):
    """deployments/prefect.yaml on a real server: three deployments; the form of `retrain` is the Job model."""
    import httpx

    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PREFECT_API_URL": f"{pages['prefect']}/api",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "OPENRFT_CODE": str(root),
        "OPENRFT_HOME": str(finished[1]),
    }
    prefect = str(Path(sys.executable).with_name("prefect"))
    file = "deployments/prefect.yaml"
    for command in (
        ["work-pool", "create", "train", "--type", "process"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", file],
    ):
        done = subprocess.run([prefect, *command], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    found = httpx.post(f"{pages['prefect']}/api/deployments/filter", json={}).json()
    by_name = {deployment["name"]: deployment for deployment in found}
    assert set(by_name) == {"retrain", "promote", "rollback"}
    schema = by_name["retrain"]["parameter_openapi_schema"]
    assert "training_file" in schema["definitions"]["Job"]["properties"]
    form = f"{pages['prefect']}/deployments/deployment/{by_name['retrain']['id']}/run"
    _read(browser, form, "Training File", "Warm Start")
