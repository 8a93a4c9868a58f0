"""The verdict on graded completions, and the expected best of k against trying every choice."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.calibrate import best_of, judge
from tasks.job import Calibration
from tasks.rollout import Rollout

REWARD = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def rollouts(by_row: list[list[float | None]], errors: list[str] | None = None) -> list[Rollout]:
    return [
        Rollout(
            row=row,
            sample=number,
            text="x",
            tokens=1,
            truncated=False,
            reward=reward,
            errors=(errors or ["python_grader_runtime_error"]) if reward is None else [],
            details={"f1": "Traceback\nZeroDivisionError: division by zero\n"} if reward is None else {},
            grade_seconds=0.001 * (number + 1),
        )
        for row, rewards in enumerate(by_row)
        for number, reward in enumerate(rewards)
    ]


def verdict(by_row, **settings):
    samples = len(by_row[0])
    return judge(rollouts(by_row), Calibration(samples=samples, **settings), 1.0, 2.5)


@given(st.lists(st.lists(REWARD, min_size=1, max_size=6), min_size=1, max_size=4), st.integers(1, 8))
def test_best_of_is_the_mean_over_every_choice(by_row, k):
    def by_hand(rewards: list[float]) -> float:
        return statistics.fmean(max(c) for c in itertools.combinations(rewards, min(k, len(rewards))))

    assert best_of(by_row, k) == pytest.approx(statistics.fmean(by_hand(r) for r in by_row))


def test_best_of_ends():
    by_row = [[0.0, 1.0, 0.5], [0.2, 0.2, 0.2]]
    assert best_of(by_row, 1) == pytest.approx((0.5 + 0.2) / 2)
    assert best_of(by_row, 3) == pytest.approx((1.0 + 0.2) / 2)
    assert best_of([[], [1.0, 0.0]], 1) == pytest.approx(0.5)  # a row without a grade has no say


def test_a_fit_grader():
    report = verdict([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.5, 0.0]])
    assert report.ok
    assert report.reasons == []
    assert (report.rows, report.samples, report.seconds) == (3, 4, 2.5)
    assert report.mean == pytest.approx(5 / 12)
    assert report.std == pytest.approx(statistics.pstdev([0, 1, 1, 1, 0, 0, 0, 0, 1, 0.5, 0.5, 0]))
    assert report.pass_rate == pytest.approx(4 / 12)
    assert report.signal_share == pytest.approx(2 / 3)
    assert list(report.best_of) == [1, 2, 4]
    assert report.best_of[4] == pytest.approx(2 / 3)
    assert list(report.best_of.values()) == sorted(report.best_of.values())
    assert report.errors == {}
    assert (report.grade_seconds_p50, report.grade_seconds_p95) == (0.003, 0.004)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_one_score_for_all_teaches_nothing(value):
    report = verdict([[value] * 4] * 5)
    assert not report.ok
    assert f"every completion scored {value:g}" in report.reasons[0]
    assert "warm-start" in report.reasons[0]
    assert report.signal_share == 0


def test_rows_that_differ_only_from_each_other_teach_nothing():
    report = verdict([[0.0] * 4, [1.0] * 4, [0.5] * 4])
    assert not report.ok
    assert "only 0% of rows" in report.reasons[0]


@pytest.mark.parametrize(("with_signal", "ok"), [(0, False), (1, False), (2, True), (3, True)])
def test_least_share_of_rows_with_signal(with_signal, ok):
    by_row = [[0.0, 1.0]] * with_signal + [[1.0, 1.0]] * (10 - with_signal - 1) + [[0.0, 0.0]]
    assert verdict(by_row, min_signal_share=0.2).ok is ok


@pytest.mark.parametrize("limit", [0.1, 0.2, 0.3, 0.6, 0.7])
def test_ungradable_up_to_the_limit_is_allowed_and_not_one_more(limit):
    failed = round(limit * 10)
    graded: list[float | None] = [0.0, 1.0, 0.5, 1.0, 0.0, 0.5, 0.25, 1.0, 0.0, 0.5]
    at_limit = [None] * failed + graded[failed:]
    assert verdict([at_limit], max_error_share=limit).ok
    beyond = [None] * (failed + 1) + graded[failed + 1 :]
    report = verdict([beyond], max_error_share=limit)
    assert not report.ok
    assert "could not be graded" in report.reasons[0]
    assert "ZeroDivisionError: division by zero" in report.reasons[0]


def test_what_could_not_be_graded_is_left_out_and_counted():
    report = verdict([[None, 1.0, 0.0, None], [None, None, None, None]], max_error_share=1.0)
    assert report.mean == 0.5
    assert report.errors == {"python_grader_runtime_error": 0.75}
    assert report.signal_share == 0.5
    assert report.best_of[4] == 1.0


def test_nothing_gradable_at_all():
    report = verdict([[None, None], [None, None]], max_error_share=1.0)
    assert not report.ok
    assert (report.mean, report.std, report.pass_rate, report.best_of) == (None, None, None, {})
