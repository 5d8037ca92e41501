"""How we use the Hub's client: quietly, and with its failures as one line and a next step each."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from kvpatch.errors import InputModelError, KvpatchError, NetworkError

__all__ = ["hub_errors", "quiet_client"]

_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "hf_xet"})
_TOKEN_HINT = "Check your access token and what it may do: run `hf auth login`."  # noqa: S105
_STATUS_HINTS: Mapping[int, str] = {
    401: _TOKEN_HINT,
    403: _TOKEN_HINT,
    409: "Somebody else changes the repository at this time; look at it, and run again.",
}
_LAST_REFUSAL = 428  # answers from 429 on are about load, not about what was asked


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What an error class of the client means.

    Args:
        error: Name of the class; the client is imported only where it is used.
        message: With places for repository and revision.
        hint: The next step, with the same places.
    """

    error: str
    message: str
    hint: str


# the first that fits counts: a gated repository is, to the client, also one that is not found
_REFUSALS = (
    _Refusal(
        "GatedRepoError",
        "{repository} is gated",
        "Accept its terms at https://huggingface.co/{repository}, then `hf auth login`.",
    ),
    _Refusal(
        "RepositoryNotFoundError",
        "the Hub has no model {repository}, or it is private",
        "Check the name; for a private model run `hf auth login`.",
    ),
    _Refusal(
        "RevisionNotFoundError",
        "{repository} has no revision {revision!r}",
        "Its branches and tags are at https://huggingface.co/{repository}/tree/main.",
    ),
    _Refusal(
        "LocalTokenNotFoundError",
        "there is no access token to write to {repository} with",
        "Run `hf auth login`, or set HF_TOKEN to a token that may write.",
    ),
)


@contextmanager
def hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn every way in which the Hub can fail into one line with a next step.

    Raises:
        NetworkError: If the Hub refuses, fails or cannot be reached.
        InputModelError: If a repository lacks a file that it must have.
    """
    try:
        yield
    except KvpatchError:
        raise
    except Exception as error:
        known = _explained(_cause(error), repository, revision or "main")
        if known is None:
            raise
        raise known from error


def _cause(error: BaseException) -> BaseException:
    """The client wraps what fails in a thread of its own in a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explained(error: BaseException, repository: str, revision: str) -> KvpatchError | None:
    """The error for a user; None if it is a bug and not the Hub's."""
    from huggingface_hub import errors  # noqa: PLC0415

    names = {kind.__name__ for kind in type(error).__mro__}
    for refusal in _REFUSALS:
        if refusal.error in names:
            places = {"repository": repository, "revision": revision}
            return NetworkError(
                refusal.message.format(**places), hint=refusal.hint.format(**places)
            )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return NetworkError(
            f"{repository} is not in the local cache, and the Hub cannot be reached",
            hint=_offline_hint(),
        )
    if isinstance(error, errors.EntryNotFoundError):
        return InputModelError(f"{repository} has no config.json at {revision}")
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, repository)
    # HTTP clients differ between versions of huggingface_hub, and so do their errors
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS:
        return NetworkError(
            f"the Hub cannot be reached for {repository}: {type(error).__name__}",
            hint=_offline_hint(),
        )
    return None


def _answered(error: Exception, repository: str) -> NetworkError:
    """A refusal that only has a status, and perhaps the Hub's own words."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    message = f"the Hub answered {status or 'without status'} for {repository}"
    if status is not None and status in _STATUS_HINTS:
        return NetworkError(message, hint=_STATUS_HINTS[status])
    words = " ".join(str(getattr(error, "server_message", None) or "").split())
    if status is not None and status <= _LAST_REFUSAL and words:
        message = f"{message}: {words}"
    return NetworkError(
        message, hint="Wait a while and run again; what was transferred before is kept."
    )


def _offline_hint() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}:
        return "HF_HUB_OFFLINE is set; unset it, or download the model first."
    return "Check the network connection; a local folder needs none."


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's log out of ours, and its progress bars off where ours are."""
    from huggingface_hub.utils import logging as client_log  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    level, bars = client_log.get_verbosity(), not are_progress_bars_disabled()
    hide = bars and not sys.stderr.isatty()
    client_log.set_verbosity(logging.ERROR)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        client_log.set_verbosity(level)
        if hide:
            enable_progress_bars()
