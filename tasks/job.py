"""The Job: what a person writes, the flow's parameters and the body of `POST /v1/fine_tuning/jobs`.

The part that OpenAI's API has keeps OpenAI's names and shapes; what it lacks stands beside it in
sections with defaults. Docstrings and descriptions here are the form that Prefect's UI draws.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import BadInput

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, strict=True)]  # strict: YAML's `true` is not 1
Rate = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Hyperparameters(Section):
    """OpenAI's hyperparameters of reinforcement fine-tuning. `auto` is resolved before training and shown."""

    n_epochs: Annotated[int, Field(ge=1, le=50, strict=True)] | Auto = Field(
        "auto", description="Passes over the rows."
    )
    batch_size: Annotated[int, Field(ge=1, le=256, strict=True)] | Auto = Field(
        "auto", description="Prompts per step."
    )
    learning_rate_multiplier: Rate | Auto = Field(
        "auto", description="Scales the base learning rate of the model's size."
    )
    compute_multiplier: Annotated[float, Field(gt=0.00001, le=10)] | Auto = Field(
        "auto", description="Exploration: scales the completions sampled per prompt."
    )
    eval_interval: Count | Auto = Field("auto", description="Steps between validations.")
    eval_samples: Count | Auto = Field(
        "auto", description="Completions per validation row; 1 is greedy, more are sampled and averaged."
    )
    reasoning_effort: Literal["default", "low", "medium", "high"] = Field(
        "default", description="Effort while sampling; scales the completion-token budget."
    )


class Reinforcement(Section):
    """How completions are judged, and how long to train on the judgement."""

    grader: dict[str, Any] | str = Field(
        description="OpenAI grader JSON, or the path of a file that holds it."
    )
    response_format: dict[str, Any] | None = Field(None, description="JSON schema that answers must follow.")
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(Section):
    """The training method."""

    type: Literal["reinforcement"] = "reinforcement"
    reinforcement: Reinforcement


class WarmStart(Section):
    """Supervised fine-tuning on demonstrations before RFT. `model: tiny` starts from nothing and needs it."""

    file: str = Field(description="JSONL of demonstrations: `messages` that end with the assistant's answer.")
    epochs: int = Field(3, ge=1, le=50)
    learning_rate: Rate | Auto = "auto"
    batch_size: int = Field(16, ge=1, le=1024)


class Sampling(Section):
    """How completions are drawn in training."""

    group_size: Annotated[int, Field(ge=2, le=256)] | Auto = Field(
        "auto", description="Completions per prompt; `auto` is 8 times compute_multiplier."
    )
    temperature: float = Field(1.0, gt=0, le=5)
    max_completion_tokens: int = Field(256, ge=1, le=65536)


class Optimizer(Section):
    """What the update does with graded completions."""

    learning_rate: Rate | Auto = Field("auto", description="Overrides the base rate of the model's size.")
    loss: Literal["dapo", "cispo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    kl: float = Field(0.0, ge=0, description="Weight of the KL term against the model that RFT starts from.")
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0, description="DAPO's clip-higher.")
    max_grad_norm: float = Field(1.0, gt=0)


class Grading(Section):
    """Policy for samples that could not be graded."""

    invalid_grade: float | Literal["drop"] = Field(
        "drop", description="Reward of a sample that could not be graded; `drop` leaves it out of the update."
    )
    max_error_share: float = Field(
        0.5, gt=0, le=1, description="A step with more ungradable samples than this fails the job."
    )
    isolation: Literal["call", "worker"] = Field(
        "call", description="Python graders: a fresh fork per call, or one process for many calls (faster)."
    )


class Calibration(Section):
    """Is this grader fit to train this model on this data? Asked before a second is billed."""

    rows: int = Field(64, ge=1, description="Training rows to sample on.")
    samples: int = Field(8, ge=2, description="Completions per row.")
    min_signal_share: float = Field(
        0.1, ge=0, le=1, description="Least share of rows whose completions differ in reward."
    )
    max_error_share: float = Field(0.1, ge=0, le=1, description="Most samples that may be ungradable.")


class Evaluation(Section):
    """Evidence on held-out rows."""

    samples: int = Field(4, ge=1, description="Completions per test row, beside one greedy answer.")
    temperature: float = Field(1.0, gt=0, le=5)
    pass_threshold: float = Field(1.0, description="Reward from which a completion counts as passed.")
    keep_checkpoints: int = Field(3, ge=1, description="Checkpoints kept: the best by validation reward.")
    bootstrap: int = Field(10_000, ge=200, description="Resamples behind each 95 % interval.")


class Promotion(Section):
    """When a challenger may become champion."""

    approval: Literal["none", "person"] = Field("none", description="`person`: wait for a promotion by hand.")
    min_gain: float = Field(
        0.0, description="Lower bound that the 95 % interval of challenger minus champion must exceed."
    )
    smoke_rows: int = Field(8, ge=1, description="Test rows answered by the served model before it is moved.")


class Budget(Section):
    """Price."""

    rate_card: str = Field("openai", description="Name of a card in deployments/rate_cards, or a path.")


