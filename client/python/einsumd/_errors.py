"""What a call can end with: one class for each of gRPC's codes, with the server's own text."""

from __future__ import annotations

from typing import Any

from einsumd._native import ffi, lib


class Error(Exception):
    """A call that failed. Its text says where and why; the attributes say the same in parts."""

    code: str = "UNKNOWN"

    def __init__(
        self,
        text: str,
        *,
        endpoint: str = "",
        field: str = "",
        retry_after: float | None = None,
        attempts: int = 0,
        from_server: bool = False,
    ):
        super().__init__(f"{endpoint}: {text}" if endpoint else text)
        self.text = text
        """As the server wrote it, or this side."""
        self.endpoint = endpoint
        """Which daemon; empty if none was asked."""
        self.field = field
        """The request field or argument at fault, empty if none is."""
        self.retry_after = retry_after
        """Seconds, by the server's advice; infinity: never; None: no advice."""
        self.attempts = attempts
        self.from_server = from_server


class Cancelled(Error):
    code = "CANCELLED"


class Unknown(Error):
    code = "UNKNOWN"


class InvalidArgument(Error, ValueError):
    """Also of what this side refuses, before anything is sent."""

    code = "INVALID_ARGUMENT"


class DeadlineExceeded(Error, TimeoutError):
    code = "DEADLINE_EXCEEDED"


class NotFound(Error, LookupError):
    code = "NOT_FOUND"


class AlreadyExists(Error):
    code = "ALREADY_EXISTS"


class PermissionDenied(Error, PermissionError):
    code = "PERMISSION_DENIED"


class ResourceExhausted(Error):
    """A queue or a limit is full: see retry_after."""

    code = "RESOURCE_EXHAUSTED"


class FailedPrecondition(Error):
    code = "FAILED_PRECONDITION"


class Aborted(Error):
    code = "ABORTED"


class OutOfRange(Error):
    code = "OUT_OF_RANGE"


class Unimplemented(Error, NotImplementedError):
    code = "UNIMPLEMENTED"


class Internal(Error):
    code = "INTERNAL"


class Unavailable(Error, ConnectionError):
    """The daemon cannot be reached, starts, drains, or has lost its device."""

    code = "UNAVAILABLE"


class DataLoss(Error):
    code = "DATA_LOSS"


class Unauthenticated(Error):
    code = "UNAUTHENTICATED"


class CopyRefused(InvalidArgument):
    """A tensor's layout is none of the wire's, and copies are not allowed."""


BY_CODE: dict[str, type[Error]] = {
    each.code: each
    for each in (
        Cancelled, Unknown, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists,
        PermissionDenied, ResourceExhausted, FailedPrecondition, Aborted, OutOfRange, Unimplemented,
        Internal, Unavailable, DataLoss, Unauthenticated,
    )
}  # fmt: skip


def text_of(chars: Any) -> str:
    """A C string of the library's; what a server wrote need not be UTF-8."""
    raw: bytes = ffi.string(chars)
    return raw.decode(errors="replace")


def from_native(status: int, error: Any, endpoint: str) -> Error:
    """The exception for a call that returned `status` and filled `error`."""
    code = text_of(lib.einsum_client_status_name(status))
    advice = error.retry_after_ms
    return BY_CODE.get(code, Unknown)(
        text_of(error.text),
        endpoint=endpoint,
        field=text_of(error.field),
        retry_after=None if advice == 0 else float("inf") if advice < 0 else advice / 1000,
        attempts=error.attempts,
        from_server=error.from_server,
    )
