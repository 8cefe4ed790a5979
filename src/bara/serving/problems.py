"""What goes wrong, told in one form: a status that says whose fault it is, and one line.

The form is that of OpenAI's API, so that its clients show the line. No path of this machine is in
it: what goes wrong here, and may name one, is told by the server's log alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bara.schema import WHAT, shown

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Of an error by its status; others are the client's below 500 and the server's from there."""
LONGEST = 500
"""Characters of an error's line."""


class Problem(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the field of the request that it is about.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON that clients get."""
        return error_body(self.status_code, self.detail, self.param)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def problem_of(error: BaseException) -> Problem:
    """How an error of a model's pass is told. What the client can mend is a `Problem` already."""
    if isinstance(error, Problem):
        return error
    return Problem(500, "the server failed; its log says why")


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    line = " ".join(message.encode(errors="replace").decode().split())
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": line[:LONGEST], "type": kind, "param": param, "code": None}}


def handle_problems(app: FastAPI) -> None:
    """Makes every error of an app an answer of this form."""

    @app.exception_handler(Problem)
    async def _problem(_: Request, error: Problem) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: "there is no such address; /openapi.json lists those that there are",
            405: "this address does not take that method; see /openapi.json",
        }.get(error.status_code, str(error.detail))
        return Problem(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error).response()

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        return problem_of(error).response()


def invalid(error: RequestValidationError) -> Problem:
    """The first field of a request that does not fit."""
    first = error.errors()[0]
    kind, where = first["type"], [part for part in first["loc"] if part not in ("body", "path")]
    if kind == "json_invalid":
        return Problem(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    name = ".".join(str(part) for part in where if not _is_of_a_union(part))
    if not name:
        return Problem(400, "send a JSON object, with Content-Type: application/json")
    param = str(where[0])
    if kind == "extra_forbidden":
        return Problem(400, f"{name} is not supported here", param=param)
    if kind == "missing":
        return Problem(400, f"{name} is missing", param=param)
    what = WHAT.get(kind)
    if what is None:
        return Problem(400, f"{name}: {first['msg']}, not {shown(first['input'])}", param=param)
    wanted = what.format(**first.get("ctx", {}))
    return Problem(400, f"{name} must be {wanted}, not {shown(first['input'])}", param=param)


def _is_of_a_union(part: object) -> bool:
    """Whether pydantic names a branch of a union here, such as `list[str]`, and no field."""
    return isinstance(part, str) and not re.fullmatch(r"(?!str$|int$)[a-z_]+", part)
