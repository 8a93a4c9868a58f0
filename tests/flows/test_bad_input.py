"""Bad input: one clear message, the right exit code, no traceback, nothing half-written, nothing billed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from toy import openrft, write_toy


def refused(folder: Path, home: Path, *verb: str) -> str:
    """The message of a refused command; checks what holds for all of them."""
    run = openrft(*(verb or ("run",)), str(folder), home=home)
    assert run.returncode == 2, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr}"
    assert "Traceback" not in run.stderr + run.stdout
    assert not list(home.rglob("*.part")), "no half-written file stays behind"
    assert not list(home.rglob("ledger.json")), "nothing is billed"
    return run.stderr


def edit(folder: Path, change) -> None:
    job = yaml.safe_load((folder / "job.yaml").read_text())
    change(job)
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "job")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_no_job_file(tmp_path, home):
    assert "no such file" in refused(tmp_path / "nowhere", home)


def test_unknown_key_names_line_and_nearest(toy, home):
    edit(toy, lambda job: job["sampling"].update(temprature=1))
    message = refused(toy, home)
    line = next(
        n for n, text in enumerate((toy / "job.yaml").read_text().splitlines(), 1) if "temprature" in text
    )
    assert f"job.yaml:{line}: unknown key `sampling.temprature`. Did you mean `temperature`?" in message


def test_missing_dataset(toy, home):
    (toy / "data" / "test.jsonl").unlink()
    message = refused(toy, home)
    assert "test.jsonl" in message
    assert "train.jsonl" in message, "what is there is named"


def test_empty_dataset(toy, home):
    (toy / "data" / "train.jsonl").write_text("")
    assert "is empty" in refused(toy, home)


def test_malformed_line(toy, home):
    file = toy / "data" / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[6] = lines[6][:-3]
    file.write_text("\n".join(lines))
    for verb in ("run", "validate"):
        message = refused(toy, home, verb)
        assert "train.jsonl: line 7: not JSON" in message


def test_template_names_a_field_that_no_row_has(toy, home):
    grader = json.loads((toy / "grader.json").read_text())
    grader["reference"] = "{{item.knid}}"
    (toy / "grader.json").write_text(json.dumps(grader))
    message = refused(toy, home)
    assert "knid" in message
    assert "kind" in message, "the nearest valid name"


def test_a_field_that_one_row_lacks_is_a_finding(toy, home):
    file = toy / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    del rows[4]["kind"]
    file.write_text("\n".join(map(json.dumps, rows)))
    run = openrft("validate", str(toy), "--json", home=home)
    assert run.returncode == 2
    [finding] = [f for f in json.loads(run.stdout)["findings"] if f["severity"] == "critical"]
    assert finding["check"] == "grader_fields"
    assert finding["lines"] == [5]


def test_broken_grader_file(toy, home):
    (toy / "grader.json").write_text('{"type": "string_chek", "name": "x"}')
    message = refused(toy, home)
    assert "string_chek" in message
    assert "string_check" in message


def test_unknown_rate_card(toy, home):
    edit(toy, lambda job: job.update(budget={"rate_card": "opnai"}))
    assert "Did you mean `openai`?" in refused(toy, home)


def test_unreachable_store(toy, tmp_path):
    run = openrft(
        "run",
        str(toy),
        "--home",
        "s3://bucket/prefix",
        home=tmp_path / "unused",
        OPENRFT_STATE=str(tmp_path / "state"),
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_MAX_ATTEMPTS="1",
    )
    assert run.returncode == 1
    assert "cannot be reached" in run.stderr
    assert "Traceback" not in run.stderr


def test_unknown_job_and_model(finished):
    _, home, _ = finished
    shown = openrft("show", "nope", home=home)
    assert shown.returncode == 2
    assert "toy" in shown.stderr, "what exists is named"
    rolled = openrft("rollback", "tyo", home=home)
    assert rolled.returncode == 2
    assert "Did you mean `toy`?" in rolled.stderr


def test_serve_before_anything_was_deployed(tmp_path):
    run = openrft("serve", home=tmp_path / "home")
    assert run.returncode == 1
    assert "no deployed model" in run.stderr


def test_tiny_needs_a_warm_start_and_a_home_that_can_be_written(toy, tmp_path, home):
    edit(toy, lambda job: job.update(model="tinny"))
    assert "Did you mean `tiny`?" in refused(toy, home)
    edit(toy, lambda job: (job.update(model="tiny"), job.pop("warm_start")))
    assert "warm_start" in refused(toy, home)
    (tmp_path / "file").write_text("")
    run = openrft("validate", str(toy), "--home", str(tmp_path / "file"), home=home)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def test_a_folder_of_any_name_names_its_model(tmp_path, home):
    folder = write_toy(tmp_path / "my jöb (1) & co's %20")
    edit(folder, lambda job: job.pop("suffix"))
    assert openrft("validate", str(folder), home=home).returncode == 0
    [job] = json.loads(openrft("jobs", "--json", home=home).stdout)
    assert job["name"] == "my-j-b-1-co-s-20"
