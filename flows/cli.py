"""The `openrft` command. Heavy modules are imported inside the verb that needs them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tasks.home import Home
    from tasks.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Reinforcement fine-tuning that you run yourself: prompts and a grader in, a better model out.",
)

HomeOption = Annotated[
    str | None,
    typer.Option(
        "--home",
        envvar="OPENRFT_HOME",
        help="Where data lives: a folder or s3://bucket/prefix.",
        show_default="./.openrft",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")
]
PathArgument = Annotated[Path, typer.Argument(help="A job.yaml, or a folder that holds one.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="An id, a name, or `latest`.")]


def main() -> None:
    """Run the command line; a user's mistake is one message on standard error, never a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and workers are ended as well
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # Typer's for Ctrl-C
            print("Stopped. The same command goes on where this one left off.", file=sys.stderr)
        raise
    except Exception as error:
        code = _exit_code(error)
        if code is None or os.environ.get("OPENRFT_DEBUG"):
            raise
        from rich.console import Console

        label = "Bad input" if code == 2 else "Failed"
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]{label}:[/]", end=" ")
        print(error, file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    from tasks.errors import BadInput, StageFailed

    return 2 if isinstance(error, BadInput) else 1 if isinstance(error, (StageFailed, OSError)) else None


def _home(given: str | None, verbose: bool = False) -> Home:
    from tasks.errors import BadInput
    from tasks.home import configure_environment, open_home

    home = open_home(given)
    try:
        home.state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"home {home.state}: {error.strerror}; choose another with --home") from None
    configure_environment(home, quiet=not verbose)
    return home


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


@app.command()
def run(
    path: PathArgument,
    home: HomeOption = None,
    as_json: JsonOption = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's log as well.")] = False,
) -> None:
    """Run a job to its end: validate, warm-start, calibrate, train, evaluate, register, deploy.

    The same job again goes on where it was cut off; a finished one is left alone.
    """
    from flows import console
    from tasks.job import load_job
    from tasks.run import open_run, start_run
    from tasks.summary import summary

    place = _home(home, verbose)
    job = load_job(path)
    started = start_run(job, place)
    unchanged = started.record.status == "succeeded"
    if not unchanged:
        _flow(place, "retrain", job=job, show=None if as_json else console.progress(started))
    document = summary(open_run(started.id, place)) | {"unchanged": unchanged}
    if as_json:
        _print_json(document)
    else:
        console.show_summary(document)


