"""What model and endpoint graders share: an event loop in a thread, bounded concurrency, the answer cache."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from graders.errors import GraderError
from graders.result import Grade

T = TypeVar("T")
Pair = tuple[dict[str, Any], dict[str, Any]]
OnGrade = Callable[[int, Grade], None]


class Loop:
    """An event loop in a thread of its own, so that callers stay synchronous and connections stay open."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return the result. An interrupt in the caller cancels the work."""
        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                self.thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="grader-loop")
                self.thread.start()
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, *closers: Callable[[], Awaitable[None]]) -> None:
        """Cancel what runs, close the clients, stop the thread."""
        with self.lock:
            loop, thread, self.loop, self.thread = self.loop, self.thread, None, None
        if loop is None or thread is None:
            return

        async def finish() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for close in closers:
                with contextlib.suppress(Exception):
                    await close()

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(finish(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        if not thread.is_alive():
            loop.close()


async def each(
    pairs: Sequence[Pair],
    concurrency: int,
    one: Callable[[dict[str, Any], dict[str, Any]], Awaitable[Grade]],
    report: OnGrade,
) -> None:
    """Grade all pairs, at most `concurrency` at once. A fixed number of tasks share one iterator, so that a
    million pairs do not become a million tasks."""
    numbered = iter(enumerate(pairs))

    async def work() -> None:
        for index, (item, sample) in numbered:
            report(index, await one(item, sample))

    tasks = [asyncio.create_task(work()) for _ in range(min(concurrency, len(pairs)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class Cache:
    """Answers on disk, by the hash of the full request. Safe for several processes (SQLite, WAL).

    Two equal requests in flight at once are sent once. Without a folder nothing is kept nor shared:
    two equal questions to a judge are then two samples of it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.database: sqlite3.Connection | None = None
        self.flying: dict[str, asyncio.Future[Any]] = {}

    def _open(self) -> sqlite3.Connection:
        if self.database is None:
            assert self.folder is not None
            self.folder.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.folder / "answers.sqlite", timeout=30, isolation_level=None)
            self.database.execute("pragma journal_mode=wal")
            self.database.execute("pragma synchronous=off")  # losing the last answers in a crash is harmless
            self.database.execute("create table if not exists answers (key text primary key, value text)")
        return self.database

    async def ask(self, request: Any, send: Callable[[], Awaitable[T]]) -> tuple[T, bool]:
        """(the answer, whether it was known already). Only what `send` returns is kept, never what it raises."""
        if self.folder is None:
            return await send(), False
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        row = self._open().execute("select value from answers where key = ?", (key,)).fetchone()
        if row is not None:
            return json.loads(row[0]), True
        if key in self.flying:
            return await asyncio.shield(self.flying[key]), True
        flight: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.flying[key] = flight
        try:
            answer = await send()
        except BaseException as error:
            flight.set_exception(error if isinstance(error, Exception) else ConnectionError("cancelled"))
            flight.exception()  # seen: no warning when nobody waits
            raise
        else:
            flight.set_result(answer)
        finally:
            del self.flying[key]
        self._open().execute("insert or replace into answers values (?, ?)", (key, json.dumps(answer)))
        return answer, False

    async def close(self) -> None:
        """Close the file. Runs in the loop's thread, to which SQLite ties the connection."""
        if self.database is not None:
            self.database.close()
            self.database = None


def endpoint_entry(endpoints: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The entry for a model (or an endpoint grader's url), else that of '*', else nothing."""
    return endpoints.get(name) or endpoints.get("*") or {}


def open_client(endpoints: dict[str, dict[str, Any]], model: str) -> tuple[Any, str]:
    """(an AsyncOpenAI client for this model, its base url). Entries may hold base_url, api_key_env, timeout
    (seconds) and max_retries; without an entry the SDK's own environment variables hold.

    Raises `GraderError` where the key's variable is not set.
    """
    import openai

    entry = endpoint_entry(endpoints, model)
    variable = entry.get("api_key_env", "OPENAI_API_KEY")
    key = os.environ.get(variable)
    if not key:
        if "api_key_env" in entry or "base_url" not in entry:
            raise GraderError(
                f"the judge {model!r} needs a key: the variable {variable} is not set (endpoints.{model}.api_key_env)"
            )
        key = "none"  # a server of one's own that asks for none
    client = openai.AsyncOpenAI(
        base_url=entry.get("base_url"),
        api_key=key,
        timeout=float(entry.get("timeout", 600)),
        max_retries=int(entry.get("max_retries", 4)),
        # aiohttp: the SDK's default transport spends several milliseconds a call on a full connection pool.
        http_client=openai.DefaultAioHttpClient(),
    )
    return client, str(client.base_url)
