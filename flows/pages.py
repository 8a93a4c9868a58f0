"""Prefect's and MLflow's servers on a home's data, and what to do before a flow so that it starts soon."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from tasks.errors import BadInput, StageFailed
from tasks.home import Home

SERVERS = "servers.json"
TEMPORARY = "temporary-servers"


def use_running_server(home: Home) -> None:
    """Point Prefect at the server of `openrft ui` when it is up; a temporary one costs seconds to start."""
    if os.environ.get("PREFECT_API_URL"):
        return
    with contextlib.suppress(OSError, ValueError, KeyError):
        url = json.loads((home.state / SERVERS).read_text("utf-8"))["prefect"]
        if _answers(f"{url}/health"):
            os.environ["PREFECT_API_URL"] = url


def warm_up(home: Home, trains: bool) -> None:
    """Start slow things side by side: Prefect's temporary server, the worker's imports, MLflow's database.

    Only processes run side by side. Imports stay in this thread: two threads that import the same package
    can each meet the other's half-made modules.
    """
    from tasks.train import process

    process.standby()
    starting = None
    if not os.environ.get("PREFECT_API_URL"):
        from prefect.server.api.server import SubprocessASGIServer

        end_orphans(home)
        server = SubprocessASGIServer()
        starting = threading.Thread(target=_start_temporary, args=(server,))
        starting.start()
    from tasks import tracking

    tracking.client(home).search_experiments(max_results=1)
    if trains:
        import great_expectations  # noqa: F401
    if starting is not None:
        starting.join()
        if server.server_process is not None:
            note = home.state / TEMPORARY / str(os.getpid())
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(server.server_process.pid), "utf-8")


def _start_temporary(server: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the flow asks again, and then the failure is told
        server.start(timeout=60)


def end_orphans(home: Home) -> None:
    """End temporary Prefect servers whose flow process was killed: Prefect ends them only on a normal exit."""
    import psutil

    for note in (home.state / TEMPORARY).glob("*"):
        if note.name.isdigit() and psutil.pid_exists(int(note.name)):
            continue
        with contextlib.suppress(psutil.Error, ValueError, OSError):
            server = psutil.Process(int(note.read_text("utf-8")))
            if any("prefect.server" in part for part in server.cmdline()):  # the number may be reused by now
                server.terminate()
        note.unlink(missing_ok=True)


def start(home: Home, prefect_port: int, mlflow_port: int, as_json: bool) -> None:
    """Run both servers until interrupted. Raises BadInput for a port in use, StageFailed if one ends."""
    from flows import console

    for port in (prefect_port, mlflow_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise BadInput(
                    f"port {port} is in use; choose others with --prefect-port and --mlflow-port"
                ) from None
    home.state.mkdir(parents=True, exist_ok=True)
    api = f"http://127.0.0.1:{prefect_port}/api"
    addresses = {"prefect": api, "mlflow": f"http://127.0.0.1:{mlflow_port}"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    servers = {
        "Prefect": _spawn(
            [_script("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)],
            home.state / "prefect-server.log",
            PREFECT_UI_API_URL=api,
        ),
        "MLflow": _spawn(
            [
                _script("mlflow"),
                "server",
                "--backend-store-uri",
                home.tracking_uri,
                "--default-artifact-root",
                home.artifacts,
                "--serve-artifacts",
                "--artifacts-destination",
                home.artifacts,
                "--host",
                "127.0.0.1",
                "--port",
                str(mlflow_port),
                # More workers cost 43 ms per request and 240 MB each; job execution starts seven processes more.
                "--workers",
                "1",
            ],
            home.state / "mlflow-server.log",
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        ),
    }
    try:
        with console.working("starting Prefect and MLflow", quiet=as_json):
            _wait(servers["Prefect"], f"{api}/health", "Prefect", home.state / "prefect-server.log")
            _wait(
                servers["MLflow"], f"{addresses['mlflow']}/health", "MLflow", home.state / "mlflow-server.log"
            )
        (home.state / SERVERS).write_text(json.dumps(addresses), "utf-8")
        if as_json:
            print(
                json.dumps({"prefect": api.removesuffix("/api"), "mlflow": addresses["mlflow"]}), flush=True
            )
        else:
            console.say(
                f"Prefect  {api.removesuffix('/api')}\nMLflow   {addresses['mlflow']}\nCtrl-C stops both."
            )
        while True:
            for name, server in servers.items():
                if server.poll() is not None:
                    raise StageFailed(f"{name}'s server ended with exit code {server.returncode}")
            time.sleep(0.5)
    finally:
        (home.state / SERVERS).unlink(missing_ok=True)
        for server in servers.values():
            server.terminate()
        for server in servers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()


def _script(name: str) -> str:
    """A console script of this very environment, whether or not it is activated."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise StageFailed(f"the command `{name}` is not installed beside {sys.executable}")
    return found


def _spawn(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as sink:
        return subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, **environment})


def _wait(server: subprocess.Popen[bytes], url: str, name: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    while not _answers(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise StageFailed(f"{name}'s server did not start; see {log}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
