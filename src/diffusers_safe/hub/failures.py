"""Errors of the Hub's client: whether a retry may help, and a description in one line."""

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever the client of this version uses
    OfflineModeIsEnabled,
)


def may_pass(error: Exception) -> bool:
    """Whether the error is temporary."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, OSError):
        return isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, OfflineModeIsEnabled)
    return True


def reason(error: Exception) -> str:
    """A description of the error in one line."""
    message = " ".join(str(getattr(error, "server_message", None) or error).split())[:200].rstrip(".")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept the token (401)"
        if status == 403:
            return f"the token has no right to write there (403: {message})"
        if may_pass(error):
            return f"the Hub cannot answer now ({status} {error.response.reason_phrase})"
        return f"the Hub refuses ({status}: {message})"
    if isinstance(error, HTTPError) or may_pass(error):
        return f"no connection to the Hub ({type(error).__name__}: {message})"
    return message
