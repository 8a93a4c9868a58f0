"""A job on its way: identity, run folder, record and events.

A job's id is a hash of everything that its result depends on (settings, dataset bytes, grader, base
model, OpenRFT's version), so the same job meets its own folder again and continues there.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from tasks.billing import RateCard, load_rate_card
from tasks.errors import BadInput, StageFailed
from tasks.home import Home, open_home
from tasks.job import Job
from tasks.store import LocalStore, sha256_file, sha256_json, write_atomically

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused"]


class Record(BaseModel):
    """`job.json` of a run folder: all that is known of the job."""

    id: str
    name: str
    status: Status = "validating_files"
    created_at: float
    finished_at: float | None = None
    error: dict[str, str] | None = None
    openrft_version: str
    job: Job
    files: dict[str, str] = Field(description="SHA-256 of each split's bytes.")
    grader: dict[str, Any]
    grader_sha256: str
    rate_card: RateCard
    flow_run_id: str | None = None
    mlflow_run_id: str | None = None
    stages: dict[str, Any] = Field(default_factory=dict, description="Result of each finished stage.")


@dataclass
class Run:
    """The run folder `<store>/jobs/<id>/` and its record. Stages work in `folder`, then publish."""

    home: Home
    record: Record

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def job(self) -> Job:
        return self.record.job

    @property
    def key(self) -> str:
        return f"jobs/{self.id}"

    @property
    def folder(self) -> Path:
        return self.home.scratch(self.key)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def uri(self, *parts: str) -> str:
        return "/".join((self.home.files, self.key, *parts))

    def dataset(self, split: str) -> Path:
        return self.path("dataset", f"{split}.jsonl")

    def load_grader(self) -> Any:
        """The grader as the record holds it, so that a later edit of its file changes nothing."""
        import graders

        return graders.load(self.record.grader, isolation=self.job.grading.isolation)

    def publish(self, *names: str) -> None:
        """Copy files or folders of the run folder to the store; nothing to do where they are the same."""
        store = self.home.store
        if isinstance(store, LocalStore):
            return
        for name in names:
            source = self.folder / name
            files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
            for file in files:
                store.put(file, f"{self.key}/{file.relative_to(self.folder)}")

    def fetch(self, *names: str) -> None:
        """Make sure that files of the run folder are here, after a move to another machine."""
        for name in names:
            if not self.path(name).exists():
                self.home.store.get(f"{self.key}/{name}", self.path(name))

    def save(self) -> None:
        self.home.store.write(f"{self.key}/job.json", self.record.model_dump_json(indent=1).encode())
        write_atomically(self.path("job.json"), self.record.model_dump_json(indent=1).encode())

    def emit(self, type: str, **data: Any) -> None:
        """Append one event to events.jsonl: one line, one write, so that readers never see half of it."""
        line = json.dumps({"t": time.time(), "type": type, **data}, default=str) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path("events.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def start_run(job: Job, home: Home | None = None) -> Run:
    """The run of this job: its existing one if the same job has run before, else a new one.

    Copies the dataset into the run folder, so that later edits of the user's files change nothing.
    Raises BadInput when a file, the grader or the rate card cannot be used.
    """
    from tasks.dataset import fetch

    home = home or open_home()
    if job.method.reinforcement.response_format is not None:
        raise BadInput(
            "method.reinforcement.response_format: constrained sampling is not available yet; remove it"
        )
    if job.model == "tiny" and job.warm_start is None:
        raise BadInput("model: tiny starts from nothing; give it a warm_start with a file of demonstrations")
    card = load_rate_card(job.budget.rate_card)
    grader = load_grader(job)
    incoming = home.state / "incoming" / str(os.getpid())
    try:
        files = {split: fetch(uri, split, incoming) for split, uri in splits(job).items()}
        digests = {split: sha256_file(file) for split, file in files.items()}
        id = _job_id(job, digests, grader.spec, card)
        run = _existing(home, id)
        if run is None:
            _refuse_bad_rows(job, files, grader)
            record = Record(
                id=id,
                name=job.name,
                created_at=time.time(),
                openrft_version=version("openrft"),
                job=job,
                files=digests,
                grader=grader.spec,
                grader_sha256=grader.sha256,
                rate_card=card,
            )
            run = Run(home, record)
            run.save()  # only here: an earlier run of the job may be writing its own record right now
        for split, file in files.items():
            target = run.dataset(split)
            if not (target.is_file() and sha256_file(target) == digests[split]):
                write_atomically(target, file.read_bytes())
        return run
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _job_id(job: Job, digests: dict[str, str], grader: dict[str, Any], card: RateCard) -> str:
    """A hash of all that the result depends on; where files stand and what metadata says is not part of it."""
    elsewhere = {"training_file", "validation_file", "test_file", "metadata"}
    settings = job.model_dump(mode="json", exclude=elsewhere)
    settings["method"]["reinforcement"]["grader"] = grader
    if job.warm_start:
        settings["warm_start"].pop("file")
    parts = [settings, digests, _model_identity(job.model), card.model_dump(mode="json"), version("openrft")]
    return f"ftjob-{sha256_json(parts)[:24]}"


def _refuse_bad_rows(job: Job, files: dict[str, Path], grader: Any) -> None:
    from tasks.dataset import read_rows, refuse_unfit, refuse_unreadable

    for split, uri in splits(job).items():
        rows = list(read_rows(files[split]))
        refuse_unreadable(uri, rows)
        if split != "demonstrations":
            refuse_unfit(uri, rows, grader)


def load_grader(job: Job) -> Any:
    """The job's grader, loaded. Raises BadInput with the offending field."""
    import graders

    given = job.method.reinforcement.grader
    try:
        if isinstance(given, str):
            if not Path(given).is_file():
                raise BadInput(f"method.reinforcement.grader: no file {given}")
            given = Path(given)  # type: ignore[assignment]
        return graders.load(given, isolation=job.grading.isolation)
    except graders.GraderError as error:
        where = f"{given}: " if isinstance(given, Path) else "method.reinforcement.grader: "
        raise BadInput(f"{where}{error}") from None