class Resources(Section):
    """Where training runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | Auto = Field("auto", description="CPU threads of the trainer; `auto` is all cores.")
    micro_batch: Count | Auto = Field("auto", description="Completions per forward pass of the update.")
    restarts: int = Field(2, ge=0, description="Times a killed trainer is resumed from its last checkpoint.")


class Job(Section):
    """A reinforcement fine-tuning job: prompts and a grader in, a better model out."""

    model: str = Field(
        description="Hugging Face id, local folder, `models:/name@alias`, or `tiny` (no download).",
        min_length=1,
    )
    training_file: str = Field(
        description="JSONL prompts: a path, s3://…, or a Hugging Face dataset.", min_length=1
    )
    validation_file: str = Field(description="Held-out prompts watched during training.", min_length=1)
    test_file: str = Field(description="Held-out prompts for the final evidence; never trained or tuned on.")
    method: Method
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(42, ge=0, le=2**31 - 1)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    warm_start: WarmStart | None = None
    sampling: Sampling = Field(default_factory=Sampling)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    grading: Grading = Field(default_factory=Grading)
    calibration: Calibration = Field(default_factory=Calibration)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    promotion: Promotion = Field(default_factory=Promotion)
    budget: Budget = Field(default_factory=Budget)
    resources: Resources = Field(default_factory=Resources)

    @property
    def name(self) -> str:
        """Name of the registered model that this job adds a version to."""
        return self.suffix or clean_name(Path(self.training_file).resolve().parent.name)

    @property
    def hyperparameters(self) -> Hyperparameters:
        return self.method.reinforcement.hyperparameters


def clean_name(name: str) -> str:
    """A folder's name as a model's name: letters, digits, dots, dashes and underscores, at most 64."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:64].strip("._-") or "model"


def load_job(path: Path) -> Job:
    """Read `job.yaml` (or the folder that holds one); relative files are taken from its folder.

    Raises BadInput with file, line, field and the nearest valid name.
    """
    import yaml

    if path.is_dir():
        path = path / "job.yaml"
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file. Give a job.yaml or a folder that holds one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    try:
        document = yaml.safe_load(text)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise BadInput(
            f"{path}: expected keys such as `model:` and `training_file:`, found {_kind(document)}"
        )
    try:
        job = Job.model_validate(document)
    except ValidationError as error:
        raise BadInput("\n".join(explain(error, document, str(path), tree))) from None
    base = path.resolve().parent
    job.training_file = _from(base, job.training_file)
    job.validation_file = _from(base, job.validation_file)
    job.test_file = _from(base, job.test_file)
    if job.warm_start:
        job.warm_start.file = _from(base, job.warm_start.file)
    if isinstance(job.method.reinforcement.grader, str):
        job.method.reinforcement.grader = _from(base, job.method.reinforcement.grader)
    if (base / job.model).is_dir():
        job.model = str(base / job.model)
    if job.suffix is None:
        job.suffix = clean_name(base.name)
    return job


def _from(base: Path, uri: str) -> str:
    if "://" in uri or uri.startswith("file-") or Path(uri).is_absolute():
        return uri
    local = base / uri
    # "owner/dataset" on the hub looks like a path; it is one only if something is there or it has an ending.
    return str(local) if local.exists() or local.suffix or uri.count("/") != 1 else uri


def explain(error: ValidationError, document: Any, source: str, tree: Any = None) -> list[str]:
    """One line per finding: source, line, field, what was found, what was expected, the nearest valid name."""
    lines: list[str] = []
    expected: dict[str, list[str]] = {}  # a union reports one finding per arm: they become one line
    for finding in error.errors():
        path = [part for part in finding["loc"] if _reaches(document, finding["loc"], part)]
        field = ".".join(str(part) for part in path)
        where = f"{source}:{_line(tree, path)}" if tree is not None else source
        if finding["type"] == "extra_forbidden":
            valid = sorted(_fields_at(Job, path[:-1]))
            near = difflib.get_close_matches(str(path[-1]), valid, 1, 0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"Valid here: {', '.join(valid)}."
            text = f"{where}: unknown key `{field}`. {hint}"
        elif finding["type"] == "missing":
            missing = [part for part in finding["loc"] if isinstance(part, str)]
            text = f"{where}: required key `{'.'.join(missing)}` is missing."
        else:
            found = f"{where}: `{field}` is {finding['input']!r}"
            message = finding["msg"][0].lower() + finding["msg"][1:]
            expected.setdefault(found, []).append(message.removeprefix("input should be "))
            continue
        if text not in lines:
            lines.append(text)
    return lines + [f"{found}; expected {' or '.join(messages)}." for found, messages in expected.items()]


def _reaches(document: Any, loc: tuple[int | str, ...], part: int | str) -> bool:
    """Pydantic's loc also names union branches ("int", "literal['auto']"); only keys of the document count."""
    node = document
    for step in loc:
        inside = (isinstance(node, dict) and step in node) or (
            isinstance(node, list) and isinstance(step, int)
        )
        if step == part:
            return inside
        if inside:
            node = node[step]
    return False


def _fields_at(model: type[BaseModel], path: list[Any]) -> set[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            return set()
        inner = [a for a in _flatten(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not inner:
            return set()
        model = inner[0]
    return set(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [leaf for arm in typing.get_args(annotation) for leaf in _flatten(arm)]
    return [annotation]


def _line(tree: Any, path: list[Any]) -> int:
    """1-based line of the key that `path` names, or of the deepest key above it."""
    line = tree.start_mark.line + 1
    for part in path:
        for key, value in tree.value if isinstance(tree.value, list) else []:
            if getattr(key, "value", None) == str(part):
                line, tree = key.start_mark.line + 1, value
                break
        else:
            return int(line)
    return int(line)


def _kind(value: Any) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"
