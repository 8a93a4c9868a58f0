"""The program inside the sandbox: holds one grader's source, warm, and answers calls over two pipes.

It runs alone (no import of this package), started with three arguments' worth of JSON on its first input
line. Every further line is one call, `[sample, item]`; every reply is one JSON line. With isolation
"call" each call runs in a fresh fork of this process, which never looks at the model's text itself: the
fork parses it, grades, and writes one line; whatever the fork did to its own memory dies with it. With
isolation "worker" the call runs right here: faster, and a hostile answer can then forge later rewards.

After each call every other process in the sandbox is killed before the reply is sent, so that a reply
never belongs to anyone but its own sample. If the call left files behind that cannot be swept away
quickly, the reply says so ("bye") and this process ends: the pool starts a clean sandbox.
"""

import contextlib
import gc
import io
import json
import math
import numbers
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback

MAX_REPLY = 1 << 20  # bytes a call may send back: a number and a traceback need far less
MAX_LOG = 64 << 10  # bytes of output kept per call; the rest is read and dropped
MAX_FILES = 100_000  # files and folders a call may have at once
MAX_SWEEP = 1_000  # above that many left-over files a new sandbox is quicker than sweeping
TICK = 0.05  # seconds between looks at a running call
WRITABLE = ("/tmp", "/dev/shm")


def main():
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    log_read, log_write = os.pipe()
    os.set_blocking(log_read, False)
    lines = read_lines(requests)
    config = json.loads(next(lines))
    os.dup2(null, 0)
    os.dup2(log_write, 1)
    os.dup2(log_write, 2)
    os.close(log_write)
    protect(config)
    grade, error = load_source(config["source"])
    logs = drain(log_read)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    os.close(log_read)
    send(replies, {"ready": error is None, "error": error, "logs": logs})
    if error is not None:
        return
    gc.collect()
    gc.disable()
    gc.freeze()  # keeps the collector off shared pages, so that forks stay cheap
    call = call_in_fork if config["isolation"] == "call" else call_here
    for line in lines:
        reply = call(grade, line, config, requests, replies)
        send(replies, reply)
        if reply.get("bye"):
            return


def read_lines(descriptor):
    pending = b""
    while True:
        data = os.read(descriptor, 1 << 18)
        if not data:
            return
        *complete, pending = (pending + data).split(b"\n") if pending else data.split(b"\n")
        yield from complete


def send(descriptor, reply):
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def protect(config):
    """What the namespaces do not limit. Every limit is hard: nothing inside can raise it again."""
    for site in config["site"]:
        if site not in sys.path:
            sys.path.append(site)
    for name, value in config["limits"].items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    # Not dumpable: a fork cannot open this process's memory or descriptors, nor trace it.
    import ctypes

    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGALRM",
                 "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF", "SIGPIPE", "SIGIO"):  # fmt: skip
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if config["host_pid_namespace"] is not None:
        # kill(-1) below must never run outside a pid namespace of our own.
        if os.readlink("/proc/self/ns/pid") == config["host_pid_namespace"]:
            raise SystemExit("not in a pid namespace of its own")
        os.chdir("/tmp")


def load_source(source):
    """(grade function, None) or (None, traceback). The module is real, so that dataclasses and pickles in it work."""
    import linecache
    import types

    module = types.ModuleType("grader")
    module.__file__ = "<grader>"
    sys.modules["grader"] = module
    linecache.cache["<grader>"] = (len(source), None, source.splitlines(keepends=True), "<grader>")
    try:
        exec(compile(source, "<grader>", "exec", dont_inherit=True), module.__dict__)
        grade = module.__dict__.get("grade")
        if not callable(grade):
            raise NameError("the source defines no function 'grade'")
    except BaseException:
        return None, own_traceback()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
    return grade, None


def own_traceback():
    """The current exception from the grader's own frames on, cut to the part that helps."""
    try:
        kind, error, trace = sys.exc_info()
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        text = "".join(traceback.format_exception(kind, error, trace, limit=-20))
    except BaseException:  # a hostile __str__
        text = "an exception that cannot be printed"
    return text if len(text) < 8000 else text[:4000] + "\n…\n" + text[-4000:]


def score(grade, line):
    """Run one call. {"score": float} or {"error": text}. See `number` for what counts as a score."""
    sample, item = json.loads(line)
    try:
        return {"score": number(grade(sample, item))}
    except BaseException:
        return {"error": own_traceback()}


def number(value):
    """A reward must be a finite real number: int, float, numpy's numbers, or a bool (as 1.0 or 0.0).

    Everything else is the grader's mistake and is named: None, text, NaN, infinity, an integer too
    large for a float.
    """
    kind = type(value).__name__
    if not isinstance(value, numbers.Real) and kind not in ("bool", "bool_"):
        raise TypeError(f"grade() returned {kind}, expected a number")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"grade() returned {result}, expected a finite number")
    return result


# ---- isolation "worker": in this process ----------------------------------------------------------


