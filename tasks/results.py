"""What passes between stages: small models that hold URIs and numbers, never data."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Result(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Finding(Result):
    """Something wrong with the data or with the grader's fit to it."""

    check: str
    severity: Literal["critical", "warning", "info"]
    file: str
    message: str
    lines: list[int] = Field(default_factory=list, description="1-based, the first hundred.")
    count: int = 0


class FileFacts(Result):
    """One dataset file as it was when the job started."""

    uri: str
    sha256: str
    rows: int
    tokens_median: int
    tokens_max: int


class Resolved(Result):
    """Every `auto` of the job, resolved."""

    n_epochs: int
    batch_size: int
    group_size: int
    steps: int
    learning_rate: float
    eval_interval: int
    eval_samples: int
    max_completion_tokens: int
    micro_batch: int
    threads: int
    device: str
    parameters: int


class DatasetReport(Result):
    ok: bool
    files: dict[str, FileFacts]
    findings: list[Finding]
    docs: str
    resolved: Resolved
    seconds: float


class WarmStartResult(Result):
    checkpoint: str
    weights_sha256: str
    steps: int
    trained_tokens: int
    loss: float
    seconds: float


class CalibrationReport(Result):
    ok: bool
    reasons: list[str]
    rows: int
    samples: int
    mean: float | None
    std: float | None
    pass_rate: float | None
    signal_share: float
    best_of: dict[int, float]
    errors: dict[str, float]
    grade_seconds_p50: float
    grade_seconds_p95: float
    seconds: float


class CheckpointInfo(Result):
    step: int
    uri: str
    weights_sha256: str
    valid_reward: float | None
    billed_seconds: Decimal


class TrainingResult(Result):
    steps: int
    checkpoints: list[CheckpointInfo]
    best_step: int
    weights_sha256: str
    billed_seconds: Decimal
    billed_by_phase: dict[str, Decimal]
    billed_usd: Decimal
    seconds: float


class Interval(Result):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class ModelScore(Result):
    """One model on the test file: k sampled completions per row, and one greedy answer per row."""

    name: str
    step: int
    reward: Interval
    pass_rate: Interval
    greedy_reward: Interval
    greedy_pass_rate: Interval
    valid_reward: float | None
    completion_tokens: float
    ungraded: int


class EvaluationReport(Result):
    rows: int
    samples: int
    base: ModelScore
    best: ModelScore
    candidates: list[ModelScore]
    gain: Interval
    greedy_gain: Interval
    ok: bool
    reason: str
    seconds: float


class ModelVersion(Result):
    name: str
    version: int
    source: str
    weights_sha256: str
    step: int


class Deployment(Result):
    name: str
    version: int
    bundle: str
    previous: int | None
    smoke_rows: int
    smoke_reward: float | None


class Comparison(Result):
    """Challenger minus champion on the challenger's test rows."""

    champion: str
    rows: int
    gain: Interval
    ok: bool
