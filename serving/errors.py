"""What an error of ours becomes on the wire: HTTP status, WebSocket close code, and the JSON body of the API.

The close codes are those that clients act on: they come back after 1011, 1012 and 1013, and give up on 1008.
"""

from __future__ import annotations

from typing import Any

from actors import errors

POLICY_VIOLATION = 1008  # the client is at fault: coming back with the same will not help
MESSAGE_TOO_BIG = 1009
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013

# The most specific ancestor that is listed here decides.
_CLOSE_CODES: dict[type[errors.ServingError], int] = {
    errors.ServingError: INTERNAL_ERROR,
    errors.BadRequest: POLICY_VIOLATION,
    errors.Unauthorized: POLICY_VIOLATION,
    errors.Refused: TRY_AGAIN_LATER,
    errors.TenantLimit: POLICY_VIOLATION,
    errors.Draining: SERVICE_RESTART,
    errors.NotYours: POLICY_VIOLATION,
    errors.ClientFault: POLICY_VIOLATION,
    errors.Lost: INTERNAL_ERROR,
}
_HTTP_STATUS: dict[type[errors.ServingError], int] = {
    errors.ServingError: 500,
    errors.BadRequest: 400,
    errors.Unauthorized: 401,
    errors.Refused: 503,
    errors.TenantLimit: 429,
    errors.NotYours: 404,
    errors.ClientFault: 400,
}
_ERROR_TYPES: dict[int, str] = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def close_code(error: errors.ServingError) -> int:
    """The WebSocket close code (RFC 6455, 7.4) that this error ends a connection with."""
    return _nearest(_CLOSE_CODES, type(error))


def http_status(error: errors.ServingError) -> int:
    """The HTTP status of an answer that carries this error."""
    return _nearest(_HTTP_STATUS, type(error))


def error_body(error: errors.ServingError, param: str | None = None) -> dict[str, Any]:
    """The `{"error": {message, type, param, code}}` of every failed HTTP answer."""
    return http_error_body(http_status(error), error.code, str(error), param)


def http_error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The same shape for errors that are HTTP's own (404, 405, …)."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _nearest(table: dict[type[errors.ServingError], int], cls: type[errors.ServingError]) -> int:
    return next(table[base] for base in cls.__mro__ if base in table)
