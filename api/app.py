"""The OpenAI-compatible front door: `GET /v1/models` and `POST /v1/chat/completions`.

Answers come whole; `stream`, `tools` and JSON schemas are refused by name rather than ignored.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from api.engine import Engine


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    def as_row(self) -> dict[str, str]:
        """The message as a dataset row holds it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


def _only(supported: Any) -> Any:
    """A validator for an option that has one supported value so far: any other is refused by name."""

    def check(value: Any) -> Any:
        if value not in (None, supported):
            raise ValueError(f"only {json.dumps(supported)} is supported so far")
        return value

    return check


class ChatRequest(BaseModel):
    """The parts of OpenAI's request that are honoured; any other key is an error that names it."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: Annotated[float | None, AfterValidator(_only(1.0))] = None
    frequency_penalty: Annotated[float | None, AfterValidator(_only(0.0))] = None
    presence_penalty: Annotated[float | None, AfterValidator(_only(0.0))] = None
    response_format: TextFormat | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: Annotated[bool | None, AfterValidator(_only(False))] = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


def create_app(engine: Engine) -> FastAPI:
    app = FastAPI(title="OpenRFT", version="0.1.0")
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(m.id, m.created) for m in engine.models()]}

    @app.get("/v1/models/{name:path}")
    def retrieve_model(name: str) -> dict[str, Any]:
        found = engine.find(name)
        if found is None:
            raise HTTPException(404, _no_model(engine, name))
        return _model(found.id, found.created)

    @app.post("/v1/chat/completions")
    def chat(body: ChatRequest) -> dict[str, Any]:
        found = engine.find(body.model)
        if found is None:
            raise HTTPException(404, _no_model(engine, body.model))
        try:
            prompt_tokens, answers = engine.chat(
                found.key,
                [m.as_row() for m in body.messages],
                n=body.n,
                temperature=body.temperature,
                max_tokens=body.max_completion_tokens or body.max_tokens,
                seed=body.seed,
                stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
            )
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        completion_tokens = sum(a.tokens for a in answers)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": found.key,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": a.text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": a.finish_reason,
                }
                for index, a in enumerate(answers)
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }

    return app


def _model(id: str, created: int) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": created, "owned_by": "openrft"}


def _no_model(engine: Engine, name: str) -> str:
    known = ", ".join(m.id for m in engine.models()) or "none yet"
    return f"The model `{name}` does not exist. Deployed: {known}."


def _error(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    body = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(body, status_code=status)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error(400, "The request body is not valid JSON.", "invalid_request_error")
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        return _error(400, f"Unknown or unsupported parameter: '{param}'.", "invalid_request_error", param)
    return _error(400, f"Invalid value for '{param}': {first['msg']}.", "invalid_request_error", param)


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail), "invalid_request_error")


def _failed(request: Request, error: Exception) -> JSONResponse:
    return _error(500, "The server had an error while processing your request.", "server_error")
