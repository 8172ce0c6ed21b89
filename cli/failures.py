"""What the command says when something it foresaw goes wrong: one sentence, never a traceback.

`CommandError` is raised on purpose; `explain` puts the failures of the HTTP libraries into words.
"""

from __future__ import annotations

import json

import httpx
import openai

from core.errors import GraftError


class CommandError(Exception):
    """Raised to end the command with exit code 1 and a message for the person who typed it."""


def explain(error: Exception, url: str) -> str | None:
    """Return what to tell a person about `error`, or None when nobody foresaw it."""
    match error:
        case CommandError():
            return str(error)
        case GraftError():
            return error.message
        case openai.APIStatusError():
            return _status(error.status_code, _message(error.response.text), url)
        case httpx.HTTPStatusError():
            return _status(error.response.status_code, _message(error.response.text), url)
        case openai.APITimeoutError() | httpx.TimeoutException():
            return f"the service at {url} did not answer in time"
        case openai.APIConnectionError() | httpx.TransportError():
            return f"no service at {url}; start one with `graft up`"
        case openai.OpenAIError():
            return f"the service at {url} gave an answer that is not understood: {error}"
        case PermissionError() | FileNotFoundError() | IsADirectoryError() | NotADirectoryError():
            return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}"
        case OSError():
            return str(error)
    return None


def _status(status: int, message: str, url: str) -> str:
    if status == httpx.codes.UNAUTHORIZED:
        return f"the service at {url} wants a key: set GRAFT_API_KEY or give --api-key"
    return f"{message} (HTTP {status})"


def _message(body: str) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return "the service refused the request"
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        return str(error.get("message") or error.get("code"))
    return str(error) if error else "the service refused the request"
