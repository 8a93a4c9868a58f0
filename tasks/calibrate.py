"""Calibration: is this grader fit to train this model on this data? Answered before a second is billed."""

from __future__ import annotations

import statistics
import time
from math import comb

from tasks.job import Calibration
from tasks.model import draw_rows, load_model, load_tokenizer_from, seed_everything, start_source
from tasks.results import CalibrationReport, Resolved
from tasks.rollout import Rollout, error_shares, groups, roll_out
from tasks.run import Run
from tasks.train.rollouts import RolloutLog


def calibrate(run: Run) -> CalibrationReport:
    """Sample completions from the model that RFT will start from, grade them, and judge the grades."""
    started = time.perf_counter()
    settings = run.job.calibration
    resolved = Resolved.model_validate(run.record.stages["validate"]["resolved"])
    seed_everything(run.job.seed, resolved.threads)
    source = start_source(run)
    tokenizer = load_tokenizer_from(source)
    model = load_model(source, resolved.device)
    rows = draw_rows(run, "train", settings.rows)
    with run.load_grader() as grader:
        rollouts = roll_out(
            model,
            tokenizer,
            grader,
            rows,
            samples=settings.samples,
            temperature=run.job.sampling.temperature,
            max_new_tokens=resolved.max_completion_tokens,
            seed=run.job.seed,
            progress=lambda done, total: run.emit("calibration", step=done, steps=total),
        )
    log = RolloutLog(run.path("calibration"))
    log.add("calibration", 0, rollouts, rows)
    log.flush(0)
    report = judge(rollouts, settings, run.job.evaluation.pass_threshold, time.perf_counter() - started)
    run.path("calibration", "report.json").write_text(report.model_dump_json(indent=1), "utf-8")
    run.publish("calibration")
    return report


def judge(
    rollouts: list[Rollout], settings: Calibration, pass_threshold: float, seconds: float
) -> CalibrationReport:
    """The verdict on graded completions; `seconds` is what sampling and grading took."""
    rewards = [r.reward for r in rollouts if r.reward is not None]
    by_row = [[r.reward for r in group if r.reward is not None] for group in groups(rollouts)]
    signal = sum(len(set(group)) > 1 for group in by_row) / len(by_row)
    ungraded = (len(rollouts) - len(rewards)) / len(rollouts)
    seconds_each = sorted(r.grade_seconds for r in rollouts)
    reasons = []
    if ungraded > settings.max_error_share:
        detail = next((d for r in rollouts for d in r.details.values() if d), "")
        last = detail.strip().splitlines()[-1] if detail.strip() else "no detail"
        reasons.append(
            f"{ungraded:.0%} of completions could not be graded (limit {settings.max_error_share:.0%}): {last}. "
            "Fix the grader; `openrft grade` tries it on saved completions."
        )
    elif not rewards or len(set(rewards)) == 1:
        value = f"{rewards[0]:g}" if rewards else "no reward"
        reasons.append(
            f"every completion scored {value}: there is nothing to learn from. "
            "Give partial credit, use easier rows, or warm-start on better demonstrations."
        )
    elif signal < settings.min_signal_share:
        reasons.append(
            f"only {signal:.0%} of rows have completions that differ in reward (at least "
            f"{settings.min_signal_share:.0%} needed): raise sampling.temperature or the group size, "
            "or choose rows that the model solves sometimes."
        )
    return CalibrationReport(
        ok=not reasons,
        reasons=reasons,
        rows=len(by_row),
        samples=settings.samples,
        mean=statistics.fmean(rewards) if rewards else None,
        std=statistics.pstdev(rewards) if rewards else None,
        pass_rate=sum(r >= pass_threshold for r in rewards) / len(rewards) if rewards else None,
        signal_share=signal,
        best_of={k: best_of(by_row, k) for k in _ladder(settings.samples) if rewards},
        errors=error_shares(rollouts),
        grade_seconds_p50=seconds_each[len(seconds_each) // 2],
        grade_seconds_p95=seconds_each[int(len(seconds_each) * 0.95)],
        seconds=seconds,
    )


def best_of(by_row: list[list[float]], k: int) -> float:
    """Mean over rows of the expected best of `k` samples drawn without replacement from the row's n.

    Of n sorted rewards the i-th is the best of k with probability C(i, k-1) / C(n, k).
    """
    means = []
    for rewards in by_row:
        n, take = len(rewards), min(k, len(rewards))
        if n:
            ranked = sorted(rewards)
            means.append(sum(comb(i, take - 1) * r for i, r in enumerate(ranked)) / comb(n, take))
    return statistics.fmean(means)


def _ladder(samples: int) -> list[int]:
    return sorted({1, samples, *[2**i for i in range(1, 10) if 2**i < samples]})
