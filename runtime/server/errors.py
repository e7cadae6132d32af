"""What callers are told when something is wrong: OpenAI's error object, and which status goes with which error."""

from typing import Any

from ..errors import CapacityError, InvalidRequestError, UnsupportedError

CLIENT_CLOSED_REQUEST = 499  # nobody is left to read it; the log and the metrics have it


class ApiError(Exception):
    """An answer that is an error. `retry_after` is in seconds."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {"retry-after": str(retry_after)} if retry_after else {}

    @property
    def kind(self) -> str:
        """OpenAI's `type` of error."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def as_api_error(error: Exception, *, param: str | None = None) -> ApiError:
    """`error` as callers may see it: our own messages for their mistakes, and nothing of what went wrong inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, UnsupportedError):
        return ApiError(400, str(error), param=param, code="unsupported")
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), param=param)
    return ApiError(500, "the request failed inside the server", code="internal_error")
