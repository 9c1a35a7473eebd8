"""What the Hub's client raises: whether it may pass, and in one line what happened."""

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever the client of this version uses
    OfflineModeIsEnabled,
)


def may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, OSError):
        return isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, OfflineModeIsEnabled)
    return True


def reason(error: Exception) -> str:
    """What happened, in one line."""
    told = " ".join(str(getattr(error, "server_message", None) or error).split())[:200].rstrip(".")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept the token (401)"
        if status == 403:
            return f"the token has no right to write there (403: {told})"
        if may_pass(error):
            return f"the Hub cannot answer now ({status} {error.response.reason_phrase})"
        return f"the Hub refuses ({status}: {told})"
    if isinstance(error, HTTPError) or may_pass(error):
        return f"no connection to the Hub ({type(error).__name__}: {told})"
    return told
