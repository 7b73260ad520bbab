"""Error responses in OpenAI's shape, and the exception handlers that create them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from linalign import EngineBusy, EngineDead, InvalidRequest, RequestFailed
from linalign.server.core_errors import CODES, described
from linalign.server.exchange import KeyBusy, exchange_of
from linalign.server.protocol.ignored_fields import MAX_CHECKED, MAX_NAME, similar_name
from linalign.server.protocol.schema import Schema
from linalign.server.protocol.strict_json import InvalidBody

MAX_MESSAGE = 1000  # characters; messages may quote the client's input


ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error response."""

    error: ErrorObject


class Refusal(JSONResponse):
    """A response {"error": {"message", "type", "param", "code"}} that records its code for log and metrics."""

    def __init__(self, status: int, error: dict[str, str | None]) -> None:
        super().__init__({"error": error}, status)
        self._code, self._error = error["code"], error

    def _use_anthropics_shape(self) -> None:
        """{"type": "error", "error": {…}}, with Anthropic's types of errors."""
        kind = ANTHROPIC_TYPES.get(
            self.status_code, "api_error" if self.status_code >= 500 else "invalid_request_error"
        )
        self.body = self.render({"type": "error", "error": {**self._error, "type": kind}})
        self.headers["Content-Length"] = str(len(self.body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange_of(scope).error_code = self._code
        if scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1/messages"):
            self._use_anthropics_shape()
        await super().__call__(scope, receive, send)


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> Refusal:
    """An error response. Long messages and field names are truncated."""
    text = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
    return Refusal(status, {"message": text, "type": kind, "param": param and param[:MAX_MESSAGE], "code": code})


class ModelNotFound(Exception):
    def __init__(self, model: str) -> None:
        super().__init__(f"The model {model!r} does not exist")


async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=_rank)
    if "param" in first.get("ctx", {}):  # made by `field_error`
        return error_response(400, first["msg"], first["ctx"]["param"], first["type"])
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        text = "the body must be a JSON object, sent as Content-Type: application/json"
        return error_response(400, text, code="invalid_body")
    name = str(first["loc"][-1])
    path = _path(first["loc"][1:], error.body, ends_with_name=first["type"] == "missing")
    if first["type"].startswith("union_tag"):
        path.append(first["ctx"]["discriminator"].strip("'"))
    param = ".".join(str(part)[:MAX_NAME] for part in path) or None
    if first["type"] == "extra_forbidden":
        similar = similar_name(name, _names_of_closed_objects())
        hint = f"; did you mean {similar}?" if similar else ""
        return error_response(400, f"unknown field {name[:MAX_NAME]!r}{hint}", param, "unknown_field")
    given = list(first["input"])[:MAX_CHECKED] if isinstance(first["input"], dict) else []
    if first["type"] == "missing" and (misspelt := similar_name(name, given)):
        param = ".".join(map(str, (*path[:-1], misspelt)))
        return error_response(400, f"unknown field {misspelt!r}; did you mean {name}?", param, "unknown_field")
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    message = message.replace("valid dictionary", "valid object")
    return error_response(400, f"{param}: {message}" if param else message, param, "invalid_value")


def _rank(problem: Mapping[str, Any]) -> tuple[bool, bool, int, bool]:
    """Sort key for the validation errors of a body; the error with the greatest key is reported.

    A wrong `type` comes first, then an unknown field, then the most deeply nested error. Errors that only say that a
    value is not a string or list come last: they are of the union's other members.
    """
    place, kind = problem["loc"], problem["type"]
    is_wrong_type = kind == "literal_error" and place[-1] == "type"
    return is_wrong_type, kind == "extra_forbidden", len(place), kind not in ("string_type", "list_type")


def _path(location: Sequence[str | int], body: Any, ends_with_name: bool) -> list[str | int]:
    """The path of a field in the body. Pydantic's locations also hold names of union members; these are left out.

    ends_with_name: Whether the last part is the name of a field that is missing in the body.
    """
    path: list[str | int] = []
    value = body
    for part in location:
        is_key = isinstance(value, dict) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            path.append(part)
            value = value[part]
    return [*path, location[-1]] if ends_with_name else path


def _names_of_closed_objects() -> set[str]:
    """Field names of all objects in which an unknown field is an error."""
    schemas = [Schema]
    for schema in schemas:
        schemas += schema.__subclasses__()
    closed = [schema for schema in schemas if schema.model_config["extra"] == "forbid"]
    return {field.alias or name for schema in closed for name, field in schema.model_fields.items()}


async def on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InvalidRequest)
    message, param = described(error, request.scope["route"].path)
    return error_response(400, message, param, CODES[error.code])


async def on_model_not_found(_: Request, error: Exception) -> JSONResponse:
    return error_response(404, str(error), "model", "model_not_found")


async def on_engine_dead(_: Request, error: Exception) -> JSONResponse:
    return error_response(503, str(error), code="engine_dead", kind="server_error")


async def on_engine_busy(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineBusy)
    response = error_response(429, str(error), code="queue_full", kind="rate_limit_error")
    response.headers["Retry-After"] = str(error.retry_after)
    return response


def key_busy(error: KeyBusy) -> Refusal:
    response = error_response(429, str(error), code=error.code, kind="rate_limit_error")
    response.headers["Retry-After"] = str(math.ceil(error.wait))
    return response


async def on_key_busy(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, KeyBusy)
    return key_busy(error)


async def on_request_failed(_: Request, error: Exception) -> JSONResponse:
    return error_response(500, str(error), code="internal_error", kind="server_error")


async def on_invalid_body(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InvalidBody)
    return error_response(400, error.detail, error.param, error.code)


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    response = error_response(error.status_code, str(error.detail), code=HTTP_CODES.get(error.status_code))
    response.headers.update(error.headers or {})
    return response


HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
HANDLERS: dict[Any, Any] = {
    RequestValidationError: on_validation_error,
    InvalidRequest: on_invalid_request,
    ModelNotFound: on_model_not_found,
    EngineBusy: on_engine_busy,
    KeyBusy: on_key_busy,
    EngineDead: on_engine_dead,
    RequestFailed: on_request_failed,
    InvalidBody: on_invalid_body,
    HTTPException: on_http_error,
}
