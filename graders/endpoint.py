"""The `endpoint` grader: one HTTP POST of {sample, item, trace_id} per sample, answered with {score}.

Azure's contract: ten minutes, answers of at most 1 MB, three retries, a rate limit in requests a second.
A server that does not answer, or answers 5xx or 429 to the last retry, is `unresponsive_reward_error`;
an answer without a usable score, or another 4xx, is `other_error`. The trace id is the same for
every retry of one sample, so that the server can tell a retry from a new sample.

A secret belongs not in `headers`, which are stored with the job, but in the table of endpoints:
{url: {"api_key_env": "VARIABLE"}} sends it as a bearer token.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

from graders.errors import GraderError, Ungradable, shown
from graders.remote import Loop, OnGrade, Pair, each, endpoint_entry
from graders.result import Grade
from graders.samples import parse_json

TIMEOUT = 600.0  # seconds, for all tries of one sample together
RETRIES = 3
MAX_ANSWER = 1 << 20  # bytes
FIRST_PAUSE = 0.25  # seconds before the first retry; doubles, with jitter
LONGEST_PAUSE = 30.0


class EndpointGrader:
    """One URL. Connections are kept open between batches."""

    def __init__(self, spec: dict[str, Any], where: str, options: dict[str, Any]) -> None:
        self.spec, self.options = spec, options
        self.timeout = float(spec.get("timeout", TIMEOUT))
        self.retries = int(spec.get("max_retries", RETRIES))
        self.interval = 1 / spec["rate_limit"] if "rate_limit" in spec else 0.0
        self.next_start = 0.0
        self.loop = Loop()
        self.session: Any = None

    def run(self, pairs: Sequence[Pair], report: OnGrade) -> None:
        """Grade every pair. Raises `GraderError` where the key's variable is not set."""
        self.loop.run(self._run(pairs, report))

    async def _run(self, pairs: Sequence[Pair], report: OnGrade) -> None:
        if self.session is None:
            import aiohttp

            self.session = aiohttp.ClientSession(
                headers={**self.spec.get("headers", {}), **self._key()},
                connector=aiohttp.TCPConnector(limit=self.options["concurrency"]),
            )
        await each(pairs, self.options["concurrency"], self._one, report)

    def _key(self) -> dict[str, str]:
        variable = endpoint_entry(self.options["endpoints"], self.spec["url"]).get("api_key_env")
        if variable is None:
            return {}
        if not os.environ.get(variable):
            raise GraderError(f"endpoints.{self.spec['url']}.api_key_env: the variable {variable} is not set")
        return {"Authorization": f"Bearer {os.environ[variable]}"}

    async def _one(self, item: Any, sample: Any) -> Grade:
        start = time.perf_counter()
        try:
            body = json.dumps({"sample": sample, "item": item, "trace_id": _trace_id(sample)}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return Grade.failed("other_error", f"the pair cannot be written as JSON: {error}")
        try:
            async with asyncio.timeout(self.timeout):
                score = await self._ask(body)
        except TimeoutError:
            message = f"no answer within {self.timeout:g} seconds"
            return Grade.failed("unresponsive_reward_error", message, seconds=time.perf_counter() - start)
        except Ungradable as error:
            return Grade.failed(error.error_class, error.message, seconds=time.perf_counter() - start)
        return Grade(score, seconds=time.perf_counter() - start)

    async def _ask(self, body: bytes) -> float:
        import aiohttp

        for attempt in range(self.retries + 1):
            await self._turn()
            pause = FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25)
            try:
                async with self.session.post(
                    self.spec["url"],
                    data=body,
                    headers={"Content-Type": "application/json"},
                    allow_redirects=False,
                ) as response:
                    text = await _read(response)
                    if response.status == 200:
                        return read_score(text)
                    trouble = f"HTTP {response.status}: {shown(text.decode('utf-8', 'replace'), 300)}"
                    if response.status < 500 and response.status not in (408, 429):
                        raise Ungradable("other_error", trouble)
                    pause = _asked_pause(response.headers.get("Retry-After"), pause)
            except (aiohttp.ClientError, OSError) as error:
                trouble = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                await asyncio.sleep(min(pause, LONGEST_PAUSE))
        raise Ungradable("unresponsive_reward_error", f"{trouble} (after {self.retries} retries)")

    async def _turn(self) -> None:
        """Wait for this request's turn under the rate limit: starts are spaced evenly."""
        if not self.interval:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self.next_start)
        self.next_start = start + self.interval
        await asyncio.sleep(start - now)

    def close(self) -> None:
        """Cancel requests in flight and close connections."""
        session, self.session = self.session, None
        self.loop.close(*([session.close] if session else []))


async def _read(response: Any) -> bytes:
    text = b""
    async for chunk in response.content.iter_chunked(1 << 16):
        text += chunk
        if len(text) > MAX_ANSWER:
            raise Ungradable("other_error", f"the answer is larger than {MAX_ANSWER} bytes")
    return text


def _trace_id(sample: Any) -> str:
    given = sample.get("trace_id") if isinstance(sample, dict) else None
    return given if isinstance(given, str) else str(uuid.uuid4())


def _asked_pause(header: str | None, default: float) -> float:
    try:
        return max(0.0, float(header)) if header else default
    except ValueError:  # a date: rare, and our own pause does as well
        return default


def read_score(text: bytes) -> float:
    """The score of an answer {"score": number}. Raises `Ungradable` (other_error) for anything else."""
    answer = parse_json(text.decode("utf-8", "replace"))
    score = answer.get("score") if isinstance(answer, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise Ungradable("other_error", f"no number 'score' in {shown(text.decode('utf-8', 'replace'), 300)}")
    try:
        number = float(score)
    except OverflowError:
        number = float("inf")
    if number - number != 0:
        raise Ungradable("other_error", f"the score is not finite: {shown(score)}")
    return number
