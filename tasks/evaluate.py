"""Evaluation: the base and every retained checkpoint on held-out rows, with paired intervals.

The best checkpoint is chosen by validation reward and only confirmed here: nothing is chosen on test.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

from tasks.dataset import load_rows
from tasks.intervals import bootstrap
from tasks.model import load_model, load_tokenizer_from, seed_everything, start_source
from tasks.results import CheckpointInfo, Comparison, EvaluationReport, ModelScore, Resolved, TrainingResult
from tasks.rollout import Rollout, groups, roll_out
from tasks.run import Run
from tasks.store import get_folder
from tasks.train import checkpoint


@dataclass
class Scores:
    """Per test row: mean reward and pass rate over samples, and those of the greedy answer."""

    reward: list[float]
    passed: list[float]
    greedy_reward: list[float]
    greedy_passed: list[float]
    tokens: float
    ungraded: int
    greedy: list[Rollout]


def evaluate(run: Run) -> EvaluationReport:
    """Score base and checkpoints on the test file; keep every answer in evaluation/."""
    started = time.perf_counter()
    settings = run.job.evaluation
    resolved = Resolved.model_validate(run.record.stages["validate"]["resolved"])
    training = TrainingResult.model_validate(run.record.stages["train"])
    seed_everything(run.job.seed, resolved.threads)
    rows = load_rows(run.dataset("test"))
    best_step = training.best_step
    contenders: list[tuple[str, int, str, CheckpointInfo | None]] = [("base", 0, start_source(run), None)]
    contenders += [
        (checkpoint.name_of(info.step), info.step, _checkpoint_folder(run, info.step), info)
        for info in training.checkpoints
    ]
    scores: dict[int, Scores] = {}
    with run.load_grader() as grader:
        for number, (_, step, source, _) in enumerate(contenders):
            scores[step] = score(run, resolved, source, grader, rows)
            run.emit("evaluation", step=number + 1, steps=len(contenders))

    def summary(name: str, step: int, info: CheckpointInfo | None) -> ModelScore:
        s = scores[step]
        return ModelScore(
            name=name,
            step=step,
            reward=_interval(run, s.reward),
            pass_rate=_interval(run, s.passed),
            greedy_reward=_interval(run, s.greedy_reward),
            greedy_pass_rate=_interval(run, s.greedy_passed),
            valid_reward=info.valid_reward if info else None,
            completion_tokens=s.tokens,
            ungraded=s.ungraded,
        )

    models = [summary(name, step, info) for name, step, _, info in contenders]
    gain = _interval(run, _difference(scores[best_step].reward, scores[0].reward))
    greedy_gain = _interval(run, _difference(scores[best_step].greedy_reward, scores[0].greedy_reward))
    ok = gain.low > 0
    report = EvaluationReport(
        rows=len(rows),
        samples=settings.samples,
        base=models[0],
        best=next(m for m in models if m.step == best_step),
        candidates=models[1:],
        gain=gain,
        greedy_gain=greedy_gain,
        ok=ok,
        reason=(
            f"reward changes by {gain.mean:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f}) on {len(rows)} "
            f"held-out rows"
            + ("" if ok else ": the interval does not lie above zero, so no improvement is shown")
        ),
        seconds=time.perf_counter() - started,
    )
    _keep(run, rows, scores[0], scores[best_step])
    run.path("evaluation", "report.json").write_text(report.model_dump_json(indent=1), "utf-8")
    run.publish("evaluation")
    return report


def compare(run: Run, champion: str) -> Comparison:
    """The job's best checkpoint against the deployed champion (a store key), paired on the job's test rows."""
    settings = run.job.evaluation
    resolved = Resolved.model_validate(run.record.stages["validate"]["resolved"])
    seed_everything(run.job.seed, resolved.threads)
    rows = load_rows(run.dataset("test"))
    folder = get_folder(run.home.store, champion, run.home.scratch(champion))
    run.fetch("evaluation/answers.jsonl")
    answers = run.path("evaluation", "answers.jsonl").read_text("utf-8").splitlines()
    challenger = [json.loads(line)["best"]["mean_reward"] for line in answers]
    with run.load_grader() as grader:
        theirs = score(run, resolved, str(folder), grader, rows).reward
    gain = bootstrap(_difference(challenger, theirs), settings.bootstrap, run.job.seed)
    return Comparison(champion=champion, rows=len(rows), gain=gain, ok=gain.low > run.job.promotion.min_gain)


def score(run: Run, resolved: Resolved, source: str, grader: Any, rows: list[dict[str, Any]]) -> Scores:
    """Sampled and greedy answers of the model at `source` to all rows, graded."""
    settings = run.job.evaluation
    tokenizer = load_tokenizer_from(source)
    model = load_model(source, resolved.device)

    def draw(samples: int, temperature: float) -> list[Rollout]:
        return roll_out(
            model,
            tokenizer,
            grader,
            rows,
            samples=samples,
            temperature=temperature,
            max_new_tokens=resolved.max_completion_tokens,
            seed=run.job.seed + 1,
        )

    sampled, greedy = draw(settings.samples, settings.temperature), draw(1, 0.0)
    threshold = settings.pass_threshold
    return Scores(
        reward=_per_row(sampled, lambda reward: reward),
        passed=_per_row(sampled, lambda reward: float(reward >= threshold)),
        greedy_reward=_per_row(greedy, lambda reward: reward),
        greedy_passed=_per_row(greedy, lambda reward: float(reward >= threshold)),
        tokens=statistics.fmean(r.tokens for r in sampled),
        ungraded=sum(r.reward is None for r in sampled),
        greedy=greedy,
    )


def _per_row(rollouts: list[Rollout], value: Any) -> list[float]:
    """Mean of `value(reward)` over each row's samples. What could not be graded counts 0: it is of no use
    to whoever asked."""
    return [
        statistics.fmean(value(r.reward if r.reward is not None else 0.0) for r in group)
        for group in groups(rollouts)
    ]


def _difference(after: list[float], before: list[float]) -> list[float]:
    return [a - b for a, b in zip(after, before, strict=True)]


def _interval(run: Run, per_row: list[float]) -> Any:
    return bootstrap(per_row, run.job.evaluation.bootstrap, run.job.seed)


def _checkpoint_folder(run: Run, step: int) -> str:
    """The checkpoint, verified; fetched when the job has moved to another machine."""
    name = checkpoint.name_of(step)
    return str(get_folder(run.home.store, f"{run.key}/checkpoints/{name}", run.path("checkpoints", name)))


def _keep(run: Run, rows: list[dict[str, Any]], base: Scores, best: Scores) -> None:
    """evaluation/answers.jsonl: both models' greedy answers to every test row, side by side."""
    lines = [
        json.dumps(
            {
                "row": number,
                "item": row,
                "base": {"text": b.text, "reward": b.reward, "mean_reward": base.reward[number]},
                "best": {"text": a.text, "reward": a.reward, "mean_reward": best.reward[number]},
            },
            ensure_ascii=False,
        )
        for number, (row, b, a) in enumerate(zip(rows, base.greedy, best.greedy, strict=True))
    ]
    target = run.path("evaluation", "answers.jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", "utf-8")
