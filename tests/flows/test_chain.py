"""One command from prompts and a grader to a served champion: what it leaves behind, and doing it again."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from toy import openrft, write_toy

from tasks import registry
from tasks.home import open_home


@pytest.fixture(scope="module")
def document(finished):
    _, _, run = finished
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_better_model_comes_out(document):
    assert document["status"] == "succeeded"
    assert document["evaluation"]["gain"]["low"] > 0
    assert document["evaluation"]["best"]["reward"]["mean"] > document["evaluation"]["base"]["reward"]["mean"]
    assert document["steps"] == 30
    assert document["billing"]["seconds"] > 0
    assert document["aliases"] == ["challenger", "champion"]
    assert document["model_version"] == {"name": "toy", "version": 1}


def test_show_prints_the_same_document(finished, document):
    _, home, _ = finished
    for reference in ("latest", "toy", document["id"]):
        shown = openrft("show", reference, "--json", home=home)
        assert json.loads(shown.stdout) == {k: v for k, v in document.items() if k != "unchanged"}
    assert openrft("jobs", "--json", home=home).stdout.count(document["id"]) == 1


def test_the_bill_is_the_ledger_of_the_newest_checkpoint(finished, document):
    _, home, _ = finished
    folders = sorted((home / "jobs" / document["id"] / "checkpoints").glob("step-*"))
    ledger = json.loads((folders[-1] / "ledger.json").read_text())
    assert float(ledger["seconds"]) == document["billing"]["seconds"]
    assert [entry["step"] for entry in ledger["steps"]] == list(range(31))
    assert all("validation" in entry for entry in ledger["steps"] if entry["step"] % 5 == 0)


def test_every_checkpoint_and_the_bundle_match_their_manifests(finished, document):
    _, home, _ = finished
    manifests = [
        *home.glob("jobs/*/checkpoints/step-*/manifest.json"),
        *home.glob("models/toy/1/manifest.json"),
    ]
    assert len(manifests) >= 3
    for manifest in manifests:
        for name, facts in json.loads(manifest.read_text())["files"].items():
            assert hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() == facts["sha256"]
    bundle = json.loads((home / "models/toy/1/manifest.json").read_text())
    assert bundle["weights_sha256"] == document["weights_sha256"]
    assert not list((home / "models/toy/1").glob("*optimizer*")), (
        "a bundle holds nothing that only training needs"
    )


def test_mlflow_holds_metrics_inputs_and_reports(finished, document):
    from tasks.home import open_home
    from tasks.tracking import client

    _, home, _ = finished
    mlflow, id = client(open_home(str(home))), document["mlflow_run_id"]
    run = mlflow.get_run(id)
    assert run.info.status == "FINISHED"
    assert run.data.params["steps"] == "30"
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {
        "train",
        "validation",
        "test",
        "demonstrations",
    }
    for name in (
        "train/reward",
        "timing/sampling_seconds",
        "timing/grading_seconds",
        "timing/update_seconds",
        "billing/usd",
    ):
        assert {m.step for m in mlflow.get_metric_history(id, name)} >= set(range(1, 31)), name
    assert {m.step for m in mlflow.get_metric_history(id, "valid/reward")} == {0, 5, 10, 15, 20, 25, 30}
    assert {m.step for m in mlflow.get_metric_history(id, "timing/validation_seconds")} >= {0, 5, 30}
    billed = mlflow.get_metric_history(id, "billing/seconds")
    assert max(m.value for m in billed) == pytest.approx(document["billing"]["seconds"])
    top = {artifact.path for artifact in mlflow.list_artifacts(id)}
    assert {"report.html", "job.json", "grader.json", "calibration", "evaluation", "dataset"} <= top


def test_the_model_version_carries_its_evidence(finished, document):
    from tasks.home import open_home
    from tasks.tracking import client

    _, home, _ = finished
    mlflow = client(open_home(str(home)))
    version = mlflow.get_model_version_by_alias("toy", "champion")
    assert version.tags["openrft.job_id"] == document["id"]
    assert version.tags["openrft.weights_sha256"] == document["weights_sha256"]
    assert float(version.tags["openrft.billed_seconds"]) == document["billing"]["seconds"]
    import mlflow as package
    from mlflow.models import get_model_info

    package.set_tracking_uri(open_home(str(home)).tracking_uri)
    info = get_model_info("models:/toy@champion")
    assert info.signature is not None
    assert info.saved_input_example_info is not None


def test_prefect_holds_the_flow_and_its_tasks(finished, document):
    _, home, _ = finished
    with sqlite3.connect(home / "prefect" / "prefect.db") as db:
        query = "select name, state_type from flow_run where name in ('toy', 'toy version 1')"
        runs = dict(db.execute(query).fetchall())
        tasks = {
            name.rsplit("-", 1)[0]: state
            for name, state in db.execute("select name, state_type from task_run")
        }
        artifacts = {key for (key,) in db.execute("select distinct key from artifact")}
    assert runs == {"toy": "COMPLETED", "toy version 1": "COMPLETED"}
    assert set(tasks) >= {"validate", "warm_start", "calibrate", "train", "evaluate", "register", "deploy"}
    assert {"validate", "calibrate", "checkpoints", "evaluate"} <= artifacts


def test_again_nothing_is_run_or_billed(finished, document):
    folder, home, _ = finished
    before = {
        p: p.stat().st_mtime_ns for p in home.rglob("*") if "checkpoints" in p.parts or p.suffix == ".db"
    }
    started = time.monotonic()
    again = openrft("run", str(folder), "--json", home=home)
    assert time.monotonic() - started < 20
    assert again.returncode == 0
    assert json.loads(again.stdout) == {**document, "unchanged": True}
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_killed_trainer_goes_on_and_ends_with_the_same_weights(finished, document, tmp_path):
    """SIGKILL of the worker in the middle of training: the same weights, each step billed once."""
    folder, _, _ = finished
    home = tmp_path / "home"
    job = tmp_path / "job"
    shutil.copytree(folder, job)
    with subprocess.Popen(
        [Path(sys.executable).with_name("openrft"), "run", str(job), "--home", str(home), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        events = home / "jobs" / document["id"] / "events.jsonl"
        worker = _worker_after(events, step=12, running=running)
        worker.kill()
        out, _ = running.communicate(timeout=400)
    assert running.returncode == 0
    resumed = json.loads(out)
    assert resumed["id"] == document["id"], "the same job is the same job in another home"
    assert resumed["weights_sha256"] == document["weights_sha256"]
    written = [json.loads(line) for line in events.read_text().splitlines()]
    assert [e["step"] for e in written if e["type"] == "training_started"] == [0, 10]
    final = sorted((home / "jobs" / resumed["id"] / "checkpoints").glob("step-*"))[-1]
    ledger = json.loads((final / "ledger.json").read_text())
    assert [entry["step"] for entry in ledger["steps"]] == list(range(31))
    assert float(ledger["seconds"]) == resumed["billing"]["seconds"]


def test_killed_flow_goes_on_where_it_was_cut_off(finished, document, tmp_path):
    """SIGKILL of everything: the next run skips what is done and resumes training from its checkpoint."""
    folder, _, _ = finished
    home = tmp_path / "home"
    command = [Path(sys.executable).with_name("openrft"), "run", str(folder), "--home", str(home), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        events = home / "jobs" / document["id"] / "events.jsonl"
        worker = _worker_after(events, step=17, running=running)
        running.kill()
        running.wait()
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == "zombie", "no orphan goes on training"
    again = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    with sqlite3.connect(home / "prefect" / "prefect.db") as db:
        query = "select state_type from flow_run where parent_task_run_id is null"
        states = [state for (state,) in db.execute(query)]
    assert sorted(states) == ["COMPLETED", "CRASHED"], "the killed run does not stay `Running` for ever"
    assert not (home / "temporary-servers" / str(running.pid)).exists(), "nor does its temporary server"
    resumed = json.loads(again.stdout)
    assert resumed["weights_sha256"] == document["weights_sha256"]
    written = [json.loads(line) for line in events.read_text().splitlines()]
    assert sum(e["type"] == "stage_started" and e["stage"] == "warm_start" for e in written) == 1
    assert [e["step"] for e in written if e["type"] == "training_started"][-1] > 0


def _worker_after(events: Path, step: int, running: subprocess.Popen):
    """The training worker's process, once it has reported `step`."""
    import psutil

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert running.poll() is None, "the run ended before it could be disturbed"
        lines = events.read_text().splitlines() if events.exists() else []
        if any(f'"type": "step", "step": {step},' in line for line in lines):
            workers = [
                child
                for child in psutil.Process(running.pid).children(recursive=True)
                if "tasks.train.worker" in child.cmdline() and child.cpu_times().user > 1
            ]
            return max(workers, key=lambda w: w.cpu_times().user)
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_served_with_the_openai_client(finished, document):
    _, home, _ = finished
    command = [
        Path(sys.executable).with_name("openrft"),
        "serve",
        "--port",
        "0",
        "--json",
        "--home",
        str(home),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            announced = json.loads(server.stdout.readline())
            assert announced["models"] == ["toy", "toy@champion", "toy@challenger"]
            client = openai.OpenAI(base_url=announced["base_url"], api_key="any", max_retries=0)
            assert "toy" in [m.id for m in client.models.list()]
            rows = [
                json.loads(line) for line in (finished[0] / "data" / "test.jsonl").read_text().splitlines()
            ]
            for row in rows[:5]:
                reply = client.chat.completions.create(model="toy", messages=row["messages"], temperature=0)
                assert reply.choices[0].message.content == row["kind"]
                assert reply.choices[0].finish_reason == "stop"
                assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
            two = client.chat.completions.create(model="toy", messages=rows[0]["messages"], n=2, seed=1)
            assert len(two.choices) == 2
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                client.chat.completions.create(model="no-such", messages=rows[0]["messages"])
            with pytest.raises(openai.BadRequestError, match="stream"):
                client.chat.completions.create(model="toy", messages=rows[0]["messages"], stream=True)
            plain = {
                "temperature": 0,
                "top_p": 1,
                "frequency_penalty": 0,
                "response_format": {"type": "text"},
            }
            parts = [
                {"role": "user", "content": [{"type": "text", "text": rows[0]["messages"][0]["content"]}]}
            ]
            reply = client.chat.completions.create(model="toy", messages=parts, **plain)
            assert reply.choices[0].message.content == rows[0]["kind"], "what changes nothing is accepted"
            with pytest.raises(openai.BadRequestError, match=r"top_p.*only 1\.0 is supported"):
                client.chat.completions.create(model="toy", messages=rows[0]["messages"], top_p=0.5)
            with pytest.raises(openai.BadRequestError, match="messages"):
                client.chat.completions.create(model="toy", messages=[])
        finally:
            server.terminate()
            server.wait(20)


def test_second_version_rollback_and_promote(finished, document, tmp_path):
    """A job that differs makes version 2; it must beat the champion to replace it; rollback goes back."""
    _, home, _ = finished
    copied = tmp_path / "home"
    shutil.copytree(home, copied)
    assert openrft("rollback", "toy", home=copied).returncode == 2, "there is no previous champion yet"
    rival = write_toy(tmp_path / "rival", seed=6)
    run = openrft("run", str(rival), "--json", home=copied)
    assert run.returncode == 0, run.stderr
    second = json.loads(run.stdout)
    assert second["model_version"]["version"] == 2
    assert second["aliases"] == ["challenger"], "equal to the champion is not better than the champion"
    refused = openrft("promote", second["id"], home=copied)
    assert refused.returncode == 1
    assert "the champion stays" in refused.stderr
    assert "Traceback" not in refused.stderr
    registry.make_champion(open_home(str(copied)), "toy", 2, "moved by hand")
    back = openrft("rollback", "toy", "--json", home=copied)
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout) == {"model": "toy", "champion": 1, "was": 2}
    served = json.loads((copied / "models/toy/aliases.json").read_text())
    assert served == {"challenger": 2, "champion": 1, "previous": 2}, "what is served follows the registry"
    moves = [json.loads(line) for line in (copied / "models/toy/history.jsonl").read_text().splitlines()]
    assert [(m["from"], m["to"]) for m in moves if m["alias"] == "champion"] == [(None, 1), (1, 2), (2, 1)]
    assert all(m["who"] and m["why"] for m in moves)


def test_bundles_are_refused_when_a_byte_is_wrong(finished, tmp_path):
    _, home, _ = finished
    copied = tmp_path / "home"
    shutil.copytree(home / "models", copied / "models")
    weights = next((copied / "models" / "toy" / "1").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    served = openrft("serve", "--port", "0", home=copied)
    assert served.returncode == 1
    assert "SHA-256" in served.stderr
    assert "Traceback" not in served.stderr
