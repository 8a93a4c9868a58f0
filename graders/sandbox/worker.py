"""The program inside the sandbox: holds one grader's source, warm, and answers calls over two pipes.

It runs alone (no import of this package), configured by its first input line. Every further
line is one call, `[sample, item]`; every reply is one JSON line. With isolation "call" each call runs
in a fresh fork of this process, and whatever it does to its own memory dies with it. With isolation
"worker" the call runs right here: faster, and a hostile answer can then forge later rewards.

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
import signal
import sys
import time
import traceback

MAX_REPLY = 1 << 20  # bytes a call may send back: a number and a traceback need far less
MAX_LOG = 64 << 10  # bytes of output kept per call; the rest is read and dropped
MAX_FILES = 100_000  # files and folders a call may have at once
MAX_SWEEP = 1_000  # above that many left-over files a new sandbox is quicker than sweeping
QUICK = 2  # milliseconds that a quick call takes at most
REQUESTS, REPLIES = 3, 4  # descriptors of the pipes to the pool, side by side
TICK = 0.05  # seconds between looks at a running call
WRITABLE = ("/tmp", "/dev/shm")
parse = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def main():
    os.dup2(0, REQUESTS, inheritable=False)
    os.dup2(1, REPLIES, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    lines = read_lines(REQUESTS)
    config = json.loads(next(lines))
    protect(config)
    config["sandboxed"] = config["host_pid_namespace"] is not None
    log_read, log_write = os.pipe()
    os.set_blocking(log_read, False)
    os.set_blocking(log_write, False)  # a source that floods while it loads loses output, and does not hang
    os.dup2(null, 0)
    os.dup2(log_write, 1)
    os.dup2(log_write, 2)
    os.close(log_write)
    sys.stdout, sys.stderr = unbuffered(1), unbuffered(2)
    grade, error = load_source(config["source"])
    logs = drain(log_read).decode("utf-8", "replace")
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(log_read)
    send(REPLIES, {"ready": error is None, "error": error, "logs": logs})
    if error is not None:
        return
    if config["sandboxed"]:
        # What is there already is where an environment is bound that itself lies under /tmp.
        config["files"] = files_in_use()
        config["keep"] = {os.path.join(folder, name) for folder in WRITABLE for name in os.listdir(folder)}
    call = call_in_fork if config["isolation"] == "call" else call_here
    warm_up()
    for line in lines:
        reply, clean = call(grade, line, config)
        write(REPLIES, reply)
        if not clean:
            return


def unbuffered(descriptor):
    """A text stream that keeps nothing back, so that what was printed survives a kill."""
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)


def warm_up():
    """Touch what a call may need, so that forks share it, and keep the collector off those pages."""
    try:
        raise ValueError("warm-up")
    except ValueError:
        traceback.format_exc()
    gc.collect()
    gc.disable()
    gc.freeze()


def read_lines(descriptor):
    pending = b""
    while data := os.read(descriptor, 1 << 18):
        *complete, pending = (pending + data).split(b"\n") if pending else data.split(b"\n")
        for line in complete:
            yield line.decode()


def send(descriptor, reply):
    write(descriptor, json.dumps(reply).encode() + b"\n")


def write(descriptor, data):
    while data:
        data = data[os.write(descriptor, data) :]


def protect(config):
    """What the namespaces do not limit. Every limit is hard: nothing inside can raise it again."""
    if config["become"] is not None:
        os.setresgid(config["become"], config["become"], config["become"])
        os.setresuid(config["become"], config["become"], config["become"])
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


def number(value):
    """A reward must be a finite real number: int, float, numpy's numbers, or a bool (as 1.0 or 0.0).

    Everything else is the grader's mistake and is named: None, text, NaN, infinity, an integer too
    large for a float.
    """
    kind = type(value)  # not isinstance, which believes what an object says of itself
    if not issubclass(kind, numbers.Real) and kind.__name__ not in ("bool", "bool_"):
        raise TypeError(f"grade() returned {kind.__name__}, expected a number")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"grade() returned {result}, expected a finite number")
    return result


# ---- isolation "worker": in this process ----------------------------------------------------------


def call_here(grade, line, config):
    sample, item = parse(line, 0)[0]
    log = io.StringIO()
    start = time.monotonic()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            reply = {"score": number(grade(sample, item))}
        except BaseException:
            reply = {"error": own_traceback()}
    reply["seconds"] = time.monotonic() - start
    text = log.getvalue()
    if text:
        reply["logs"] = text[:MAX_LOG]
    return json.dumps(reply).encode() + b"\n", True


# ---- isolation "call": in a fork ------------------------------------------------------------------
#
# A fork costs mostly the pages that it touches, so the parent does what can be done before it, and the
# fork itself imports nothing, opens nothing, and writes a plain number where all goes well.


def call_in_fork(grade, line, config):
    sample, item = parse(line, 0)[0]
    sandboxed = config["sandboxed"]
    result_read, result_write = os.pipe()
    log_read, log_write = os.pipe()
    os.set_blocking(result_read, False)
    os.set_blocking(log_read, False)
    poll = select.poll()
    poll.register(result_read, select.POLLIN)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.closerange(REQUESTS, REPLIES + 1)
            os.dup2(log_write, 1)
            os.dup2(log_write, 2)
            if not sandboxed:
                os.setsid()
            answer(grade, sample, item, result_write)
        finally:
            os._exit(0)
    # Until the fork is gone every page touched here is copied, so a quick call is waited for and ended
    # before anything else is done. Its line, at most a few kB, waits in the pipe.
    why = ended = None
    result = logs = b""
    if not poll.poll(QUICK):
        resource.prlimit(child, resource.RLIMIT_CPU, (config["cpu_seconds"], config["cpu_seconds"]))
        os.close(result_write)
        os.close(log_write)
        result_write = -1
        result, logs, why, ended = watch(child, poll, result_read, log_read, start, config)
    kill_others(sandboxed, child)
    status = ended if ended is not None else os.waitpid(child, 0)[1]
    seconds = time.monotonic() - start
    if result_write >= 0:
        os.close(result_write)
        os.close(log_write)
    if sandboxed:
        wait_for_others()
    if not why:
        result += drain(result_read, MAX_REPLY)
    logs += drain(log_read, MAX_LOG - len(logs))
    os.close(result_read)
    os.close(log_read)
    clean = not sandboxed or sweep(config["files"], config["keep"])
    if clean and not logs and not why and len(result) < 40:
        try:
            return b'{"reply": "%r", "seconds": %r}\n' % (float(result), seconds), True
        except ValueError:
            pass
    return encode(result, logs.decode("utf-8", "replace"), why, status, seconds, clean), clean


def encode(result, logs, why, status, seconds, clean):
    """The reply line where there is more to say than a number."""
    reply = {"seconds": seconds, "logs": logs, "bye": not clean}
    if why:
        reply["error"] = why
    elif result.endswith(b"\n"):
        reply["reply"] = result.decode("utf-8", "replace")
    else:
        reply["error"] = death(status)
    return json.dumps(reply).encode() + b"\n"


def answer(grade, sample, item, result_write):
    try:
        value = grade(sample, item)
        if type(value) is not float or value - value != 0:
            value = number(value)
        os.write(result_write, b"%r\n" % value)
    except BaseException:
        send(result_write, {"error": own_traceback()})


def watch(child, poll, result_read, log_read, start, config):
    """Wait for the call's one line. Returns (bytes, logs, reason it was cut off or None, exit status or None)."""
    result = logs = b""
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
                logs += data[: MAX_LOG - len(logs)]
                if not data:
                    poll.unregister(log_read)
                continue
            result += data
            if len(result) > MAX_REPLY:
                return b"", logs, f"the reply is larger than {MAX_REPLY} bytes", None
            if not data or data.endswith(b"\n"):
                return result, logs, None, None
        now = time.monotonic()
        if now >= deadline:
            return b"", logs, f"TimeoutError: no result after {config['timeout']:g} seconds", None
        if now >= tick:
            tick = now + TICK
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                # Its last line may still be in the pipe, which a left-over process may hold open.
                return result, logs, None, status
            if config["sandboxed"] and files_in_use() > MAX_FILES:
                return b"", logs, f"OSError: more than {MAX_FILES} files", None


