"""A pool of warm sandboxed workers for one grader source: batches in, one outcome per call out.

One long-lived thread owns all workers and speaks to them with non-blocking pipes. It must be long-lived:
`--die-with-parent` ties a sandbox to the *thread* that started it. Calls are pipelined to a worker so that
quick graders do not wait for the round trip; since a worker answers in order, the oldest unanswered
call is the one that runs, and if the worker dies that call alone bears it and the others are sent again.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from graders.errors import GraderError
from graders.sandbox.command import Image
from graders.sandbox.process import Limits, Worker, check_platform

WATCH = 0.1  # seconds between looks at a busy sandbox's memory and processes
GRACE = 5.0  # seconds beyond the time limit before the pool itself ends a sandbox
AHEAD = 0.02  # seconds of work to keep queued at a worker
MOST_AHEAD = 64  # calls queued at a worker at most
START_SECONDS = 120.0  # for a source to be imported
RESTARTS = 5  # sandboxes in a row that die before they are ready, until the grader is given up


@dataclass(slots=True)
class Outcome:
    """What a call gave: a score, or an error text. `server` marks a fault of the sandbox, not of the grader."""

    score: float | None
    error: str | None = None
    server: bool = False
    seconds: float = 0.0
    logs: str = ""


Done = Callable[[int, Outcome], None]


@dataclass(slots=True)
class _Call:
    index: int
    line: bytes
    done: Done


@dataclass(slots=True)
class _Seat:
    """A worker and the calls sent to it, oldest first."""

    worker: Worker
    calls: deque[_Call] = field(default_factory=deque)
    ready: bool = False
    since: float = 0.0  # when the oldest unanswered call began to run, as far as can be told from here
    looked: float = 0.0
    writing: bool = False


class Pool:
    """Workers for one source. Thread-safe; starts on the first call; `close` kills everything at once."""

    def __init__(
        self,
        source: str,
        image: Image,
        *,
        workers: int,
        isolation: str = "call",
        limits: Limits | None = None,
        unsafe: bool = False,
    ) -> None:
        self.source, self.image, self.isolation, self.unsafe = source, image, isolation, unsafe
        self.limits = limits or Limits()
        self.size = workers
        self.waiting: deque[_Call] = deque()
        self.seats: list[_Seat] = []
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.broken: Exception | None = None
        self.load_error: Outcome | None = None
        self.closing = False
        self.failed_starts = 0
        self.pace = 0.02  # seconds a call takes, smoothed; sets how many are sent ahead

    def submit(self, calls: Iterable[tuple[int, bytes]], done: Done) -> None:
        """Queue calls; each is (index, JSON line of [sample, item]). `done` runs in the pool's thread."""
        with self.lock:
            if self.closing:
                raise GraderError("the grader is closed")
            self.waiting.extend(_Call(index, line, done) for index, line in calls)
            if self.thread is None:
                check_platform()
                self.wake_read, self.wake_write = os.pipe()
                os.set_blocking(self.wake_read, False)
                os.set_blocking(self.wake_write, False)
                self.thread = threading.Thread(target=self._run, name="grader-pool", daemon=True)
                self.thread.start()
        self._wake()

    def close(self) -> None:
        """Kill every worker and its process tree. Calls still out get no `done`."""
        self.closing = True
        if self.thread is not None and self.thread is not threading.current_thread():
            self._wake()
            self.thread.join()
            self.thread = None

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self.wake_write, b"x")

    # ---- in the pool's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.wake_read, selectors.EVENT_READ, None)
        try:
            while not self.closing:
                self._fill()
                for key, events in self.selector.select(self._patience()):
                    if key.data is None:
                        os.read(self.wake_read, 4096)
                        continue
                    seat: _Seat = key.data
                    if seat not in self.seats:
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._write(seat)
                    elif events & selectors.EVENT_READ:
                        self._read(seat)
                self._watch()
        except Exception as error:  # told to the callers, who wait for it
            self._give_up(error)
        finally:
            for seat in list(self.seats):
                self._dismiss(seat)
            self.selector.close()
            with self.lock:
                os.close(self.wake_read)
                os.close(self.wake_write)

    def _give_up(self, error: Exception) -> None:
        self.broken = error
        calls = [call for seat in self.seats for call in seat.calls] + list(self.waiting)
        self.waiting.clear()
        for seat in self.seats:
            seat.calls.clear()
        for call in calls:
            call.done(call.index, Outcome(None, str(error), server=True))

    def _patience(self) -> float | None:
        return WATCH if any(seat.calls or not seat.ready for seat in self.seats) else None

    def _fill(self) -> None:
        if self.load_error is not None or self.broken is not None:
            while self.waiting:
                call = self.waiting.popleft()
                call.done(call.index, self.load_error or Outcome(None, str(self.broken), server=True))
            return
        while self.waiting and len(self.seats) < self.size and self._wanted():
            worker = Worker(self.source, self.image, self.isolation, self.limits, unsafe=self.unsafe)
            seat = _Seat(worker)
            self.seats.append(seat)
            self.selector.register(worker.read, selectors.EVENT_READ, seat)
            self._write(seat)
        ahead = max(1, min(MOST_AHEAD, int(AHEAD / self.pace)))
        # Near the end of a batch share what is left, so that no worker sits on a queue while another idles.
        ahead = min(ahead, max(1, len(self.waiting) // max(1, len(self.seats))))
        for seat in self.seats:
            if not seat.ready or not self.waiting or len(seat.calls) > ahead // 2:
                continue
            now = time.monotonic()
            while self.waiting and len(seat.calls) < ahead:
                call = self.waiting.popleft()
                if not seat.calls:
                    seat.since = seat.looked = now
                seat.calls.append(call)
                seat.worker.out += call.line
            self._write(seat)

    def _wanted(self) -> bool:
        starting = sum(not seat.ready for seat in self.seats)
        return len(self.waiting) > starting

    def _write(self, seat: _Seat) -> None:
        alive = seat.worker.flush()
        want = bool(seat.worker.out) and alive
        if want != seat.writing:
            seat.writing = want
            if want:
                self.selector.register(seat.worker.write, selectors.EVENT_WRITE, seat)
            else:
                self.selector.unregister(seat.worker.write)

    def _read(self, seat: _Seat) -> None:
        lines = seat.worker.lines()
        if lines is None:
            self._lost(seat, "the grader's process ended the sandbox")
            return
        now = time.monotonic()
        for line in lines:
            try:
                reply = json.loads(line)
                if not seat.ready:
                    self._loaded(seat, reply)
                    continue
                call = seat.calls.popleft()
                outcome, bye = read_reply(reply)
            except (ValueError, TypeError, KeyError, IndexError, RecursionError):
                self._lost(seat, "the sandbox sent something that is not a reply")
                return
            self.pace = 0.9 * self.pace + 0.1 * max(outcome.seconds, 1e-5)
            seat.since = seat.looked = now
            self.failed_starts = 0
            call.done(call.index, outcome)
            if bye:
                self._requeue(seat)
                self._dismiss(seat)
                return

    def _loaded(self, seat: _Seat, reply: dict[str, Any]) -> None:
        if reply["error"] is not None:
            self.load_error = Outcome(None, str(reply["error"]), logs=str(reply.get("logs", "")))
        seat.ready = True

    def _lost(self, seat: _Seat, why: str) -> None:
        """The sandbox is gone: the call that ran bears it, the rest is sent to another."""
        if seat.calls and seat.ready:
            call = seat.calls.popleft()
            self._requeue(seat)
            self._dismiss(seat)
            call.done(call.index, Outcome(None, why, seconds=time.monotonic() - seat.since))
            return
        self.failed_starts += 1
        failure = "" if seat.ready else seat.worker.failure()
        self._dismiss(seat)
        if not self.unsafe and "bwrap" in failure:
            raise GraderError(failure)
        if self.failed_starts >= RESTARTS:
            self.load_error = Outcome(None, f"the source ends its sandbox: {why}")

    def _requeue(self, seat: _Seat) -> None:
        self.waiting.extendleft(reversed(seat.calls))
        seat.calls.clear()

    def _dismiss(self, seat: _Seat) -> None:
        self.seats.remove(seat)
        self.selector.unregister(seat.worker.read)
        if seat.writing:
            self.selector.unregister(seat.worker.write)
        seat.worker.close()

    def _watch(self) -> None:
        now = time.monotonic()
        for seat in list(self.seats):
            if not seat.ready:
                if now - seat.worker.started > START_SECONDS:
                    self.load_error = Outcome(
                        None, f"TimeoutError: the source did not load in {START_SECONDS:g} seconds"
                    )
                    self._dismiss(seat)
                elif now - seat.worker.started > WATCH and now - seat.looked > WATCH:
                    seat.looked = now
                    used = seat.worker.overuse(self.limits)
                    if used:
                        self.load_error = Outcome(None, f"MemoryError: loading the source took {used}")
                        self._dismiss(seat)
                continue
            if not seat.calls or now - seat.looked < WATCH:
                continue
            seat.looked = now
            # In a fork the worker itself keeps time; here the clock starts when the reply before arrived.
            limit = self.limits.timeout + (GRACE if self.isolation == "call" else 0.0)
            if now - seat.since > limit:
                self._lost(seat, f"TimeoutError: no result after {self.limits.timeout:g} seconds")
                continue
            used = seat.worker.overuse(self.limits)
            if used:
                self._lost(seat, f"MemoryError: the call took {used}")


def read_reply(reply: dict[str, Any]) -> tuple[Outcome, bool]:
    """A worker's reply line, believed in nothing: whatever is not a finite float becomes an error."""
    seconds, logs = float(reply["seconds"]), str(reply.get("logs", ""))
    bye = reply.get("bye") is True
    if "reply" in reply:  # what the fork wrote, passed on unread
        try:
            inner = json.loads(reply["reply"])
        except (ValueError, RecursionError):
            inner = None
        if isinstance(inner, float):
            reply = {"score": inner}
        else:
            text = inner.get("error") if isinstance(inner, dict) else None
            reply = {"error": text or "the grader's process sent no readable result"}
    score = reply.get("score")
    if isinstance(score, float) and score - score == 0:
        return Outcome(score, seconds=seconds, logs=logs), bye
    error = reply.get("error")
    return Outcome(None, str(error) if error else "the grader gave no score", seconds=seconds, logs=logs), bye
