"""Model graders: `score_model` and `label_model`, through the openai SDK against any compatible endpoint.

The judge must answer in a JSON schema: reasoning steps first, then the result, so that it reasons before
it scores. A score is clamped to `range`. What can go wrong is told apart: the server fails or does not
answer (`model_grader_server_error`), the judge refuses (`model_grader_refusal_error`), its answer cannot
be read (`model_grader_parse_error`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from graders.errors import GraderError, Ungradable, shown
from graders.remote import Cache, Loop, OnGrade, Pair, each, open_client
from graders.result import TOKEN_KEYS, Grade
from graders.samples import MISSING, parse_json
from graders.templates import Template, parse_template

STEP = {
    "type": "object",
    "properties": {"description": {"type": "string"}, "conclusion": {"type": "string"}},
    "required": ["description", "conclusion"],
    "additionalProperties": False,
}
MAX_LOG = 16_000  # characters of a judge's steps kept with the grade


class ModelGrader:
    """One judge. Requests run `concurrency` at a time; the SDK retries with back-off, as the server asks."""

    def __init__(self, spec: dict[str, Any], where: str, options: dict[str, Any]) -> None:
        self.spec, self.options = spec, options
        self.templates: list[tuple[str, Template]] = []
        self.messages = [
            (message["role"], self._compile(message["content"], f"{where}.input[{i}].content"))
            for i, message in enumerate(spec["input"])
        ]
        if spec["type"] == "label_model":
            unknown = [label for label in spec["passing_labels"] if label not in spec["labels"]]
            if unknown:
                raise GraderError(
                    f"{where}.passing_labels: found {unknown[0]!r}, expected some of labels: {', '.join(spec['labels'])}"
                )
        self.fixed = {
            "model": spec["model"],
            **_sampling(spec.get("sampling_params", {})),
            "response_format": response_format(spec),
        }
        self.loop = Loop()
        self.cache = Cache(options["cache_dir"])
        self.client: Any = None

    def _compile(self, content: Any, where: str) -> Any:
        """Content with every string in it parsed as a template; the JSON structure stays."""
        if isinstance(content, str):
            template = parse_template(content, where)
            self.templates.append((where, template))
            return template
        if isinstance(content, list):
            return [self._compile_block(block, f"{where}[{i}]") for i, block in enumerate(content)]
        return [self._compile_block(content, where)]

    def _compile_block(self, block: Any, where: str) -> Any:
        if isinstance(block, str):
            block = {"type": "input_text", "text": block}
        return {
            key: value
            if key in ("type", "detail")
            else self._compile_block({"type": "", **value}, f"{where}.{key}")
            if isinstance(value, dict)
            else self._compile(value, f"{where}.{key}")
            for key, value in block.items()
        }

    def request(self, item: Any, sample: Any) -> dict[str, Any]:
        """The chat-completions body for one sample. Raises `Ungradable` where a template does not fit it."""
        messages = [
            {"role": role, "content": _render(content, item, sample)} for role, content in self.messages
        ]
        return {**self.fixed, "messages": messages}

    def run(self, pairs: Sequence[Pair], report: OnGrade) -> None:
        """Grade every pair. Raises `GraderError` where no client can be made (no key)."""
        self.loop.run(self._run(pairs, report))

    async def _run(self, pairs: Sequence[Pair], report: OnGrade) -> None:
        if self.client is None:
            self.client, self.base_url = open_client(self.options["endpoints"], self.spec["model"])
        await each(pairs, self.options["concurrency"], self._one, report)

    async def _one(self, item: Any, sample: Any) -> Grade:
        start = time.perf_counter()
        try:
            body = self.request(item, sample)
            answer, known = await self.cache.ask([self.base_url, body], lambda: self._send(body))
        except Ungradable as error:
            usage = getattr(error, "usage", None)
            return Grade.failed(
                error.error_class,
                error.message,
                seconds=time.perf_counter() - start,
                token_usage={self.spec["model"]: usage} if usage else {},
            )
        return Grade(
            answer["score"],
            seconds=time.perf_counter() - start,
            # A known answer costs no tokens; the zeros still say which model judged.
            token_usage={self.spec["model"]: dict.fromkeys(TOKEN_KEYS, 0) if known else answer["usage"]},
            logs=answer["steps"],
        )

    async def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        import openai

        try:
            # The plain request: building the SDK's typed objects costs more than the call to a near server.
            data = await self.client.post("/chat/completions", body=body, cast_to=object)
        except openai.APIStatusError as error:
            text = f"HTTP {error.status_code}: {shown(error.message, 500)}"
            raise Ungradable("model_grader_server_error", text) from None
        except openai.APITimeoutError:
            raise Ungradable("model_grader_server_error", "no answer in time") from None
        except openai.APIError as error:
            cause = error.__cause__ or error
            raise Ungradable(
                "model_grader_server_error", f"{type(cause).__name__}: {shown(str(cause), 500)}"
            ) from None
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise Ungradable("model_grader_server_error", "the server's answer is not a JSON object")
        usage = read_usage(data)
        try:
            return {**read_answer(data, self.spec), "usage": usage}
        except Ungradable as error:
            error.usage = usage  # type: ignore[attr-defined]  # the tokens were spent all the same
            raise

    def close(self) -> None:
        """Cancel requests in flight and close connections."""
        client, self.client = self.client, None
        self.loop.close(*([client.close] if client else []), self.cache.close)


def _sampling(params: dict[str, Any]) -> dict[str, Any]:
    names = {"max_completions_tokens": "max_completion_tokens"}  # the API's own spelling
    return {names.get(name, name): value for name, value in params.items()}


def response_format(spec: dict[str, Any]) -> dict[str, Any]:
    """The forced structured output: {"steps": [{description, conclusion}], "result": number or label}."""
    if spec["type"] == "label_model":
        name, result = "label_classification", {"type": "string", "enum": spec["labels"]}
    else:
        low, high = spec["range"]
        name = "float_score_classification"
        result = {"type": "number", "description": f"The score, between {low} and {high}, inclusive"}
    schema = {
        "type": "object",
        "properties": {"steps": {"type": "array", "items": STEP}, "result": result},
        "required": ["steps", "result"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


def _render(content: Any, item: Any, sample: Any) -> Any:
    if isinstance(content, Template):
        return content.render(item, sample)
    return [_render_block(block, item, sample) for block in content]


def _render_block(block: dict[str, Any], item: Any, sample: Any) -> dict[str, Any]:
    filled = {
        key: value.render(item, sample)
        if isinstance(value, Template)
        else {k: v.render(item, sample) for k, v in value.items() if isinstance(v, Template)}
        if isinstance(value, dict)
        else value
        for key, value in block.items()
    }
    if filled["type"] == "input_image":
        image = {"url": filled["image_url"], **({"detail": filled["detail"]} if "detail" in filled else {})}
        return {"type": "image_url", "image_url": image}
    if filled["type"] == "input_audio":
        return filled
    return {"type": "text", "text": filled["text"]}


def read_usage(data: Any) -> dict[str, int]:
    """Token counts of a chat-completions response; zeros where the server does not count."""
    usage = data.get("usage") if isinstance(data, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    found = {**usage, "cached_tokens": cached}
    counts = {key: found.get(key) for key in TOKEN_KEYS}
    return {key: value if isinstance(value, int) else 0 for key, value in counts.items()}


def read_answer(data: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """{"score", "steps"} of a response. Raises `Ungradable`: refusal, or an answer that cannot be read."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        refusal, content, reason = message.get("refusal"), message.get("content"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Ungradable("model_grader_parse_error", f"no message in {shown(data, 500)}") from None
    if refusal or reason == "content_filter":
        raise Ungradable("model_grader_refusal_error", shown(refusal or "content filter", 500))
    answer = parse_json(content)
    if answer is MISSING or not isinstance(answer, dict) or "result" not in answer:
        cut = " (cut off: raise max_completions_tokens)" if reason == "length" else ""
        raise Ungradable("model_grader_parse_error", f"not {{steps, result}}: {shown(content, 500)}{cut}")
    result = answer["result"]
    if spec["type"] == "label_model":
        if result not in spec["labels"]:
            raise Ungradable("model_grader_parse_error", f"not one of the labels: {shown(result)}")
        score = 1.0 if result in spec["passing_labels"] else 0.0
    else:
        score = clamped(result, spec["range"])
    return {"score": score, "steps": _steps(answer)}


def clamped(result: Any, bounds: list[float]) -> float:
    """A judge's number, cut to the range. Raises `Ungradable` for what is not a finite number."""
    if isinstance(result, bool) or not isinstance(result, int | float):
        raise Ungradable("model_grader_parse_error", f"the result is not a number: {shown(result)}")
    try:
        number = float(result)
    except OverflowError:
        number = math.inf if result > 0 else -math.inf
    if math.isnan(number):
        raise Ungradable("model_grader_parse_error", "the result is not a number: NaN")
    return float(min(max(number, bounds[0]), bounds[1]))


def _steps(answer: dict[str, Any]) -> str:
    steps = answer.get("steps")
    lines = [
        f"{step.get('description', '')}: {step.get('conclusion', '')}"
        if isinstance(step, dict)
        else json.dumps(step)
        for step in (steps if isinstance(steps, list) else [])
    ]
    return "\n".join(lines)[:MAX_LOG]
