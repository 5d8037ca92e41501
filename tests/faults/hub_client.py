"""The command line as a client of the Hub that runs on the loopback interface.

Every run is a child of its own, because huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults.running import Child, Run

__all__ = ["TOKEN", "Client", "assert_refused"]

TOKEN = "hf_" + "NeverToBeSeen" * 3


def _without_waiting() -> None:
    time.sleep = lambda seconds: None


class Client:
    """The command line with a cache of its own, set up to talk to one server."""

    def __init__(self, url: str, home: Path) -> None:
        self.cache = home / "hub"
        self._environment = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": None,
            "HF_TOKEN": None,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": None,
            "NO_PROXY": "*",
            "HF_HUB_DISABLE_XET": "1",  # its protocol is not spoken here
        }

    def __call__(self, arguments: list[str], **environment: str) -> Run:
        return self.start(arguments, **environment).wait()

    def start(self, arguments: list[str], **environment: str) -> Child:
        """A run that may be killed."""
        return Child(arguments, _without_waiting, environment=self._environment | environment)


def assert_refused(run: Run, repository: str, message: str, hint: str) -> None:
    """Exit code 5, nothing on stdout, one line that says what is wrong and one what to do."""
    assert (run.code, run.out) == (5, ""), run.err
    error, advice = run.err.splitlines()
    assert error.startswith("error: ")
    assert repository in error
    assert message in error
    assert advice.startswith("hint: ")
    assert hint in advice
