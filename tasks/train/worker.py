"""The worker process: `python -m tasks.train.worker STAGE RUN_ID`, or `--attached`.

All stages that load a model run here, never in the process that orchestrates: a crash, a kill or an
exhausted GPU then costs one stage, and memory is free again between stages. With `--attached` the heavy
imports happen first, "STAGE RUN_ID" is read from standard input, so that a stage starts at once, and the
worker ends when standard input closes.
Knows neither Prefect nor MLflow. Exit codes: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import traceback

# Stage → module and function; each takes the run, and the argument that follows its id if there is one.
STAGES = {
    "warm_start": "tasks.warm_start:warm_start",
    "calibrate": "tasks.calibrate:calibrate",
    "train": "tasks.train.loop:train",
    "evaluate": "tasks.evaluate:evaluate",
    "compare": "tasks.evaluate:compare",
    "smoke": "api.smoke:smoke",
}


def main(argv: list[str]) -> int:
    faulthandler.enable()
    from tasks.errors import BadInput, StageFailed
    from tasks.home import configure_environment, open_home
    from tasks.run import open_run

    home = open_home()
    configure_environment(home)
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # TRL imports it where it can: 1.3 s for nothing
    if argv == ["--attached"]:
        import tasks.train.loop  # noqa: F401

        argv = _read_line().split()
        _die_with_parent()
    if not argv:
        return 0
    stage, *rest = argv
    if stage not in STAGES or not rest:
        print(f"usage: worker {{{','.join(STAGES)}}} RUN_ID [ARGUMENT]", file=sys.stderr)
        return 2
    run = open_run(rest[0], home)
    module, _, function = STAGES[stage].partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(run, *rest[1:])
    except (BadInput, StageFailed) as error:
        _write(run, stage, {"error": str(error)})
        return 2 if isinstance(error, BadInput) else 1
    except Exception as error:
        traceback.print_exc()
        _write(run, stage, {"error": f"{type(error).__name__}: {error}"})
        return 1
    _write(run, stage, {"result": result if isinstance(result, dict) else result.model_dump(mode="json")})
    return 0


def _write(run, stage: str, document: dict) -> None:
    from tasks.store import write_atomically

    write_atomically(run.path("work", f"{stage}.json"), json.dumps(document).encode())


def _read_line() -> str:
    """One line of standard input, unbuffered: a buffered reader's lock would be held at exit."""
    line = b""
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


def _die_with_parent() -> None:
    """End this process when the parent's end of standard input closes: a killed flow leaves no orphan."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
