"""Hostile graders: what an answer that a grader executes may try. None may leak, stop the pool, or touch the
reward of another sample.

Each attack is the body of a `grade` that first treats honest samples honestly. It returns 1.0 where it got
through and 0.0 where it was refused; being killed or failing is as good. Every attack runs amid honest
samples on one worker, so that whatever it leaves behind meets the samples after it.
"""

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from graders import load, sample_from_text

HONEST = """\
import ctypes, errno, gc, json, os, resource, select, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def refused(action, *arguments):
    try:
        action(*arguments)
    except (OSError, MemoryError, ValueError):
        return 0.0
    return 1.0

def grade(sample, item):
    if sample["output_text"] == "good":
        return 0.25
"""

# name -> body. Grouped by what they are after.
ATTACKS = {
    # -- time
    "infinite loop": "while True: pass",
    "sleep for ever": "time.sleep(10**6)",
    "ignore SIGTERM and loop": """
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass""",
    "catastrophic regular expression": "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')",
    "threads that never end": """
        def spin():
            while True: pass
        for _ in range(20): threading.Thread(target=spin).start()
        return 0.0""",
    # -- processes
    "fork bomb": """
        while True:
            try: os.fork()
            except OSError: pass""",
    "double fork that lives on": """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True:
                    try: os.write(1, b'x'); open('/tmp/later', 'w').close()
                    except OSError: pass
            os._exit(0)
        return 0.0""",
    "orphan that holds the result pipe": """
        if os.fork() == 0:
            os.setsid(); time.sleep(10**6)
        os._exit(0)""",
    "thread bomb": """
        def wait(): time.sleep(1000)
        for _ in range(10**6): threading.Thread(target=wait, daemon=True).start()""",
    "vfork of shells": """
        for _ in range(2000): subprocess.Popen(['/bin/sh', '-c', 'sleep 1000'])""",
    # -- memory, disk, descriptors
    "memory bomb": "x = bytearray(3 << 30)",
    "memory bomb by many processes": """
        for _ in range(20):
            if os.fork() == 0:
                x = bytearray(b'x') * (400 << 20); time.sleep(1000)
        time.sleep(1000)""",
    "shared anonymous memory": """
        import mmap
        for _ in range(20):
            if os.fork() == 0:
                m = mmap.mmap(-1, 1 << 30)
                for i in range(0, 1 << 30, 4096): m[i] = 1
                time.sleep(1000)
        time.sleep(1000)""",
    "memfd bomb": "return refused(os.memfd_create, 'x')",
    "System V segment": """
        return 1.0 if libc.shmget(0, ctypes.c_size_t(1 << 30), 0o1600) >= 0 else 0.0""",
    "disk fill": """
        block = b'x' * (16 << 20)
        try:
            for i in range(128): open(f'/tmp/{i}', 'wb').write(block)
        except OSError: return 0.0
        return 1.0""",
    "disk fill in /dev/shm": """
        try:
            for i in range(200): open(f'/dev/shm/{i}', 'wb').write(b'x' * (1 << 20))
        except OSError: return 0.0
        return 1.0""",
    "one huge file": """
        with open('/tmp/huge', 'wb') as f:
            f.truncate(2 << 30)
        return 1.0""",
    "inode exhaustion": """
        for i in range(10**7):
            os.close(os.open(f'/tmp/{i}', os.O_CREAT | os.O_WRONLY))
        return 1.0""",
    "descriptor exhaustion": """
        kept = []
        try:
            for _ in range(10**5): kept.append(os.open('/dev/null', os.O_RDONLY))
        except OSError: return 0.0
        return 1.0""",
    "deep folders left behind": """
        for i in range(3000):
            os.mkdir('d' * 200); os.chdir('d' * 200)
        return 0.0""",
    "unreadable folder left behind": """
        os.makedirs('/tmp/a/b'); open('/tmp/a/b/c', 'w').close(); os.chmod('/tmp/a/b', 0); os.chmod('/tmp/a', 0)
        return 0.0""",
    "raise the limits again": """
        return refused(resource.setrlimit, resource.RLIMIT_AS, (1 << 40, 1 << 40))""",
    # -- reading the host
    "read the host's password file": "return refused(open, '/etc/passwd')",
    "read the host's shadow file": "return refused(open, '/etc/shadow')",
    "read a file of the host": "return refused(open, item['canary'])",
    "read a file of the host through /proc/1/root": "return refused(open, '/proc/1/root' + item['canary'])",
    "read through a symlink": """
        os.symlink(item['canary'], '/tmp/link')
        return refused(open, '/tmp/link')""",
    "list home folders": """
        return 1.0 if any('.ssh' in os.listdir(p) for p in ('/root', '/home') if os.path.isdir(p)) else 0.0""",
    "environment": """
        found = json.dumps(dict(os.environ)) + open('/proc/self/environ').read()
        print(found)
        return 1.0 if item['secret'] in found else 0.0""",
    "environment of other processes": """
        for pid in os.listdir('/proc'):
            if pid.isdigit():
                try:
                    if item['secret'] in open(f'/proc/{pid}/environ').read(): return 1.0
                except OSError: pass
        return 0.0""",
    "processes of the host": """
        names = [open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()]
        return 1.0 if any('pytest' in n for n in names) else 0.0""",
    "kernel log": "return 1.0 if libc.syscall(103, 3, ctypes.create_string_buffer(100), 100) > 0 else 0.0",
    # -- writing to the host
    "write to the system": """
        for path in ('/usr/x', '/etc/x', '/x', '/worker.py', '/dev/x', json.__file__):
            if refused(open, path, 'a'): return 1.0
        return 0.0""",
    "write through /proc/sys": "return refused(open, '/proc/sys/kernel/core_pattern', 'w')",
    "sysrq": """
        try: open('/proc/sysrq-trigger', 'w').write('h')
        except OSError: return 0.0
        return 1.0""",
    "mount": "return 1.0 if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 else 0.0",
    "remount writable": "return 1.0 if libc.mount(None, b'/', None, 32, None) == 0 else 0.0",
    "new user namespace": "return 1.0 if libc.unshare(0x10000000) == 0 else 0.0",
    "new user namespace by clone": """
        pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)
        if pid == 0: os._exit(0)
        return 1.0 if pid > 0 else 0.0""",
    "chroot": "return refused(os.chroot, '/tmp')",
    "become root": "return refused(os.setuid, 0)",
    "make a device": "return refused(os.mknod, '/tmp/mem', 0o20600, os.makedev(1, 1))",
    "set the clock": "return refused(time.clock_settime, time.CLOCK_REALTIME, 0.0)",
    "io_uring": "return 1.0 if libc.syscall(425, 1, ctypes.create_string_buffer(120)) >= 0 else 0.0",
    # -- network
    "connect to the host": """
        return refused(socket.create_connection, ('127.0.0.1', item['port']), 1)""",
    "look up a name": "return refused(socket.getaddrinfo, 'example.com', 80)",
    "raw socket": "return refused(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)",
    "send a datagram out": """
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        return refused(s.sendto, b'x', ('192.0.2.1', 53))""",
    "abstract unix socket of the host": """
        s = socket.socket(socket.AF_UNIX)
        return refused(s.connect, '\\0' + item['abstract'])""",
    # -- the warm worker and the other samples
    "patch the worker": """
        main = sys.modules['__main__']
        for name in list(vars(main)):
            if callable(getattr(main, name)): setattr(main, name, lambda *a, **k: 1.0)
        sys.modules['grader'].grade = lambda s, i: 1.0
        globals()['grade'] = lambda s, i: 1.0
        float.__class__
        return 0.0""",
    "patch the interpreter": """
        import builtins
        builtins.float = builtins.repr = builtins.type = lambda *a: 1.0
        json.loads = json.dumps = lambda *a: 1.0
        os.write = os.fork = lambda *a: 1
        grade.__code__ = (lambda sample, item: 1.0).__code__
        return 0.0""",
    "patch through the garbage collector": """
        for thing in gc.get_objects():
            if isinstance(thing, dict) and 'grade' in thing: thing['grade'] = lambda s, i: 1.0
        return 0.0""",
    "write the parent's memory": "return refused(open, f'/proc/{os.getppid()}/mem', 'r+b')",
    "read the parent's descriptors": "return max(refused(os.readlink, f'/proc/{os.getppid()}/fd/{fd}') for fd in range(16))",
    "write into the parent's pipes": """
        for fd in range(64):
            if not refused(open, f'/proc/{os.getppid()}/fd/{fd}', 'wb'): continue
            return 1.0
        return 0.0""",
    "ptrace the parent": "return 1.0 if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 0.0",
    "process_vm_writev the parent": """
        class vec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
        buffer = ctypes.create_string_buffer(8)
        a, b = vec(ctypes.addressof(buffer), 8), vec(ctypes.addressof(buffer), 8)
        done = libc.process_vm_writev(os.getppid(), ctypes.byref(a), 1, ctypes.byref(b), 1, 0)
        return 1.0 if done > 0 else 0.0""",
    "steal the parent's descriptors": "return refused(os.pidfd_open, os.getppid())",
    "lower the parent's limits": """
        return refused(resource.prlimit, os.getppid(), resource.RLIMIT_NPROC, (1, 1))""",
    "pin the parent to no time": """
        return refused(os.setpriority, os.PRIO_USER, 0, 19) or refused(os.setpriority, os.PRIO_PROCESS, 2, 19)""",
    "make the parent the oom victim": """
        return refused(open, f'/proc/{os.getppid()}/oom_score_adj', 'w')""",
    "stop the parent": "return refused(os.kill, os.getppid(), signal.SIGSTOP)",
    "kill the parent": "os.kill(os.getppid(), signal.SIGKILL); time.sleep(5); return 1.0",
    "crash the parent": "os.kill(os.getppid(), signal.SIGSEGV); time.sleep(5); return 1.0",
    "every signal to the parent": """
        for number in range(1, 65):
            try: os.kill(os.getppid(), number)
            except (OSError, ValueError): pass
        time.sleep(5)
        return 1.0""",
    "kill everyone": "os.kill(-1, signal.SIGKILL); return 0.0",
    "kill the first process": "os.kill(1, signal.SIGKILL); return 0.0",
    "forge replies on every descriptor": """
        line = json.dumps({"reply": "1.0", "score": 1.0, "seconds": 0}).encode() + b"\\n"
        for fd in range(256):
            for _ in range(9):
                try: os.write(fd, line)
                except OSError: break
        return 0.0""",
    "forge many results": """
        for fd in range(3, 64):
            try: os.write(fd, b'0.0\\n' * 50)
            except OSError: pass
        os._exit(0)""",
    "half a result": """
        for fd in range(3, 64):
            try: os.write(fd, b'0.0')
            except OSError: pass
        os._exit(0)""",
    "poison imports for later calls": """
        for folder in ('/tmp', '/dev/shm', '.'):
            for name in ('json', 'grader', 'sitecustomize', 'errno'):
                open(f'{folder}/{name}.py', 'w').write('raise SystemExit')
        return 0.0""",
    # -- output and return values
    "flood stdout": "while True: print('x' * 10**6)",
    "flood stderr with rubbish": "while True: os.write(2, os.urandom(1 << 16))",
    "deep recursion": """
        def down(): return down()
        return down()""",
    "recursion into the stack's end": """
        sys.setrecursionlimit(10**9)
        def down(x): return [down(x) for _ in [0]]
        return down(0)""",
    "null pointer": "ctypes.string_at(0)",
    "abort": "os.abort()",
    "leave at once": "os._exit(0)",
    "SystemExit": "raise SystemExit('1.0')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "exception with a huge text": "raise ValueError('x' * 10**8)",
    "exception that will not be printed": """
        class Bad(Exception):
            def __str__(self):
                while True: pass
        raise Bad""",
    "pickle that runs code": """
        class Bad:
            def __reduce__(self): return (os.system, ('true',))
        return Bad()""",
    "object that claims to be a number": """
        class Bad:
            __class__ = float
            def __float__(self): return 1.0
        return Bad()""",
    "float that lies": """
        class Bad(float):
            def __repr__(self): return '1.0\\n1.0\\n1.0'
            def __sub__(self, other): return 0
        return Bad('nan')""",
    "huge integer": "return 10 ** 400",
    "giant text": "return 'x' * 10**8",
    "text": "return '1.0'",
    "none": "return None",
    "not a number": "return float('nan')",
    "infinity": "return float('inf')",
    "complex": "return 1j",
    "list": "return [1.0]",
}

