"""A grader that cannot be trained on ends the job before a second is billed, with the reason."""

from __future__ import annotations

import json

import pytest
from toy import openrft, write_toy


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def grade(sample, item):\n    return 1.0", "every completion scored 1"),
        ("def grade(sample, item):\n    raise ValueError('broken ' + item['kind'])", "could not be graded"),
    ],
    ids=["constant", "raises"],
)
def test_calibration_refuses(tmp_path, source, reason):
    folder = write_toy(tmp_path / "job", warm_start={"file": "data/demonstrations.jsonl", "epochs": 1})
    (folder / "grader.json").write_text(json.dumps({"type": "python", "name": "g", "source": source}))
    home = tmp_path / "home"
    run = openrft("run", str(folder), home=home)
    assert run.returncode == 1
    assert "stopped after calibrate" in run.stderr
    assert reason in run.stderr
    assert "Traceback" not in run.stderr.split("Failed:")[0]
    shown = json.loads(openrft("show", "latest", "--json", home=home).stdout)
    assert shown["status"] == "failed"
    assert shown["error"]["code"] == "gate_closed"
    assert shown["billing"] == {
        "seconds": 0.0,
        "usd": 0.0,
        "rate_card": "openai",
        "rounding": "hundredth_hour",
    }
    report = (home / "jobs" / shown["id"] / "report.html").read_text()
    assert reason in report
