"""Start, watch and restart the worker process. The orchestrating side of `worker.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.errors import BadInput, StageFailed
from tasks.run import Run

POLL_SECONDS = 0.1
# glibc gives large blocks back to the system at each free, and faults them in again for the next tensor:
# keeping them makes a CPU training step about 12 % faster.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
_spares: list[subprocess.Popen[bytes]] = []


class Killed(StageFailed):
    """The worker was ended by a signal: by the system, by hand, or by lack of memory."""


def standby(count: int = 1) -> None:
    """Have `count` workers import what stages need while something else goes on, and wait for their stage."""
    _spares[:] = [worker for worker in _spares if worker.poll() is None]
    while len(_spares) < count:
        _spares.append(_spawn())


def dismiss() -> None:
    """End the workers that stand by."""
    while _spares:
        worker = _spares.pop()
        worker.kill()
        worker.wait()


def run_stage(
    run: Run, stage: str, on_event: Callable[[dict[str, Any]], None], *arguments: str
) -> dict[str, Any]:
    """Run one stage in a worker and return its result. `on_event` gets each event as it is written.

    Raises BadInput or StageFailed with the stage's own message, Killed when a signal ended the worker.
    """
    outcome = run.path("work", f"{stage}.json")
    outcome.parent.mkdir(parents=True, exist_ok=True)
    outcome.unlink(missing_ok=True)
    log = run.path("work", f"{stage}.log")
    standby()
    worker = _spares.pop(0)
    with log.open("ab") as sink, contextlib.ExitStack() as undo:
        undo.callback(_end, worker)
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(" ".join([stage, run.id, *arguments, "\n"]).encode())
        worker.stdin.flush()
        os.set_blocking(worker.stdout.fileno(), False)
        events = _Tail(run.path("events.jsonl"))
        while True:
            code = worker.poll()
            while chunk := worker.stdout.read(65536):
                sink.write(chunk)
            for event in events.new():
                on_event(event)
            if code is not None:
                break
            time.sleep(POLL_SECONDS)
    run.publish("work", "events.jsonl")
    if code < 0:
        name = signal.Signals(-code).name
        why = ", by hand or by the system for want of memory" if name == "SIGKILL" else ""
        raise Killed(f"{stage}: the worker process was killed ({name}{why}). Its last output is in {log}")
    document = json.loads(outcome.read_text("utf-8")) if outcome.exists() else {}
    if "result" in document:
        result: dict[str, Any] = document["result"]
        return result
    message = document.get("error") or f"the worker ended with exit code {code}; see {log}"
    raise (BadInput if code == 2 else StageFailed)(f"{stage}: {message}")


def _spawn() -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parent.parent.parent
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.train.worker", "--attached"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**MALLOC, **os.environ, "PYTHONPATH": path},
    )


def _end(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        worker.terminate()
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


class _Tail:
    """Events appended to a file after this was made."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.offset = file.stat().st_size if file.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open("rb") as handle:
            handle.seek(self.offset)
            lines = handle.read().splitlines(keepends=True)
        events = []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self.offset += len(line)
            events.append(json.loads(line))
        return events
