"""Where the sandbox runs, where it refuses to, and what the pool promises besides safety."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from graders import GraderError, load, sample_from_text
from graders.sandbox.command import bwrap_path, image
from graders.sandbox.seccomp import program

SCRIPT = """
import json, os, sys
from graders import GraderError, load, sample_from_text
source = "import os\\ndef grade(sample, item):\\n    print(sorted(os.environ)); return float(os.getpid())"
spec = {"type": "python", "name": "p", "source": source}
try:
    with load(spec, workers=1, unsafe="unsafe" in sys.argv) as grader:
        (found,) = grader.grade([({}, sample_from_text("x"))])
    print(json.dumps({"user": os.geteuid(), "reward": found.reward, "errors": found.errors, "logs": found.logs}))
except GraderError as error:
    print(json.dumps({"user": os.geteuid(), "refused": str(error)}))
"""


def inside(*arguments, script=SCRIPT):
    """The script's answer when it runs under bwrap, which here plays another machine: another user, or a
    kernel that allows no user namespaces."""
    bwrap = [bwrap_path(), "--dev-bind", "/", "/", "--unshare-user", "--uid", "1234", "--gid", "1234"]
    own = [argument for argument in arguments if argument.startswith("--")]
    rest = [argument for argument in arguments if not argument.startswith("--")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*bwrap, *own, sys.executable, "-c", script, *rest],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_runs_for_a_user_who_is_not_root():
    found = inside()
    assert found["user"] == 1234
    assert found["errors"] == []
    assert found["reward"] < 10  # a pid of its own namespace
    assert "HOST" not in found["logs"]


def test_refuses_where_the_kernel_forbids_it_and_says_why():
    found = inside("--disable-userns")
    assert "kernel setting user.max_user_namespaces" in found["refused"]
    assert "--unsafe-graders" in found["refused"]


def test_unsafe_runs_there_with_a_clean_environment():
    found = inside("--disable-userns", "unsafe")
    assert found["errors"] == []
    assert "PYTHONPATH" not in found["logs"]
    assert "PYTHONHASHSEED" in found["logs"]


def test_unsafe_still_limits_time_and_kills_children():
    source = "import os, time\ndef grade(sample, item):\n    os.fork(); time.sleep(1000)"
    with load({"type": "python", "source": source}, workers=1, timeout=0.5, unsafe=True) as grader:
        (found,) = grader.grade([({}, sample_from_text("x"))])
    assert found.errors == ["python_grader_runtime_error"]
    assert "TimeoutError" in found.details["python_grader_runtime_error_details"]


def test_filter_fits_the_kernels_format():
    rules = program()
    assert rules is None or (len(rules) % 8 == 0 and len(rules) // 8 < 4096)


def test_closing_ends_every_process_at_once():
    grader = load(
        {"type": "python", "source": "import time\ndef grade(sample, item): time.sleep(1000)"}, workers=2
    )
    import threading

    outcome: list[object] = []

    def work():
        try:
            outcome.append(grader.grade([({}, sample_from_text("x"))] * 4))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(1)
    pids = [seat.worker.process.pid for seat in grader._batched["python"].pool.seats]
    start = time.monotonic()
    grader.close()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - start < 3
    assert len(pids) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert isinstance(outcome[0], GraderError)
    assert "closed" in str(outcome[0])


def test_dying_parent_takes_its_sandboxes_along():
    script = (
        "import os, time\nfrom graders import load, sample_from_text\n"
        "g = load({'type': 'python', 'source': 'def grade(s, i): return 1.0'}, workers=1)\n"
        "g.grade([({}, sample_from_text('x'))])\n"
        "print(g._batched['python'].pool.seats[0].worker.process.pid, flush=True)\ntime.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(50):
        state = Path(f"/proc/{pid}/status")
        if not state.exists() or "\nState:\tZ" in state.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the sandbox outlived its parent")


def test_an_error_in_the_callback_stops_grading():
    def stop(index, grade):
        raise RuntimeError("stop")

    grader = load({"type": "python", "source": "def grade(sample, item): return 1.0"}, workers=1)
    with pytest.raises(RuntimeError, match="stop"):
        grader.grade([({}, sample_from_text("x"))] * 100, stop)
    # And the grader is still good.
    with grader:
        assert grader.grade([({}, sample_from_text("x"))])[0].reward == 1.0


def test_image_tag_names_an_environment_when_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENRFT_GRADER_IMAGES", str(tmp_path))
    assert image("2025-05-08") == image(None)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "mine")], check=True)
    site = next((tmp_path / "mine" / "lib").glob("python*/site-packages"))
    (site / "only_here.py").write_text("value = 0.75")
    source = "import only_here\ndef grade(sample, item): return only_here.value"
    with load({"type": "python", "source": source, "image_tag": "mine"}, workers=1) as grader:
        assert grader.grade([({}, sample_from_text("x"))])[0].reward == 0.75
    assert image("../mine") == image(None)


def test_an_environment_under_tmp_survives_what_calls_leave_behind(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("OPENRFT_GRADER_IMAGES", folder)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{folder}/mine"], check=True)
        source = (
            "import os\ndef grade(sample, item):\n    os.makedirs('/tmp/left/over')\n"
            "    open('/tmp/file', 'w').close()\n    import colorsys, decimal\n    return 1.0"
        )
        with load({"type": "python", "source": source, "image_tag": "mine"}, workers=1) as grader:
            grades = grader.grade([({}, sample_from_text("x"))] * 20)
            worker = grader._batched["python"].pool.seats[0].worker.process.pid
            grades += grader.grade([({}, sample_from_text("x"))] * 20)
            assert grader._batched["python"].pool.seats[0].worker.process.pid == worker
    assert [g.reward for g in grades] == [1.0] * 40


def test_logs_belong_to_their_own_sample():
    source = "import sys\ndef grade(sample, item):\n    print(sample['output_text']); print('err', file=sys.stderr); return 1.0"
    with load({"type": "python", "source": source}, workers=2) as grader:
        grades = grader.grade([({}, sample_from_text(f"text {i}")) for i in range(50)])
    assert [g.logs for g in grades] == [f"text {i}\nerr\n" for i in range(50)]


def test_strange_texts_arrive_unchanged():
    texts = ["\ud800", "\0", "\u2028\n\r", "é" * 1000, "x" * 3_000_000, '"}\n{"', ""]
    source = "def grade(sample, item): return float(sample['output_text'] == item['t'])"
    with load({"type": "python", "source": source}, workers=1) as grader:
        assert [g.reward for g in grader.grade([({"t": t}, sample_from_text(t)) for t in texts])] == [
            1.0
        ] * len(texts)


def test_what_is_not_json_costs_its_own_sample():
    with load({"type": "python", "source": "def grade(sample, item): return 1.0"}, workers=1) as grader:
        grades = grader.grade([({"x": object()}, sample_from_text("a")), ({}, sample_from_text("b"))])
    assert [(g.reward, g.errors) for g in grades] == [(None, ["other_error"]), (1.0, [])]