@app.command()
def validate(path: PathArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check a job's files and its grader against them. Trains nothing, costs nothing."""
    from flows import console
    from tasks import dataset
    from tasks.job import load_job
    from tasks.run import start_run

    place = _home(home)
    started = start_run(load_job(path), place)
    with console.working("validate", quiet=as_json):
        report = dataset.validate(started)
    if as_json:
        _print_json(report.model_dump(mode="json"))
    else:
        console.show_validation(report)
    if not report.ok:
        raise typer.Exit(2)


@app.command()
def calibrate(path: PathArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Sample from the model that RFT would start from, grade, and say whether the grader is fit to train on."""
    from flows import console
    from tasks.job import load_job
    from tasks.results import CalibrationReport
    from tasks.run import open_run, start_run

    place = _home(home)
    job = load_job(path)
    started = start_run(job, place)
    if "calibrate" not in started.record.stages:
        _flow(place, "calibrate", job=job, show=None if as_json else console.progress(started))
    found = open_run(started.id, place).record.stages["calibrate"]
    if as_json:
        _print_json(found)
    else:
        console.show_calibration(CalibrationReport.model_validate(found))
    if not found["ok"]:
        raise typer.Exit(1)


@app.command()
def grade(
    grader: Annotated[Path, typer.Option("--grader", help="Grader JSON.")],
    samples: Annotated[Path, typer.Option("--samples", help="JSONL or Parquet of {item, sample} rows.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a grade per row to this JSONL file.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A second grader to compare with.")
    ] = None,
    unsafe: Annotated[
        bool,
        typer.Option("--unsafe-graders", help="Run python graders without a sandbox where none can be had."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Grade saved samples offline: mean, spread, error classes, slowest rows, and where two graders differ."""
    from flows import console

    console.grade(grader, samples, out, against, unsafe, as_json)


@app.command()
def jobs(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the jobs of this home, newest first."""
    from flows import console
    from tasks.run import list_runs

    runs = list_runs(_home(home))
    if as_json:
        _print_json([_row(run) for run in runs])
    else:
        console.show_jobs([_row(run) for run in runs])


def _row(run: Run) -> dict[str, Any]:
    from tasks.summary import captured, status

    record = run.record
    steps, _, seconds = captured(run)
    evaluated = record.stages.get("evaluate")
    return {
        "id": record.id,
        "name": record.name,
        "status": status(run),
        "model": record.job.model,
        "created_at": record.created_at,
        "steps": steps,
        "billed_seconds": float(seconds),
        "gain": evaluated["gain"]["mean"] if evaluated else None,
    }


@app.command()
def show(job: JobArgument = "latest", home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Everything about one job: status, bill, evidence, model version, where its report is."""
    from flows import console
    from tasks.run import open_run
    from tasks.summary import summary

    document = summary(open_run(job, _home(home)))
    if as_json:
        _print_json(document)
    else:
        console.show_summary(document)


@app.command()
def evaluate(
    job: JobArgument = "latest",
    home: HomeOption = None,
    as_json: JsonOption = False,
    again: Annotated[
        bool, typer.Option("--again", help="Sample and grade anew even if results are there.")
    ] = False,
) -> None:
    """Base and checkpoints of a trained job on its held-out rows, with 95 % intervals."""
    from flows import console
    from tasks.errors import BadInput
    from tasks.results import EvaluationReport
    from tasks.run import open_run
    from tasks.train import process

    found = open_run(job, _home(home))
    if "train" not in found.record.stages:
        raise BadInput(f"job {found.id} has no finished training to evaluate (status {found.record.status})")
    stored = found.record.stages.get("evaluate")
    if stored is None or again:
        with console.progress(found, quiet=as_json) as on_event:
            stored = process.run_stage(found, "evaluate", lambda event: on_event(found, event))
    if as_json:
        _print_json(stored)
    else:
        console.show_evaluation(EvaluationReport.model_validate(stored))


@app.command()
def promote(job: JobArgument = "latest", home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Make a job's model the champion, if the evidence allows it, and serve it."""
    from flows import console
    from tasks.errors import BadInput, GateClosed
    from tasks.run import open_run

    place = _home(home)
    found = open_run(job, place)
    version = found.record.stages.get("register")
    if version is None:
        raise BadInput(f"job {found.id} has no registered model version (status {found.record.status})")
    outcome = _flow(
        place,
        "promote",
        model=version["name"],
        version=version["version"],
        show=None if as_json else console.progress(found),
    )
    if as_json:
        _print_json(outcome)
    elif outcome["champion"] == outcome["version"]:
        console.say(f"{outcome['model']} version {outcome['version']} is champion.")
    if outcome["champion"] != outcome["version"]:
        raise GateClosed(outcome["reason"])


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the registered model.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a model's previous champion back."""
    from flows import console
    from tasks import registry

    place = _home(home)
    registry.aliases(place, model)  # a wrong name is told before Prefect is started
    outcome = _flow(place, "rollback", model=model, show=None)
    if as_json:
        _print_json(outcome)
    else:
        console.say(f"{model}: version {outcome['champion']} is champion again (was {outcome['was']}).")


@app.command()
def serve(
    home: HomeOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    as_json: JsonOption = False,
) -> None:
    """Serve promoted models: OpenAI's /v1/chat/completions and /v1/models."""
    from api.server import serve as start

    start(_home(home), host, port, as_json)


@app.command()
def ui(
    home: HomeOption = None,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    as_json: JsonOption = False,
) -> None:
    """Start Prefect's and MLflow's pages on this home's data, print their addresses, stop with Ctrl-C."""
    from flows.pages import start

    start(_home(home), prefect_port, mlflow_port, as_json)


def _flow(place: Home, name: str, show: Any, **parameters: Any) -> Any:
    """Run one of our flows here, on the pages' Prefect server if `openrft ui` is up, else on a temporary one."""
    import contextlib

    from flows import pages

    pages.use_running_server(place)
    pages.warm_up(place, trains=name in ("retrain", "calibrate"))
    flow = _load_flow(name)
    from tasks import stages

    with show or contextlib.nullcontext() as on_event:
        if on_event is not None:
            stages.listeners.append(on_event)
        try:
            return flow(**parameters)
        finally:
            stages.listeners.clear()


def _load_flow(name: str) -> Callable[..., Any]:
    if name in ("promote", "rollback"):
        from flows import promote

        return getattr(promote, name)
    from flows import retrain

    return getattr(retrain, name)


if __name__ == "__main__":
    main()