def call_here(grade, line, config, requests, replies):
    log = io.StringIO()
    start = time.monotonic()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        reply = score(grade, line)
    reply["seconds"] = time.monotonic() - start
    text = log.getvalue()
    if text:
        reply["logs"] = text[:MAX_LOG]
    return reply


# ---- isolation "call": in a fork ------------------------------------------------------------------


def call_in_fork(grade, line, config, requests, replies):
    result_read, result_write = os.pipe()
    log_read, log_write = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.close(requests)
            os.close(replies)
            os.close(result_read)
            os.close(log_read)
            os.dup2(log_write, 1)
            os.dup2(log_write, 2)
            os.close(log_write)
            answer(grade, line, config, result_write)
        finally:
            os._exit(0)
    os.close(result_write)
    os.close(log_write)
    os.set_blocking(result_read, False)
    os.set_blocking(log_read, False)
    try:
        result, logs, why, ended = watch(child, result_read, log_read, start, config)
        everyone_else(config, child)
        status = ended if ended is not None else os.waitpid(child, 0)[1]
        logs += drain(log_read, MAX_LOG - len(logs))
    finally:
        os.close(result_read)
        os.close(log_read)
    reply = {"seconds": time.monotonic() - start}
    if why:
        reply["error"] = why
    elif result.endswith(b"\n"):
        reply["reply"] = result.decode("utf-8", "replace")
    else:
        reply["error"] = death(status)
    if logs:
        reply["logs"] = logs
    if config["host_pid_namespace"] is not None and not sweep():
        reply["bye"] = True
    return reply


def answer(grade, line, config, result_write):
    os.setsid()
    cpu = config["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    gc.enable()
    sys.stdout = io.TextIOWrapper(
        io.FileIO(1, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
    )
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
    )
    reply = score(grade, line)
    send(result_write, reply)


def watch(child, result_read, log_read, start, config):
    """Wait for the call's one line. Returns (bytes, logs, reason it was cut off or None, exit status or None)."""
    result, kept, size = b"", [], 0
    poll = select.poll()
    poll.register(result_read, select.POLLIN)
    poll.register(log_read, select.POLLIN)
    deadline = start + config["timeout"]
    tick = start + TICK
    while True:
        events = poll.poll(max(0.0, min(tick, deadline) - time.monotonic()) * 1000 + 1)
        for descriptor, _ in events:
            try:
                data = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                continue
            if descriptor == log_read:
                if not data:
                    poll.unregister(log_read)
                elif size < MAX_LOG:
                    kept.append(data[: MAX_LOG - size])
                    size += len(kept[-1])
                continue
            result += data
            if not data or data.endswith(b"\n") or len(result) > MAX_REPLY:
                why = f"the reply is larger than {MAX_REPLY} bytes" if len(result) > MAX_REPLY else None
                return result, text(kept), why, None
        now = time.monotonic()
        if now >= deadline:
            return result, text(kept), f"TimeoutError: no result after {config['timeout']:g} seconds", None
        if now >= tick:
            tick = now + TICK
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                # Its last line may still be in the pipe; a left-over process may hold the pipe open.
                result += read_rest(result_read)
                return result, text(kept), None, status
            if config["host_pid_namespace"] is not None and files_in_use() > MAX_FILES:
                return result, text(kept), f"OSError: more than {MAX_FILES} files", None


def read_rest(descriptor):
    try:
        return os.read(descriptor, MAX_REPLY)
    except BlockingIOError:
        return b""


def text(kept):
    return b"".join(kept).decode("utf-8", "replace")


def drain(descriptor, limit=MAX_LOG):
    kept = b""
    with contextlib.suppress(BlockingIOError):
        while len(kept) < limit:
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            kept += data
    return kept[: max(0, limit)].decode("utf-8", "replace")


def everyone_else(config, child):
    """Kill all that the call started, however it hid: everything in this pid namespace but us."""
    if config["host_pid_namespace"] is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    else:
        # Without a namespace (--unsafe-graders) only the call's own session can be found.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def death(status):
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        cause = {"SIGXCPU": " (processor time used up)", "SIGXFSZ": " (file too large)"}.get(name, "")
        return f"the grader's process was ended by {name}{cause}"
    return f"the grader's process ended by itself with status {os.waitstatus_to_exitcode(status)}"


def files_in_use():
    total = 0
    for folder in WRITABLE:
        state = os.statvfs(folder)
        total += state.f_files - state.f_ffree
    return total


def sweep():
    """Empty the writable folders. False when that would take long or does not work."""
    for folder in WRITABLE:
        with os.scandir(folder) as entries:
            left = next(entries, None)
        if left is None:
            continue
        if files_in_use() > MAX_SWEEP:
            return False
        try:
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if os.path.isdir(path) and not os.path.islink(path):
                    shutil.rmtree(path)
                else:
                    os.unlink(path)
        except (OSError, RecursionError):
            return False
    return True


if __name__ == "__main__":
    main()