def drain(descriptor, limit=MAX_LOG):
    kept = b""
    try:
        while len(kept) < limit:
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            kept += data
    except BlockingIOError:
        pass
    return kept[:limit] if limit > 0 else b""


def kill_others(sandboxed, child):
    """Kill all that the call started, however it hid: everything in this pid namespace but us."""
    try:
        if sandboxed:
            os.kill(-1, signal.SIGKILL)
        else:
            # Without a namespace (--unsafe-graders) only the call's own session can be found.
            os.kill(child, signal.SIGKILL)
            os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def wait_for_others():
    """A killed process may run on for microseconds: no reply before the last one is gone."""
    try:
        while True:
            os.kill(-1, signal.SIGKILL)
            time.sleep(0.0005)
    except ProcessLookupError:
        pass


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


def sweep(clean, keep):
    """Empty the writable folders. False when that would take long or does not work."""
    used = files_in_use()
    if used == clean:
        return True
    if used > MAX_SWEEP:
        return False
    try:
        for folder in WRITABLE:
            empty(folder, keep)
    except (OSError, RecursionError):
        return False
    return files_in_use() == clean


def empty(folder, keep=()):
    for entry in list(os.scandir(folder)):
        if entry.path in keep:
            continue
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            empty(entry.path)
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


if __name__ == "__main__":
    main()
