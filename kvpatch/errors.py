"""The errors a user can cause, each with the exit code that the command line returns for it.

A message says what is wrong and where; ``hint`` says what to do about it. Everything that is not a
``KvpatchError`` is a bug of ours and exits with code 1.
"""

from __future__ import annotations

__all__ = [
    "InputModelError",
    "KvpatchError",
    "NetworkError",
    "OutputError",
    "ResourceError",
    "Terminated",
    "UnsupportedModelError",
    "UntrustedSourceError",
    "UsageError",
    "VerificationError",
]


class KvpatchError(Exception):
    """Base of all expected errors.

    Args:
        message: What is wrong, where, and what was expected.
        hint: The next step that mends it, if there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(KvpatchError):
    """A flag, an argument or a recipe is wrong."""

    exit_code = 2


class InputModelError(KvpatchError):
    """The source checkpoint is damaged, contradictory or not supported."""

    exit_code = 3


class UnsupportedModelError(InputModelError):
    """The source is of a kind that kvpatch does not convert; transformers may run it."""


class UntrustedSourceError(InputModelError):
    """The source is not what it was when it was opened; nothing made from it may be kept."""


class ResourceError(KvpatchError):
    """Not enough memory or disk."""

    exit_code = 4


class NetworkError(KvpatchError):
    """The Hub cannot be reached, or refuses access."""

    exit_code = 5


class VerificationError(KvpatchError):
    """A result is not what it should be."""

    exit_code = 6


class OutputError(KvpatchError):
    """The output exists, is locked or cannot be written."""

    exit_code = 7


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; unwinds like Ctrl-C."""
