"""The report's charts as geometry: axes, points and bars in pixels, made from numbers only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.history import Curves
from tasks.results import EvaluationReport, Interval, TrainingResult
from tasks.wording import number

MOST_POINTS = 400  # of the training curve; beyond it, points are means of neighbouring steps


@dataclass(frozen=True)
class Axis:
    """Maps values onto pixels. `ticks` are (pixel, label)."""

    low: float
    high: float
    start: float
    stop: float
    step: float
    share: bool = False  # label as percentages

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        scale, unit = (100, "\N{NO-BREAK SPACE}%") if self.share else (1, "")
        digits = max(0, -math.floor(math.log10(scale * self.step) + 1e-9))
        if scale * self.step * 10**digits % 1 > 1e-6:  # a step such as 0.25 needs one digit more
            digits += 1
        first, last = math.ceil(self.low / self.step - 1e-6), math.floor(self.high / self.step + 1e-6)
        marks = [i * self.step for i in range(first, last + 1)]
        return [(self.at(m), number(scale * m, digits) + unit if m else "0") for m in marks]


def value_axis(
    values: Iterable[float], start: float, stop: float, most: int = 5, share: bool = False
) -> Axis:
    """An axis with round ticks around all `values`. It leaves neither 0 to 1 nor the positive numbers unless
    a value does."""
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    floor, ceiling = (0.0 if low >= 0 else -math.inf), (1.0 if low >= 0 and high <= 1 else math.inf)
    room = max(0.04 * (high - low), 0.05 * max(1.0, abs(high)) if high - low < 0.1 else 0.0)
    low, high = max(floor, low - room), min(ceiling, high + room)
    step = _round_step((high - low) / most)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, high, start, stop, step, share)


def _round_step(least: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least * (1 - 1e-9))


def curve_plot(history: Curves, training: TrainingResult | None, steps: int) -> dict[str, Any] | None:
    """Geometry of the learning curve: training reward, validation reward, kept checkpoints, the chosen one."""
    valid = {step: m["valid/reward"] for step, m in sorted(history.valid.items()) if "valid/reward" in m}
    if not valid and not history.train:
        return None
    train = sorted(history.train.items())
    block = -(-len(train) // MOST_POINTS) or 1
    means = [
        (statistics.fmean(s for s, _ in part), statistics.fmean(r for _, r in part))
        for part in (train[i : i + block] for i in range(0, len(train), block))
    ]
    last = max([steps, 1, *valid, *history.train])
    x = Axis(0, last, 56, 604, max(1.0, _round_step(last / 6)))
    y = value_axis([*valid.values(), *(reward for _, reward in means)], 268, 12)
    kept = {info.step for info in training.checkpoints} if training else set(history.checkpoints)
    best = training.best_step if training else None
    return {
        "x": x,
        "y": y,
        "block": block,
        "train": " ".join(f"{x.at(s)},{y.at(r)}" for s, r in means),
        "valid": " ".join(f"{x.at(s)},{y.at(r)}" for s, r in valid.items()),
        "points": [
            {"step": s, "reward": r, "x": x.at(s), "y": y.at(r), "kept": s in kept, "chosen": s == best}
            for s, r in valid.items()
        ],
    }


def curve_rows(history: Curves) -> list[dict[str, Any]]:
    """The curve as a table: one line per validation, with the mean training reward since the one before."""
    rows, before = [], -1
    for step, metrics in sorted(history.valid.items()):
        since = [reward for s, reward in history.train.items() if before < s <= step]
        rows.append(
            {
                "step": step,
                "train": statistics.fmean(since) if since else None,
                "valid": metrics.get("valid/reward"),
                "pass_rate": metrics.get("valid/pass_rate"),
            }
        )
        before = step
    return rows


def whiskers(report: EvaluationReport, name: str, title: str) -> dict[str, Any]:
    """One dot-and-whisker panel. Sampled and greedy share an axis, so that they can be compared."""
    models, share = [report.base, *report.candidates], "pass_rate" in name
    pair = (name.removeprefix("greedy_"), f"greedy_{name.removeprefix('greedy_')}")
    spans: list[Interval] = [getattr(model, key) for model in models for key in pair]
    axis = value_axis(
        [edge for span in spans for edge in (span.low, span.high, span.mean)], 92, 272, 4, share
    )
    rows = []
    for index, model in enumerate(models):
        span: Interval = getattr(model, name)
        rows.append(
            {
                "name": model.name,
                "span": span,
                "y": 22 + 28 * index,
                "x": axis.at(span.mean),
                "low": axis.at(span.low),
                "high": axis.at(span.high),
                "chosen": model.step == report.best.step,
            }
        )
    return {"title": title, "share": share, "axis": axis, "rows": rows, "height": 22 + 28 * len(rows) + 22}


def best_of_chart(values: dict[int, float]) -> dict[str, Any] | None:
    """Bars of the mean best of k; None where a reward is below zero, which bars cannot show."""
    if not values or min(values.values()) < 0:
        return None
    chart = _bars({f"best of {k}": value for k, value in values.items()}, 3)
    return chart | {
        "ticks": [(b["x"] + b["width"] / 2, f"{k}") for b, k in zip(chart["bars"], values, strict=True)]
    }


def histogram(rewards: list[float]) -> dict[str, Any] | None:
    """How many completions scored what, in ten equal classes; the last one holds its upper end."""
    if not rewards:
        return None
    low, high = min(rewards), max(rewards)
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
    counts = [0] * 10
    for reward in rewards:
        counts[min(9, int((reward - low) / (high - low) * 10))] += 1
    edges = [number(low + (high - low) * i / 10, 1 if high - low == 1 else 2) for i in range(11)]
    chart = _bars({f"{edges[i]} to {edges[i + 1]}": float(n) for i, n in enumerate(counts)}, 0)
    return chart | {"ticks": [(48 + 28 * i, edges[i]) for i in range(0, 11, 2)]}


def _bars(values: dict[str, float], digits: int) -> dict[str, Any]:
    y, width = value_axis([0.0, *values.values()], 150, 14, 3), 280 / len(values)
    chart = [
        {
            "label": label,
            "text": number(value, digits),
            "x": round(48 + width * (i + 0.1), 1),
            "width": round(width * 0.8, 1),
            "y": y.at(value),
            "height": round(150 - y.at(value), 1),
        }
        for i, (label, value) in enumerate(values.items())
    ]
    return {"y": y, "bars": chart, "summary": ", ".join(f"{b['label']}: {b['text']}" for b in chart)}
