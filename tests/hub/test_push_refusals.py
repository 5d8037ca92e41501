"""Every way in which the Hub can refuse a push is one line, a next step and exit code 5."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.hub_client import TOKEN, Client, assert_refused
from tests.faults.hub_server import Answer, Request
from tests.faults.running import contents
from tests.hub.conftest import REPOSITORY
from tests.hub.writable import WritableHub

Fault = Callable[[Request], Answer | None]


def _at(part: str, status: int, code: str | None = None) -> Fault:
    return lambda request: Answer.error(status, code) if part in request.path else None


def _hangs_up(part: str) -> Fault:
    return lambda request: Answer(0) if part in request.path else None


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (_at("/whoami", 401), "answered 401", "hf auth login"),
        (_at("/repos/create", 403), "answered 403", "hf auth login"),
        (_at("/preupload", 403), "answered 403", "hf auth login"),
        (_at("/preupload", 403, "GatedRepo"), "is gated", "Accept its terms"),
        (_at("/repos/create", 404, "RepoNotFound"), "the Hub has no model", "Check the name"),
        (_at("/whoami", 429), "answered 429", "Wait a while"),
        (_at("/commit", 429), "answered 429", "Wait a while"),
        (_at("/objects/batch", 503), "answered 503", "Wait a while"),
        (_at("/store", 500), "answered 500", "Wait a while"),
        (_at("/merge", 500), "answered 500", "Wait a while"),
        (_at("/merge", 409), "answered 409", "look at it"),
        (_hangs_up("/commit"), "cannot be reached", "network connection"),
        (_hangs_up("/store"), "cannot be reached", "network connection"),
    ],
    ids=[
        "wrong-token",
        "not-my-organisation",
        "token-may-only-read",
        "gated",
        "no-such-organisation",
        "rate-of-logins",
        "rate-of-commits",
        "overloaded",
        "store-fails",
        "merge-fails",
        "conflict",
        "dropped-commit",
        "dropped-weights",
    ],
)
def test_refusals(
    client: Client, hub: WritableHub, result: Path, fault: Fault, message: str, hint: str
) -> None:
    hub.fault = fault
    run = client(["push", str(result), REPOSITORY], HF_TOKEN=TOKEN)
    assert_refused(run, REPOSITORY, message, hint)
    assert not hub.exists or not hub.holds("main")


def test_without_a_token(client: Client, hub: WritableHub, result: Path) -> None:
    run = client(["push", str(result), REPOSITORY])
    assert_refused(run, REPOSITORY, "there is no access token", "hf auth login")
    assert not hub.exists


def test_offline(client: Client, hub: WritableHub, result: Path) -> None:
    run = client(["push", str(result), REPOSITORY], HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert_refused(run, REPOSITORY, "cannot be reached", "HF_HUB_OFFLINE is set")
    assert not hub.requests


def test_nobody_listens(result: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        client = Client(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "home")
        run = client(["push", str(result), REPOSITORY], HF_TOKEN=TOKEN)
    assert_refused(run, REPOSITORY, "cannot be reached", "network connection")


def test_a_card_that_the_hub_refuses(client: Client, hub: WritableHub, result: Path) -> None:
    hub.errors = ('"license" must be one of [mit, ...]',)
    run = client(["push", str(result), REPOSITORY], HF_TOKEN=TOKEN)
    assert run.code == 5
    (line,) = run.err.splitlines()
    assert line.startswith(f"error: the Hub refuses files for {REPOSITORY}: Invalid metadata")
    assert line.endswith('"license" must be one of [mit, ...]')
    hub.errors, hub.warnings = (), ("empty metadata",)
    warned = client(["push", str(result), REPOSITORY], HF_TOKEN=TOKEN)
    assert warned.code == 0
    assert "warning: Warnings while validating metadata in README.md: - empty" in warned.err


@pytest.mark.parametrize("name", ["small-llama", "a/b/c", "https://huggingface.co/a/b"])
def test_a_name_that_is_none(client: Client, hub: WritableHub, result: Path, name: str) -> None:
    run = client(["push", str(result), name], HF_TOKEN=TOKEN)
    assert run.code == 2
    assert f"{name} is not a repository of the form org/name" in run.err
    assert not hub.requests


def test_token_is_sent_to_the_hub_and_shown_nowhere(
    client: Client, hub: WritableHub, result: Path, tmp_path: Path
) -> None:
    """The server itself refuses a token at the store of large files, which is another host."""
    hub.fault = _at("/merge", 500)
    refused = client(["push", str(result), REPOSITORY, "--debug"], HF_TOKEN=TOKEN)
    assert refused.code == 5
    assert "Traceback" in refused.err
    hub.fault = lambda request: None
    run = client(["push", str(result), REPOSITORY, "--json"], HF_TOKEN=TOKEN)
    assert run.code == 0, run.err
    assert f"Bearer {TOKEN}" in {request.authorization for request in hub.requests}
    shown = [refused.out, refused.err, run.out, run.err]
    assert not [text for text in shown if TOKEN in text]
    written = [*contents(tmp_path).values(), *hub.holds("main").values()]
    pushed = [pull.title.encode() for pull in hub.pulls.values()]
    assert not [c for c in (*written, *pushed) if type(c) is bytes and TOKEN.encode() in c]
