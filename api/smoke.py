"""Smoke test: a bundle is served on loopback and asked real questions before any alias moves."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

from api.app import create_app
from api.engine import Engine
from tasks.errors import StageFailed
from tasks.home import Home
from tasks.results import Resolved
from tasks.rollout import sample_dict
from tasks.run import Run

# A served answer may differ from the evaluated one by a token where batch shapes change the rounding.
SMOKE_TOLERANCE = 0.1


def smoke(run: Run, key: str) -> dict[str, Any]:
    """Serve the bundle on loopback, ask it test rows through the `openai` client, grade the answers.

    Returns {rows, reward}. Raises StageFailed when a request fails or the answers are worse than those
    that were evaluated.
    """
    import openai

    run.fetch("evaluation/answers.jsonl")
    lines = run.path("evaluation", "answers.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = rows[: run.job.promotion.smoke_rows]
    resolved = Resolved.model_validate(run.record.stages["validate"]["resolved"])
    with serve_on_loopback(run.home, {"candidate": key}) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="local", max_retries=0, timeout=120)
        pairs = []
        for row in rows:
            try:
                reply = client.chat.completions.create(
                    model="candidate",
                    messages=row["item"]["messages"],
                    temperature=0,
                    max_completion_tokens=resolved.max_completion_tokens,
                )
            except openai.OpenAIError as error:
                raise StageFailed(f"smoke test: the served model did not answer: {error}") from None
            choice = reply.choices[0]
            pairs.append(
                (row["item"], sample_dict(choice.message.content or "", choice.finish_reason == "length"))
            )
    with run.load_grader() as grader:
        grades = grader.grade(pairs)
    served = sum(g.reward or 0.0 for g in grades) / len(grades)
    evaluated = sum(row["best"]["reward"] or 0.0 for row in rows) / len(rows)
    if served < evaluated - SMOKE_TOLERANCE:
        raise StageFailed(
            f"smoke test: the served model scores {served:.3f} on {len(rows)} test rows, evaluation had "
            f"{evaluated:.3f} on the same rows; the champion is unchanged"
        )
    return {"rows": len(rows), "reward": served}


class serve_on_loopback:
    """`openrft serve`'s app on a free port of 127.0.0.1, in a thread; yields its address."""

    def __init__(self, home: Home, pinned: dict[str, str]) -> None:
        self.home, self.pinned = home, pinned

    def __enter__(self) -> str:
        import uvicorn

        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(Engine(self.home, self.pinned)), log_level="warning", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            if time.monotonic() > deadline or not self.thread.is_alive():
                raise StageFailed("smoke test: the server did not start on 127.0.0.1")
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
