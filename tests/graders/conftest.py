"""A real HTTP server on loopback that plays the judge, the embeddings model and the endpoint grader."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = Callable[[str, dict[str, Any], dict[str, str]], tuple[int, Any]]


class LoopbackServer:
    """Answers every POST with `answer(path, body, headers) -> (status, JSON value or bytes)`; keeps all requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.times: list[float] = []
        self.answer: Answer = lambda path, body, headers: (200, {})
        self.running = self.most_running = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
                    outer.times.append(time.monotonic())
                    outer.running += 1
                    outer.most_running = max(outer.most_running, outer.running)
                try:
                    status, value = outer.answer(
                        self.path, body, {k.lower(): v for k, v in self.headers.items()}
                    )
                finally:
                    with lock:
                        outer.running -= 1
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    loopback = LoopbackServer()
    yield loopback
    loopback.server.shutdown()
    loopback.server.server_close()
