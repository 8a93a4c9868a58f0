"""`text_similarity` with the metric `cosine`: the cosine of two embeddings from an OpenAI-compatible endpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from graders.errors import Ungradable, shown
from graders.remote import Cache, Loop, OnGrade, Pair, each, open_client
from graders.result import TOKEN_KEYS, Grade
from graders.templates import parse_template

MODEL = "text-embedding-3-large"  # the documented one; the field `model` names another


class CosineGrader:
    """One request per sample, with both texts in it; -1 to 1, as the cosine is."""

    def __init__(self, spec: dict[str, Any], where: str, options: dict[str, Any]) -> None:
        self.spec, self.options = spec, options
        self.model: str = spec.get("model", MODEL)
        self.input = parse_template(spec["input"], f"{where}.input")
        self.reference = parse_template(spec["reference"], f"{where}.reference")
        self.templates = [(f"{where}.input", self.input), (f"{where}.reference", self.reference)]
        self.loop = Loop()
        self.cache = Cache(options["cache_dir"])
        self.client: Any = None

    def run(self, pairs: Sequence[Pair], report: OnGrade) -> None:
        """Grade every pair. Raises `GraderError` where no client can be made (no key)."""
        self.loop.run(self._run(pairs, report))

    async def _run(self, pairs: Sequence[Pair], report: OnGrade) -> None:
        if self.client is None:
            self.client, self.base_url = open_client(self.options["endpoints"], self.model)
        await each(pairs, self.options["concurrency"], self._one, report)

    async def _one(self, item: Any, sample: Any) -> Grade:
        start = time.perf_counter()
        try:
            texts = [self.input.render(item, sample), self.reference.render(item, sample)]
            body = {"model": self.model, "input": texts, "encoding_format": "float"}
            answer, known = await self.cache.ask([self.base_url, body], lambda: self._send(texts))
        except Ungradable as error:
            return Grade.failed(error.error_class, error.message, seconds=time.perf_counter() - start)
        usage = dict.fromkeys(TOKEN_KEYS, 0) if known else answer["usage"]
        return Grade(answer["score"], seconds=time.perf_counter() - start, token_usage={self.model: usage})

    async def _send(self, texts: list[str]) -> dict[str, Any]:
        import openai

        try:
            found = await self.client.embeddings.create(
                model=self.model, input=texts, encoding_format="float"
            )
            one, two = (entry.embedding for entry in found.data)
        except openai.APIError as error:
            raise Ungradable(
                "model_grader_server_error", f"{type(error).__name__}: {shown(error.message, 500)}"
            ) from None
        except (ValueError, TypeError, AttributeError):
            raise Ungradable("model_grader_server_error", "the server sent no two embeddings") from None
        tokens = found.usage.prompt_tokens if found.usage else 0
        usage = {**dict.fromkeys(TOKEN_KEYS, 0), "prompt_tokens": tokens, "total_tokens": tokens}
        return {"score": cosine(one, two), "usage": usage}

    def close(self) -> None:
        """Cancel requests in flight and close connections."""
        client, self.client = self.client, None
        self.loop.close(*([client.close] if client else []), self.cache.close)


def cosine(one: Sequence[float], two: Sequence[float]) -> float:
    """The cosine of two vectors of equal length, from -1 to 1. Raises `Ungradable` for a zero vector."""
    length = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in two))
    if not length or not math.isfinite(length) or len(one) != len(two):
        raise Ungradable("model_grader_server_error", "the embeddings cannot be compared")
    return max(-1.0, min(1.0, sum(x * y for x, y in zip(one, two, strict=True)) / length))