def open_run(reference: str, home: Home | None = None) -> Run:
    """A run by id, by name (the newest of that name) or `latest`. Raises BadInput with what exists."""
    home = home or open_home()
    if reference.startswith("ftjob-") and (run := _existing(home, reference)):
        return run
    runs = list_runs(home)
    if not runs:
        raise BadInput(f"{home.files}: no jobs yet. Start one with `openrft run PATH`.")
    for run in runs:
        if reference == "latest" or run.record.name == reference:
            return run
    names = ", ".join(sorted({run.record.name for run in runs}))
    raise BadInput(f"no job {reference!r}. Give an id, `latest`, or one of these names: {names}.")


def list_runs(home: Home) -> list[Run]:
    """All runs of a home, newest first."""
    runs = []
    for id in home.store.names("jobs"):
        with contextlib.suppress(
            StageFailed
        ):  # one damaged record must not hide the others; asked by id, it is told
            runs.append(_existing(home, id))
    return sorted((run for run in runs if run), key=lambda run: -run.record.created_at)


def _existing(home: Home, id: str) -> Run | None:
    try:
        return Run(home, Record.model_validate_json(home.store.read(f"jobs/{id}/job.json")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise StageFailed(f"{home.files}/jobs/{id}/job.json is damaged: {error}") from None


def splits(job: Job) -> dict[str, str]:
    """Where each file of the job was given."""
    splits = {"train": job.training_file, "validation": job.validation_file, "test": job.test_file}
    if job.warm_start:
        splits["demonstrations"] = job.warm_start.file
    return splits


def _model_identity(model: str) -> Any:
    """What names the base weights: digests of a local folder's files, else the id as written."""
    folder = Path(model)
    if folder.is_dir():
        return {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.is_file()}
    if model.startswith((".", "/", "~")):
        raise BadInput(f"model: no folder {model}")
    if model != "tiny" and "/" not in model and difflib.get_close_matches(model, ["tiny"], 1, 0.7):
        raise BadInput(f"model: {model!r} is neither a folder nor a model of that name. Did you mean `tiny`?")
    return model
