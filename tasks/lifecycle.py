"""A job from start to end: one at a time per job, its status and MLflow run kept true whatever happens."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from tasks import tracking
from tasks.errors import GateClosed, StageFailed
from tasks.run import Run, Status, open_run


@contextlib.contextmanager
def lifecycle(run: Run, ends: Status = "succeeded") -> Iterator[None]:
    """Hold the job's lock, open its MLflow run, and write its end: `ends`, failed or cancelled."""
    with _lock(run):
        run.record.status, run.record.error, run.record.finished_at = "running", None, None
        run.record.mlflow_run_id = tracking.open_tracking(run)
        run.save()
        status: Status = ends
        failure: dict[str, str] | None = None
        try:
            yield
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "cancelled"
            code = "gate_closed" if isinstance(error, GateClosed) else type(error).__name__
            stopped = "stopped by hand or by the system; run the job again to go on"
            failure = {"code": code, "message": str(error) if isinstance(error, Exception) else stopped}
            raise
        finally:
            run.record = open_run(run.id, run.home).record  # stages have written their results meanwhile
            run.record.status, run.record.error, run.record.finished_at = status, failure, time.time()
            run.save()
            run.emit("finished", status=status, error=failure)
            try:
                write_report(run)
            except Exception as error:  # a page that cannot be drawn must not undo a finished training
                run.emit(
                    "warning", message=f"report.html could not be written: {type(error).__name__}: {error}"
                )
            tracking.close_tracking(run)


def write_report(run: Run) -> None:
    """Draw report.html from what is known now, and keep it with the MLflow run."""
    from tasks.report import write_report as draw

    draw(run)
    run.publish("report.html", "events.jsonl")
    tracking.log_report(run, "report.html")


def is_held(run: Run) -> bool:
    """Is a process of this machine working on the job? Of other machines' processes nothing is known: True."""
    file = run.home.state / "locks" / run.id
    if not file.exists():
        return True
    with file.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _lock(run: Run) -> Iterator[None]:
    """One process per job on this machine; the system frees the lock when the process ends, however it ends."""
    folder = run.home.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / run.id).open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise StageFailed(
                f"job {run.id} is already running in process {handle.read().strip() or 'unknown'}; "
                "wait for it or stop it first"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
