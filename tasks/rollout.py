"""Sample completions and grade them: what calibration, validation and evaluation have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tasks.errors import StageFailed

# Prompts × samples decoded and graded between two reports of progress.
CHUNK = 512


@dataclass
class Rollout:
    """One graded completion of one row."""

    row: int
    sample: int
    text: str
    tokens: int
    truncated: bool
    reward: float | None
    sub_rewards: dict[str, float | None] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    grade_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sample_dict(text: str, truncated: bool = False) -> dict[str, Any]:
    """The grader's `sample` for a completion, in Chat Completions' shape."""
    from graders import sample_from_text

    sample = sample_from_text(text)
    for choice in sample.get("choices") or []:
        choice["finish_reason"] = "length" if truncated else "stop"
    return sample


def grade_rollouts(grader: Any, rows: list[dict[str, Any]], rollouts: list[Rollout]) -> None:
    """Fill in the grades. `rollout.row` indexes `rows`."""
    grades = grader.grade([(rows[r.row], sample_dict(r.text, r.truncated)) for r in rollouts])
    for rollout, grade in zip(rollouts, grades, strict=True):
        rollout.reward = grade.reward
        rollout.sub_rewards = dict(grade.sub_rewards)
        rollout.errors = list(grade.errors)
        rollout.details = dict(grade.details)
        rollout.grade_seconds = grade.seconds


def roll_out(
    model: Any,
    tokenizer: Any,
    grader: Any,
    rows: list[dict[str, Any]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Rollout]:
    """`samples` graded completions of each row, in row order. The global random state is untouched.

    `progress(done, total)` is called after each chunk of completions.
    """
    import torch

    from tasks.model import encode, stop_ids
    from tasks.train.sampler import sample

    stops = stop_ids(model, tokenizer)
    prompts = encode(tokenizer, rows)
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    rollouts: list[Rollout] = []
    per_chunk = max(1, CHUNK // samples)
    for start in range(0, len(rows), per_chunk):
        indices = range(start, min(start + per_chunk, len(rows)))
        completions = sample(
            model,
            [prompts[i] for i in indices for _ in range(samples)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=stops,
            pad_id=tokenizer.pad_token_id,
            generator=generator,
        )
        chunk = [
            Rollout(
                row=row,
                sample=number,
                text=tokenizer.decode(ids, skip_special_tokens=True),
                tokens=len(ids),
                truncated=ids[-1] not in stops,
                reward=None,
            )
            for (row, number), ids in zip(
                ((row, number) for row in indices for number in range(samples)), completions, strict=True
            )
        ]
        grade_rollouts(grader, rows, chunk)
        rollouts += chunk
        progress(len(rollouts), len(rows) * samples)
    return rollouts


def groups(rollouts: list[Rollout]) -> Iterator[list[Rollout]]:
    """Rollouts of the same row."""
    by_row: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_row.setdefault(rollout.row, []).append(rollout)
    yield from by_row.values()


def error_shares(rollouts: list[Rollout]) -> dict[str, float]:
    """Share of rollouts in each error class."""
    counts: dict[str, int] = {}
    for rollout in rollouts:
        for error in rollout.errors:
            counts[error] = counts.get(error, 0) + 1
    return {name: count / len(rollouts) for name, count in sorted(counts.items())}


def refuse_broken_grader(rollouts: list[Rollout], limit: float, where: str) -> None:
    """Raise StageFailed, with a sample of what went wrong, when too many rollouts could not be graded."""
    failed = [r for r in rollouts if r.reward is None]
    if not failed or len(failed) / len(rollouts) <= limit:
        return
    first = next((detail for r in failed for detail in r.details.values() if detail), "")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in error_shares(rollouts).items())
    shown = f"\nFirst error:\n{first.strip()[-1500:]}" if first else ""
    raise StageFailed(
        f"{where}: {len(failed)} of {len(rollouts)} completions could not be graded ({shares}); "
        f"the limit is {limit:.0%}.{shown}"
    )
