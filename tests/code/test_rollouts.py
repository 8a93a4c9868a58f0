"""The log of graded completions: nothing lost, nothing twice, across flushes and resumes."""

from __future__ import annotations

import json
import os

import pytest

from tasks.errors import StageFailed
from tasks.rollout import Rollout, error_shares, groups, refuse_broken_grader
from tasks.train.rollouts import RolloutLog, read_rollouts

ROWS = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "first?"}]},
    {"messages": [{"role": "user", "content": "second?"}]},
]


def rollout(row=0, sample=0, reward: float | None = 1.0, **changes) -> Rollout:
    failed = ["python_grader_runtime_error"] if reward is None else []
    values = {"text": f"{row}/{sample}", "tokens": 3, "truncated": False, "errors": failed, **changes}
    return Rollout(row=row, sample=sample, reward=reward, **values)


def test_round_trip(tmp_path):
    log = RolloutLog(tmp_path)
    one = rollout(1, 2, 0.25, sub_rewards={"f1": 0.5, "b": None}, details={"f1": "ü\n"}, grade_seconds=0.5)
    log.add("train", 3, [one, rollout(0, 0, None)], ROWS)
    log.flush(3)
    first, second = read_rollouts(tmp_path)
    assert first == {
        "split": "train",
        "step": 3,
        "row": 1,
        "sample": 2,
        "text": "1/2",
        "tokens": 3,
        "truncated": False,
        "reward": 0.25,
        "sub_rewards": json.dumps({"f1": 0.5, "b": None}),
        "errors": [],
        "details": json.dumps({"f1": "ü\n"}),
        "grade_seconds": 0.5,
        "prompt": "second?",
    }
    assert second["reward"] is None
    assert second["errors"] == ["python_grader_runtime_error"]
    assert second["prompt"] == "first?"


def test_files_are_named_by_their_steps_and_read_in_order(tmp_path):
    log = RolloutLog(tmp_path / "rollouts")
    for step in (1, 2, 9, 10, 11, 100):
        log.add("train", step, [rollout(sample=step)], ROWS)
        if step in (2, 10, 100):
            log.flush(step)
    assert sorted(os.listdir(tmp_path / "rollouts")) == [
        "step-000001-000002.parquet",
        "step-000009-000010.parquet",
        "step-000011-000100.parquet",
    ]
    assert [r["step"] for r in read_rollouts(tmp_path / "rollouts")] == [1, 2, 9, 10, 11, 100]


def test_flush_without_anything_writes_nothing(tmp_path):
    RolloutLog(tmp_path / "r").flush(3)
    assert not (tmp_path / "r").exists()
    assert read_rollouts(tmp_path / "r") == []


def test_flushed_rows_are_not_written_again(tmp_path):
    log = RolloutLog(tmp_path)
    log.add("train", 1, [rollout()], ROWS)
    log.flush(1)
    log.flush(2)
    log.add("train", 3, [rollout()], ROWS)
    log.flush(3)
    assert [r["step"] for r in read_rollouts(tmp_path)] == [1, 3]


def test_a_resumed_run_neither_loses_nor_repeats(tmp_path):
    """Files are written just before their checkpoint: a kill between the two leaves a file too many."""
    lost = RolloutLog(tmp_path)
    for step in range(1, 7):
        lost.add("train", step, [rollout(sample=step, text="first attempt")], ROWS)
        if step % 2 == 0:
            lost.flush(step)
    resumed = RolloutLog(tmp_path)
    resumed.truncate(4)  # the checkpoint of step 6 was never sealed
    for step in (5, 6):
        resumed.add("train", step, [rollout(sample=step, text="second attempt")], ROWS)
    resumed.flush(6)
    rows = read_rollouts(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [r["text"] for r in rows] == ["first attempt"] * 4 + ["second attempt"] * 2
    resumed.truncate(0)
    assert read_rollouts(tmp_path) == []


def test_a_half_written_file_is_not_read(tmp_path):
    (tmp_path / "step-000001-000002.part").write_bytes(b"PAR1")
    assert read_rollouts(tmp_path) == []


def test_files_of_mixed_content_read_together(tmp_path):
    """One file without a single error or reward has other Arrow types than the next."""
    log = RolloutLog(tmp_path)
    log.add("train", 1, [rollout(reward=None)] * 2, ROWS)
    log.flush(1)
    log.add("valid", 2, [rollout(reward=0.5)], ROWS)
    log.flush(2)
    assert [r["reward"] for r in read_rollouts(tmp_path)] == [None, None, 0.5]
    assert [r["errors"] for r in read_rollouts(tmp_path)] == [["python_grader_runtime_error"]] * 2 + [[]]


def test_ungraded_share_is_of_this_step_of_training(tmp_path):
    log = RolloutLog(tmp_path)
    assert log.ungraded_share(1) == 0
    log.add("train", 1, [rollout(reward=None)], ROWS)
    log.add("train", 2, [rollout(reward=None), rollout(), rollout(), rollout()], ROWS)
    log.add("valid", 2, [rollout(reward=None)] * 4, ROWS)
    assert log.ungraded_share(2) == 0.25
    assert log.ungraded_share(1) == 1.0


def test_groups_gather_rows_in_order_of_first_sight():
    given = [rollout(2, 0), rollout(0, 0), rollout(2, 1), rollout(1, 0), rollout(0, 1)]
    assert [[(r.row, r.sample) for r in g] for g in groups(given)] == [
        [(2, 0), (2, 1)],
        [(0, 0), (0, 1)],
        [(1, 0)],
    ]


def test_error_shares_count_rollouts():
    given = [
        rollout(reward=None, errors=["b", "a"]),
        rollout(reward=None, errors=["a"]),
        rollout(),
        rollout(),
    ]
    assert error_shares(given) == {"a": 0.5, "b": 0.25}
    assert list(error_shares(given)) == ["a", "b"]


@pytest.mark.parametrize(
    ("failed", "limit", "refused"), [(3, 0.3, False), (4, 0.3, True), (10, 1.0, False), (0, 0.1, False)]
)
def test_a_broken_grader_is_refused_beyond_the_limit(failed, limit, refused):
    given = [rollout(reward=None, details={"g": "Traceback\nKeyError: 'x'"})] * failed + [rollout()] * (
        10 - failed
    )
    if not refused:
        refuse_broken_grader(given, limit, "step 3")
        return
    with pytest.raises(StageFailed) as caught:
        refuse_broken_grader(given, limit, "step 3")
    message = str(caught.value)
    assert message.startswith(
        "step 3: 4 of 10 completions could not be graded (python_grader_runtime_error 40%)"
    )
    assert "KeyError: 'x'" in message
