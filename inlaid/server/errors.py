"""The server's answers when it does not do what was asked, always in OpenAI's form. A refusal of the engine or of
`inlaid.text` becomes one by its kind.

ApiError
├── BadRequest      400  the request cannot be served as it is
│   └── BrokenBody  400  the body is not what its headers say
├── Unauthorized    401  no key, or a wrong one
├── Forbidden       403  switched off, or outside what is allowed
├── NotFound        404  no such model, adapter or path
├── TooSlow         408  the body took too long to arrive
├── Conflict        409  the name is taken
├── TooLarge        413  the body is larger than allowed
├── TooMany         429  later, see Retry-After
├── Fault           500  our fault
├── Unavailable     503  the engine is down, the server is draining, or an adapter has not come in time
├── TimedOut        504  the request took longer than allowed
└── NotKept         507  a change is in force, and cannot be written to --state
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

import msgspec
from aiohttp import web

from inlaid.engine.refusal import Refusal, RefusalKind, Refused
from inlaid.text.confined import TemplateStuck
from inlaid.worker.errors import EngineDead, EngineError, RequestTimeout

log = logging.getLogger(__name__)

_MAX_PATH = 200  # characters of a path that are compared with the known ones

# Half a surrogate pair without the other half: msgspec calls that truncated when the text ends there.
_HALF = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """The body of every answer with a status of 400 or more."""

    error: ErrorBody


class AnthropicError(msgspec.Struct, frozen=True):
    """The body of an error of /v1/messages."""

    error: ErrorBody
    type: Literal["error"] = "error"


class ApiError(Exception):
    """An answer that is an error."""

    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.retry_after = retry_after
        self.headers: Mapping[str, str] = {}

    @property
    def body(self) -> ErrorResponse:
        """The JSON form."""
        return ErrorResponse(ErrorBody(self.message, self.kind, self.param, self.code))

    @property
    def anthropic_body(self) -> AnthropicError:
        """The JSON form in Anthropic's shape."""
        kind = "api_error" if self.kind == "server_error" else self.kind
        return AnthropicError(ErrorBody(self.message, kind, self.param, self.code))


class BadRequest(ApiError):
    status, kind = 400, "invalid_request_error"


class BrokenBody(BadRequest):
    pass


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


class NotKept(ApiError):
    status, code = 507, "state_not_kept"


# For each kind of refusal: the answer, its code, and the parameter where the refusal names none.
_OF_KIND: Mapping[RefusalKind, tuple[type[ApiError], str | None, str | None]] = MappingProxyType(
    {
        RefusalKind.INVALID: (BadRequest, None, None),
        RefusalKind.NOT_FOUND: (NotFound, "model_not_found", "model"),
        RefusalKind.TOO_MANY: (TooMany, None, None),
        RefusalKind.DEADLINE: (TooMany, None, None),
        RefusalKind.UNAVAILABLE: (Unavailable, "adapter_not_ready", None),
        RefusalKind.FAULT: (Fault, None, None),
    }
)


def response(error: ApiError, for_anthropic: bool = False) -> web.Response:
    """Return the answer that an error is, in the shape of OpenAI's or of Anthropic's API."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    answer = web.Response(
        body=msgspec.json.encode(error.anthropic_body if for_anthropic else error.body),
        status=error.status,
        content_type="application/json",
        headers=headers,
    )
    if isinstance(error, (TooSlow, BrokenBody)):
        answer.force_close()
    return answer


def translate(error: Exception) -> ApiError | None:
    """Return the answer to an exception that has a meaning; None: it is a defect."""
    match error:
        case ApiError():
            return error
        case Refused():
            return refused(error.refusal)
        case RequestTimeout():
            return TimedOut(str(error))
        case EngineDead():
            return Unavailable(str(error), code="engine_unavailable", retry_after=5)
        case TemplateStuck():
            return Unavailable(str(error), code="template_unavailable", retry_after=5)
        case EngineError():
            return Fault(str(error))
        case web.HTTPRequestEntityTooLarge():
            return TooLarge("the request body is larger than this server accepts (--max-body-mib)")
        case web.HTTPMethodNotAllowed():
            refusal = _with_status(BadRequest(f"{error.method} is not allowed here; allowed: {_sorted(error)}"), 405)
            refusal.headers = {"Allow": _sorted(error)}
            return refusal
        case web.HTTPNotFound():
            return NotFound("no such path; GET /openapi.json lists them")
        case web.HTTPClientError():
            return _with_status(BadRequest(error.reason), error.status)
        case msgspec.MsgspecError() | UnicodeDecodeError() | RecursionError():
            return undecodable(error)
    return None


def refused(refusal: Refusal) -> ApiError:
    """Return the answer to a refused request."""
    kind, code, param = _OF_KIND[refusal.kind]
    return kind(refusal.message, refusal.param or param, code, refusal.retry_after)


def reported(error: Exception, what: str) -> ApiError:
    """Return the answer to an exception; a defect is logged as the failure of `what`."""
    known = translate(error)
    if known is None:
        log.error("%s failed", what, exc_info=error)
        known = Fault(f"{type(error).__name__} while answering; the server's log has the details")
    return known


def no_such_path(path: str, known: Collection[str]) -> NotFound:
    """Return the answer to a path that leads nowhere, with the one that was meant: base URLs end in /v1 or not."""
    plain = path[:_MAX_PATH].rstrip("/")
    while plain.startswith("/v1/v1/"):
        plain = plain[3:]
    meant = [one for one in (plain, f"/v1{plain}", plain.removeprefix("/v1")) if one in known and one != path]
    meant += difflib.get_close_matches(plain, known, 1, 0.8)
    hint = f"; did you mean {meant[0]}?" if meant else "; GET /openapi.json lists the paths that there are"
    return NotFound(f"no such path{hint}")


def undecodable(error: Exception, data: bytes = b"") -> BadRequest:
    """Return the answer to a body that is not JSON, or not of the form asked for, with the field's name."""
    if isinstance(error, RecursionError):
        return BadRequest("the body is nested too deeply")
    text = str(error)
    if not data and "truncated" in text:
        return BadRequest('the body is empty; send JSON, as in {"model": …, …}')
    if "surrogate" in text or ("truncated" in text and _HALF.search(data)):
        return BadRequest(r"a text has half a character: an escape from \ud800 to \udfff without its other half")
    unknown = re.search(r"unknown field `([^`]*)`", text)
    place = re.search(r"`\$\.([A-Za-z0-9_]+)", text)
    if unknown is not None:
        where = f" in {place.group(1)}" if place else ""
        message = f"unknown field {unknown.group(1)!r}{where}; GET /openapi.json lists the known ones"
        return BadRequest(message, unknown.group(1), "unknown_field")
    return BadRequest(_in_words(text), place.group(1) if place else None)


def _in_words(text: str) -> str:
    """Return the message for a field of which one value is served: of the decoder's, null and an enum are no hint."""
    found = re.match(r"(?:Expected `null`, got .*|Invalid enum value (True|False)) - at `\$\.([^`]+)`", text)
    if found is None:
        return text
    value, name = found.groups()
    return f"{name} {f'cannot be {value.lower()}' if value else 'is not served'} here; leave it out"


def _with_status(error: ApiError, status: int) -> ApiError:
    error.status = status
    return error


def _sorted(error: web.HTTPMethodNotAllowed) -> str:
    return ", ".join(sorted(error.allowed_methods))
