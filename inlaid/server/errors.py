"""What the server answers when it does not do what was asked, always in OpenAI's form.

ApiError
├── BadRequest      400  the request cannot be served as it is
├── Unauthorized    401  no key, or a wrong one
├── Forbidden       403  switched off, or outside what is allowed
├── NotFound        404  no such model, adapter or path
├── TooSlow         408  the body took too long to arrive
├── Conflict        409  the name is taken
├── TooLarge        413  the body is larger than allowed
├── TooMany         429  later, see Retry-After
├── Fault           500  our fault
├── Unavailable     503  the engine is down, the server is draining, or an adapter has not come in time
└── TimedOut        504  the request took longer than allowed
"""

from __future__ import annotations

import logging
import math
import re

import msgspec
from aiohttp import web

from inlaid.text.params import ParamError
from inlaid.text.tokenizer import TemplateError
from inlaid.worker.client import AdapterGone, EngineDead, EngineError, NotNow, RequestRefused, RequestTimeout

log = logging.getLogger(__name__)

# The first half of a surrogate pair without the second: msgspec calls that truncated when the text ends there.
_HALF = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """Every answer with a status of 400 or more."""

    error: ErrorBody


class ApiError(Exception):
    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.body = ErrorResponse(ErrorBody(message, self.kind, param, code or self.code))
        self.retry_after = retry_after


class BadRequest(ApiError):
    status, kind = 400, "invalid_request_error"


class Unauthorized(ApiError):
    status, kind, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ApiError):
    status, kind = 403, "permission_error"


class NotFound(ApiError):
    status, kind = 404, "not_found_error"


class TooSlow(ApiError):
    status, kind = 408, "invalid_request_error"


class Conflict(ApiError):
    status, kind = 409, "invalid_request_error"


class TooLarge(ApiError):
    status, kind = 413, "invalid_request_error"


class TooMany(ApiError):
    status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Fault(ApiError):
    pass


class Unavailable(ApiError):
    status = 503


class TimedOut(ApiError):
    status, kind = 504, "timeout_error"


def response(error: ApiError) -> web.Response:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    answer = web.Response(
        body=msgspec.json.encode(error.body), status=error.status, content_type="application/json", headers=headers
    )
    if isinstance(error, TooSlow):
        answer.force_close()
    return answer


def translate(error: Exception) -> ApiError | None:
    """An exception that we know the meaning of; None: a defect."""
    match error:
        case ApiError():
            return error
        case ParamError():
            return BadRequest(str(error), error.param)
        case TemplateError():
            return BadRequest(str(error), "messages")
        case AdapterGone():
            return NotFound(str(error), "model", "model_not_found")
        case RequestRefused(retry_after=None):
            return BadRequest(str(error))
        case RequestRefused():
            return TooMany(str(error), retry_after=error.retry_after)
        case RequestTimeout():
            return TimedOut(str(error))
        case EngineDead():
            return Unavailable(str(error), code="engine_unavailable", retry_after=5)
        case NotNow():
            return Unavailable(str(error), code="adapter_not_ready", retry_after=error.retry_after)
        case EngineError():
            return Fault(str(error))
        case web.HTTPRequestEntityTooLarge():
            return TooLarge("the request body is larger than this server accepts (--max-body-mib)")
        case web.HTTPMethodNotAllowed():
            return _with_status(BadRequest(f"{error.method} is not allowed here; allowed: {_sorted(error)}"), 405)
        case web.HTTPNotFound():
            return NotFound("no such path; GET /openapi.json lists them")
        case web.HTTPClientError():
            return _with_status(BadRequest(error.reason), error.status)
        case msgspec.MsgspecError() | UnicodeDecodeError() | RecursionError():
            return undecodable(error)
    return None


def told(error: Exception, what: str) -> ApiError:
    """What a client hears of an exception; a defect is logged, as what has failed."""
    known = translate(error)
    if known is None:
        log.error("%s failed", what, exc_info=error)
        known = Fault(f"{type(error).__name__} while answering; the server's log has the details")
    return known


def undecodable(error: Exception, data: bytes = b"") -> BadRequest:
    """A body that is not JSON, or not of the form asked for; names the field."""
    if isinstance(error, RecursionError):
        return BadRequest("the body is nested too deeply")
    text = str(error)
    if "surrogate" in text or ("truncated" in text and _HALF.search(data)):
        return BadRequest(r"a text has half a character: an escape from \ud800 to \udfff without its other half")
    unknown = re.search(r"unknown field `([^`]*)`", text)
    place = re.search(r"`\$\.([A-Za-z0-9_]+)", text)
    if unknown is not None:
        where = f" in {place.group(1)}" if place else ""
        message = f"unknown field {unknown.group(1)!r}{where}; GET /openapi.json lists the known ones"
        return BadRequest(message, unknown.group(1), "unknown_field")
    return BadRequest(text, place.group(1) if place else None)


def _with_status(error: ApiError, status: int) -> ApiError:
    error.status = status
    return error


def _sorted(error: web.HTTPMethodNotAllowed) -> str:
    return ", ".join(sorted(error.allowed_methods))
