"""One sandboxed worker process as its pool sees it: start, pipes, limits from outside, kill."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from graders.errors import GraderError
from graders.sandbox.command import (
    ENVIRONMENT,
    INNER_ID,
    Handed,
    Image,
    command,
    outer_id,
    why_refused,
)
from graders.sandbox.seccomp import program

WORKER = Path(__file__).with_name("worker.py")
MEMORY_BYTES = 2 << 30
FILE_BYTES = 1 << 30
PROCESSES = 64
DESCRIPTORS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use. Seconds are wall-clock; memory is for the call's whole process tree."""

    timeout: float = 120.0
    memory: int = MEMORY_BYTES
    processes: int = PROCESSES


class Worker:
    """A running sandbox. `read` and `write` are its pipes (non-blocking); `close` ends the whole tree."""

    def __init__(self, source: str, image: Image, isolation: str, limits: Limits, *, unsafe: bool) -> None:
        self.unsafe = unsafe
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        config = json.dumps(_config(source, image, isolation, limits, unsafe)).encode() + b"\n"
        self.process = self._start(image)
        assert self.process.stdin
        assert self.process.stdout
        self.write = self.process.stdin.fileno()
        self.read = self.process.stdout.fileno()
        os.set_blocking(self.write, False)
        os.set_blocking(self.read, False)
        self.out = bytearray(config)
        self.seen = bytearray()
        self.started = time.monotonic()

    def _start(self, image: Image) -> subprocess.Popen[bytes]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        if self.unsafe:
            arguments = [image.python, "-s", "-S", "-B", str(WORKER)]
            return subprocess.Popen(arguments, env=ENVIRONMENT, start_new_session=True, bufsize=0, **pipes)
        with contextlib.ExitStack() as files:

            def opened(descriptor: int) -> int:
                files.callback(os.close, descriptor)
                return descriptor

            worker = opened(os.open(WORKER, os.O_RDONLY))
            rules, seccomp = program(), None
            if rules is not None:
                read, write = os.pipe()  # a few hundred bytes: fits a pipe's buffer
                seccomp = opened(read)
                os.write(write, rules)
                os.close(write)
            outer = outer_id()
            if outer is None:
                handed = Handed(worker, seccomp)
            else:
                (info, info_end), (block, block_end) = os.pipe(), os.pipe()
                opened(info), opened(block_end)
                handed = Handed(worker, seccomp, opened(info_end), opened(block))
            passed = tuple(fd for fd in astuple(handed) if fd is not None)
            process = subprocess.Popen(command(image, handed), env={}, pass_fds=passed, bufsize=0, **pipes)
            if outer is not None:
                try:
                    _map_user(info, outer)
                except BaseException:
                    process.kill()
                    process.wait()
                    raise
                os.write(block_end, b"x")
            return process

    def flush(self) -> bool:
        """Write what fits. False when the other side is gone."""
        try:
            while self.out:
                count = os.write(self.write, memoryview(self.out)[: 1 << 16])
                del self.out[:count]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def lines(self) -> list[bytes] | None:
        """The complete lines that have arrived, or None at the end of the stream."""
        try:
            data = os.read(self.read, 1 << 18)
        except BlockingIOError:
            return []
        if not data:
            return None
        self.seen += data
        *complete, rest = self.seen.split(b"\n")
        self.seen = bytearray(rest)
        return [bytes(line) for line in complete]

    def overuse(self, limits: Limits) -> str | None:
        """What the sandbox as a whole uses too much of, or None. The kernel's limits are per process, this one
        is for all of them together (and for the number of them, which the kernel does not limit for root)."""
        count = memory = 0
        todo = [self.process.pid]
        while todo:
            pid = todo.pop()
            count += 1
            if count > limits.processes + 4:  # bwrap's own and the warm worker
                return f"more than {limits.processes} processes"
            memory += _private_bytes(pid)
            if memory > limits.memory + (256 << 20):
                return f"more than {limits.memory >> 20} MB of memory"
            with contextlib.suppress(OSError):
                todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return None

    def failure(self) -> str:
        """Why it ended before it was ready, in one line."""
        with contextlib.suppress(OSError):
            self.process.wait(timeout=5)
        self.errors.seek(0)
        message = self.errors.read(4000).decode("utf-8", "replace")
        return message.strip() if self.unsafe else why_refused(message)

    def close(self) -> None:
        """Kill everything in it. With a pid namespace the kernel ends all of it together with its first process."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.unsafe:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def _map_user(info: int, outer: int) -> None:
    """Give the sandbox its users: root, which sets it up, and the one that graders become."""
    text = b""
    while not text.rstrip().endswith(b"}"):  # it is written in several pieces
        if not select.select([info], [], [], 10)[0]:
            return  # it did not come up; what it printed will tell why
        data = os.read(info, 4096)
        if not data:
            return
        text += data
    pid = json.loads(text)["child-pid"]
    try:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{INNER_ID} {outer} 1\n")
    except OSError as error:
        # It waits for its users and does not yet die with its parent.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise GraderError(f"the sandbox cannot be given its user: {error}") from None


def _config(source: str, image: Image, isolation: str, limits: Limits, unsafe: bool) -> dict[str, Any]:
    return {
        "source": source,
        "site": list(image.site),
        "isolation": isolation,
        "timeout": limits.timeout,
        # Two cores for the whole of the time, as the documents have it.
        "cpu_seconds": max(1, round(2 * limits.timeout)),
        "host_pid_namespace": None if unsafe else os.readlink("/proc/self/ns/pid"),
        "become": INNER_ID if not unsafe and os.geteuid() == 0 else None,
        "limits": {
            "RLIMIT_AS": limits.memory,
            "RLIMIT_FSIZE": FILE_BYTES,
            "RLIMIT_NOFILE": DESCRIPTORS,
            "RLIMIT_CORE": 0,
            # Counted per user namespace inside the sandbox; outside of one it would count the whole user.
            **({} if unsafe else {"RLIMIT_NPROC": limits.processes}),
        },
    }


def _private_bytes(pid: int) -> int:
    total = 0
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith((b"RssAnon:", b"RssShmem:")):
                total += int(line.split()[1]) << 10
    return total


def check_platform() -> None:
    """Raises `GraderError` where python graders cannot run at all."""
    if not sys.platform.startswith("linux"):
        raise GraderError(f"python graders need Linux namespaces, found {sys.platform}")