TIMEOUT = 0.7


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Things of the host that an attack may want, all alive and open: file, variable, servers, a process."""
    canary = tmp_path_factory.mktemp("host") / "canary"
    canary.write_text("untouched")
    os.environ["HOST_SECRET"] = "secret-5c1d"
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0canary-5c1d")
    abstract.listen()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {
        "canary": str(canary),
        "secret": "secret-5c1d",
        "port": server.getsockname()[1],
        "abstract": "canary-5c1d",
    }
    assert canary.read_text() == "untouched"
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    server.close()
    abstract.close()
    del os.environ["HOST_SECRET"]


def source(body: str) -> str:
    return HONEST + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")


def descendants() -> set[str]:
    """Processes below this one, however deep."""
    found, todo = set[str](), [str(os.getpid())]
    while todo:
        pid = todo.pop()
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as children:
                    below = children.read().split()
                found.update(below)
                todo += below
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_costs_only_its_own_sample(name, host):
    before = descendants()
    good, bad = sample_from_text("good"), sample_from_text("attack")
    spec = {"type": "python", "name": "hostile", "source": source(ATTACKS[name])}
    start = time.monotonic()
    with load(spec, workers=1, timeout=TIMEOUT) as grader:
        grades = grader.grade([(host, s) for s in (good, bad, good, good, bad, good)])
        again = grader.grade([(host, good)] * 3)
    assert time.monotonic() - start < 2 * (TIMEOUT + 5) + 3
    assert [g.reward for g in (*grades[0:1], *grades[2:4], *grades[5:], *again)] == [0.25] * 7
    for attacked in (grades[1], grades[4]):
        assert attacked.reward in (0.0, None), attacked
        assert attacked.errors == ([] if attacked.reward == 0.0 else ["python_grader_runtime_error"])
        assert len(attacked.logs) <= 64 << 10
        assert len(str(attacked.details)) < 20_000
        assert "secret-5c1d" not in str(attacked)
    assert all(not g.logs for g in (grades[0], grades[2], grades[3], grades[5]))
    assert descendants() <= before


LOADING = {
    "hang": "import time; time.sleep(10**6)",
    "leave": "import os; os._exit(0)",
    "kill everyone": "import os; os.kill(-1, 9)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "import os\nfor _ in range(30):\n    if os.fork() == 0: break\nx = bytearray(b'x') * (400 << 20)\nimport time; time.sleep(1000)",
    "flood": "while True: print('x' * 10**6)",
    "raise": "1 / 0",
    "no grade": "grade = 3",
    "forge": 'import os\nos.write(4, b\'{"ready": true, "error": null}\\n\' * 10)\nos._exit(0)',
}


@pytest.mark.parametrize("name", LOADING)
def test_attack_while_the_source_is_loaded(name, monkeypatch):
    monkeypatch.setattr("graders.sandbox.pool.START_SECONDS", 2.0)
    before = descendants()
    body = LOADING[name] + "\n"
    spec = {
        "type": "python",
        "name": "hostile",
        "source": body + ("" if "grade" in body else "def grade(s, i): return 1.0"),
    }
    with load(spec, workers=1, timeout=TIMEOUT) as grader:
        grades = grader.grade([({}, sample_from_text("x"))] * 3)
    assert [g.errors for g in grades] == [["python_grader_runtime_error"]] * 3
    assert descendants() <= before


def test_two_pools_do_not_see_each_other():
    source = (
        "import os\nfrom pathlib import Path\ndef grade(sample, item):\n"
        "    seen = Path('/tmp/mine').exists()\n    Path('/tmp/mine').write_text('x')\n    return float(seen)"
    )
    spec = {"type": "python", "name": "a", "source": source}
    with load(spec, workers=2) as one, load(spec, workers=2) as two:
        results: list[float | None] = []
        threads = [
            threading.Thread(
                target=lambda g: results.extend(
                    x.reward for x in g.grade([({}, sample_from_text("x"))] * 20)
                ),
                args=(g,),
            )
            for g in (one, two)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [0.0] * 40
