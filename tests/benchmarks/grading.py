"""Speed of the graders: `python tests/benchmarks/grading.py [--json FILE]`.

Every number stands beside what it is a share of, measured in the same run, since the machine may be busy:
forks beside bare forks of a bare interpreter, bodies beside bare processes, judges beside the latency.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from graders import load, sample_from_text
from graders.grader import cores

BATCH = 512
TRIVIAL = "def grade(sample, item):\n    return 0.5"
BODY = (
    "import time\n"
    "def grade(sample, item):\n"
    "    end = time.process_time() + 0.005\n"
    "    while time.process_time() < end: pass\n"
    "    return 0.5"
)
PAIR = ({"answer": "4"}, sample_from_text("The answer is 4."))
CHECK = {
    "type": "string_check", "name": "c", "operation": "eq",
    "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
}  # fmt: skip


def best(run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the quickest of several runs: the one least disturbed."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def python_rate(isolation: str, source: str = TRIVIAL, batch: int = BATCH) -> float:
    """Grades a second of a warm pool."""
    with load({"type": "python", "name": "p", "source": source}, isolation=isolation) as grader:  # type: ignore[arg-type]
        pairs = [PAIR] * batch
        grader.grade(pairs)
        assert {grade.reward for grade in grader.grade(pairs)} == {0.5}
        return batch / best(lambda: grader.grade(pairs))


FORKS = (
    "import os, time, sys\n"
    "n = 1000; start = time.perf_counter()\n"
    "for _ in range(n):\n"
    "    if os.fork() == 0: os._exit(0)\n"
    "    os.wait()\n"
    "print(n / (time.perf_counter() - start))"
)


def bare_forks() -> float:
    """Forks a second of bare interpreters, one per core at once, with nothing in them: the ceiling."""
    running = [
        subprocess.Popen([sys.executable, "-S", "-s", "-c", FORKS], stdout=subprocess.PIPE, text=True)
        for _ in range(cores())
    ]
    return sum(float(process.communicate()[0]) for process in running)


def _body(_: int) -> float:
    end = time.process_time() + 0.005
    while time.process_time() < end:
        pass
    return 0.5


def bare_body() -> float:
    """Calls a second of the 5 ms body as a plain function on as many processes."""
    with multiprocessing.get_context("fork").Pool(cores()) as pool:
        pool.map(_body, range(64))
        return BATCH / best(lambda: pool.map(_body, range(BATCH), chunksize=4), 3)


SERVER = """
import asyncio, json, sys
content = json.dumps({"steps": [], "result": 0.5})
body = json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}).encode()
answer = b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body) + body
class Judge(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.seen = transport, b""
    def data_received(self, data):
        self.seen += data
        head, end, rest = self.seen.partition(b"\\r\\n\\r\\n")
        if not end: return
        length = int(head.lower().split(b"content-length:")[1].split(b"\\r\\n")[0])
        if len(rest) >= length:
            self.seen = rest[length:]
            asyncio.get_running_loop().call_later(0.05, self.transport.write, answer)
async def main():
    server = await asyncio.get_running_loop().create_server(Judge, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def judge_ratio(calls: int, concurrency: int) -> float:
    """Time of `calls` requests to a judge of 50 ms latency, as a multiple of calls / concurrency * 50 ms."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        spec: dict[str, Any] = {
            "type": "score_model", "name": "j", "model": "m",
            "input": [{"role": "user", "content": "{{sample.output_text}}"}],
        }  # fmt: skip
        with load(spec, endpoints={"*": {"base_url": url}}, concurrency=concurrency) as grader:
            pairs = [PAIR] * calls
            grader.grade(pairs)
            assert all(grade.reward == 0.5 for grade in grader.grade(pairs))
            return best(lambda: grader.grade(pairs), 3) / (calls / concurrency * 0.05)
    finally:
        server.kill()
        server.wait()


def import_seconds() -> float:
    """Seconds of `import graders` in a fresh interpreter, interpreter start not counted."""
    code = "import time; t = time.perf_counter(); import graders; print(time.perf_counter() - t)"
    return min(float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(5))


def measure() -> dict[str, float]:
    """All numbers, by name."""
    found: dict[str, float] = {"cores": cores(), "load_before": os.getloadavg()[0]}
    found["import_seconds"] = import_seconds()
    pairs = [PAIR] * 50_000
    multi = {
        "type": "multi",
        "name": "m",
        "graders": {"a": CHECK, "b": CHECK},
        "calculate_output": "0.5 * a + 0.5 * b",
    }
    found["string_check_per_second"] = len(pairs) / best(lambda: load(CHECK).grade(pairs))
    found["multi_of_two_checks_per_second"] = len(pairs) / best(lambda: load(multi).grade(pairs))
    found["bare_forks_per_second"] = bare_forks()
    found["python_call_per_second"] = python_rate("call")
    found["python_call_share_of_bare_forks"] = (
        found["python_call_per_second"] / found["bare_forks_per_second"]
    )
    found["python_worker_per_second"] = python_rate("worker", batch=8 * BATCH)
    found["bare_5ms_per_second"] = bare_body()
    found["python_5ms_per_second"] = python_rate("call", BODY)
    found["python_5ms_times_bare"] = found["bare_5ms_per_second"] / found["python_5ms_per_second"]
    for calls, concurrency in ((200, 16), (200, 32), (1000, 64), (1000, 200)):
        found[f"judge_{calls}_calls_{concurrency}_at_once_times_ideal"] = judge_ratio(calls, concurrency)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    numbers = measure()
    for name, value in numbers.items():
        print(f"{name:46s} {value:12,.3f}" if value < 100 else f"{name:46s} {value:12,.0f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(numbers, file, indent=1)
