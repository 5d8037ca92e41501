"""What a push leaves on the Hub: all of a checkpoint or nothing, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from convert.checkpoint.manifest import read_manifest, rewrite_manifest
from convert.checkpoint.writer import write_file
from tests.faults.hub_client import TOKEN, Client
from tests.faults.hub_server import Answer, Request
from tests.faults.running import Run, contents
from tests.hub.conftest import REPOSITORY
from tests.hub.writable import PullRequest, WritableHub

API = f"/api/models/{REPOSITORY}"


def push(client: Client, folder: Path, *flags: str) -> Run:
    return client(["push", str(folder), REPOSITORY, *flags], HF_TOKEN=TOKEN)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if type(content) is bytes}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "kvpatch.json").read_bytes()).hexdigest()


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_new_repository_is_private_and_filled_by_one_merge(
    client: Client, hub: WritableHub, result: Path
) -> None:
    states: list[tuple[str, object]] = []
    hub.served = lambda request: states.append((request.path, hub.refs.get("main")))
    run = client(["push", str(result), REPOSITORY, "--json"], HF_TOKEN=TOKEN)
    assert run.code == 0, run.err
    assert hub.private
    assert hub.holds("main") == files_of(result)
    assert json.loads(run.out) == {
        "repository": REPOSITORY,
        "branch": "main",
        "commit": hub.refs["main"],
        "pull_request": 1,
        "uploaded": len(files_of(result)),
        "url": f"{hub.url}/{REPOSITORY}",
    }
    (pull,) = hub.pulls.values()
    assert pull.status == "merged"
    assert pull.title == f"Upload by kvpatch ({digest(result)[:12]})"
    paths = [path for path, _ in states]
    merged = paths.index(f"{API}/discussions/1/merge")
    before = [main for path, main in states[paths.index("/api/repos/create") : merged]]
    assert len(set(before)) == 1, "main moved before the merge"


def test_what_is_there_is_not_pushed_again(client: Client, hub: WritableHub, result: Path) -> None:
    assert push(client, result, "--public").code == 0
    assert not hub.private
    main = hub.refs["main"]
    hub.requests.clear()
    run = push(client, result)
    assert (run.code, run.out) == (0, f"{hub.url}/{REPOSITORY}\n")
    assert run.err.splitlines() == [
        f"warning: {REPOSITORY} exists and is public; it stays so",
        f"nothing to upload: {REPOSITORY} holds all of {result}",
    ]
    assert hub.refs["main"] == main
    assert {request.method for request in hub.requests} == {"GET"}


def test_what_was_pushed_is_verified_from_the_hub(
    client: Client, hub: WritableHub, result: Path
) -> None:
    assert push(client, result).code == 0
    run = client(["verify", REPOSITORY, "--files-only", "--json"], HF_TOKEN=TOKEN)
    assert run.code == 0, run.err
    hashes = json.loads(run.out)["checks"][0]
    assert (hashes["name"], hashes["status"]) == ("hashes", "ok")


def test_scores_and_curves_go_along_and_are_verified(
    client: Client, hub: WritableHub, result: Path, tmp_path: Path
) -> None:
    """All that the manifest names is pushed and fetched; scores of other weights do not stay."""
    scored = tmp_path / "scored"
    shutil.copytree(result, scored)
    (scored / ".eval_results").mkdir()
    made = (".eval_results/arc_easy.yaml", "training.png")
    written = {name: write_file(scored / name, name.encode()) for name in made}
    rewrite_manifest(scored, read_manifest(scored), written)
    assert push(client, scored).code == 0
    assert hub.holds("main") == files_of(scored)
    assert set(made) <= hub.holds("main").keys()
    run = client(["verify", REPOSITORY, "--files-only", "--json"], HF_TOKEN=TOKEN)
    assert json.loads(run.out)["checks"][0]["status"] == "ok", run.out
    assert push(client, result).code == 0
    assert hub.holds("main").keys() - files_of(result).keys() == {"training.png"}


def test_weights_of_an_earlier_push_go_and_other_files_stay(
    client: Client, hub: WritableHub, result: Path
) -> None:
    hub.exists = True
    old = {"model.safetensors": b"old", "pytorch_model.bin": b"old", "README.md": b"old"}
    hub.add_commit("main", {**old, "photo.png": b"pixels"})
    run = push(client, result, "--message", "Fewer heads", "--public")
    assert run.code == 0, run.err
    assert hub.holds("main") == {**files_of(result), "photo.png": b"pixels"}
    assert hub.pulls[1].title.startswith("Fewer heads (")


def test_another_branch(client: Client, hub: WritableHub, result: Path) -> None:
    run = push(client, result, "--revision", "gqa2")
    assert run.code == 0, run.err
    assert run.out == f"{hub.url}/{REPOSITORY}/tree/gqa2\n"
    assert hub.holds("gqa2") == files_of(result)
    assert not hub.holds("main")
    assert hub.pulls[1].status == "closed"
    assert hub.count("PUT", "/store/") == len(shards(result)), "contents are sent once"
    again = push(client, result, "--revision", "gqa2")
    assert "nothing to upload" in again.err
    assert len(hub.pulls) == 1


def _offered(requests: list[Request]) -> set[str]:
    """Names of the files that a client wanted to upload."""
    asked = [json.loads(r.body)["files"] for r in requests if "/preupload/" in r.path]
    return {file["path"] for files in asked for file in files}


@pytest.mark.parametrize(
    ("method", "part", "count", "effect"),
    [
        ("POST", "/repos/create", 1, True),
        ("POST", "/commit/main", 1, False),
        ("POST", "/commit/main", 1, True),
        ("PUT", "/store/", 2, True),
        ("POST", "/commit/refs", 1, True),
        ("POST", "/merge", 1, False),
        ("POST", "/merge", 1, True),
    ],
    ids=[
        "repository-made",
        "before-the-request",
        "request-made",
        "in-the-middle-of-weights",
        "first-weights-committed",
        "before-the-merge",
        "merged",
    ],
)
def test_a_killed_push_shows_nothing_and_the_next_one_ends_it(
    client: Client,
    hub: WritableHub,
    result: Path,
    method: str,
    part: str,
    count: int,
    effect: bool,
) -> None:
    """SIGKILL before or after the Hub has done what was asked; either way without an answer."""
    killed = client.start(["push", str(result), REPOSITORY], HF_TOKEN=TOKEN)

    def kill(request: Request) -> Answer | None:
        if request.method != method or part not in request.path:
            return None
        if hub.count(method, part) != count:
            return None
        if effect:
            hub.route(request)
        assert killed.process.pid is not None
        os.kill(killed.process.pid, signal.SIGKILL)
        return Answer(0)

    hub.fault = kill
    assert killed.wait().code == -signal.SIGKILL
    hub.fault = lambda request: None
    merged = part == "/merge" and effect
    if hub.exists:
        assert hub.holds("main") == (files_of(result) if merged else {})
    done = set(hub.holds("refs/pr/1")) if hub.pulls else set()
    before = len(hub.requests)
    run = push(client, result)
    assert run.code == 0, run.err
    assert hub.holds("main") == files_of(result)
    assert _offered(hub.requests[before:]) == files_of(result).keys() - done
    assert [pull.status for pull in hub.pulls.values()] == ["merged"]
    stored = [request.path for request in hub.requests if request.method == "PUT"]
    assert len(stored) == len(set(stored)) == len(shards(result)), "weights were sent twice"


def test_a_connection_that_drops_in_an_upload_is_tried_again(
    client: Client, hub: WritableHub, result: Path
) -> None:
    def drop(request: Request) -> Answer | None:
        first = request.method == "PUT" and hub.count("PUT", "/store/") == 1
        return Answer(0) if first else None

    hub.fault = drop
    run = push(client, result)
    assert run.code == 0, run.err
    assert hub.holds("main") == files_of(result)
    assert len(run.err.splitlines()) == 1


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [_flipped, lambda content: content[:-1]], ids=["bit", "size"])
@pytest.mark.parametrize("file", ["weights", "config.json"])
def test_what_the_hub_holds_otherwise_is_not_merged(
    client: Client, hub: WritableHub, result: Path, file: str, damage: object
) -> None:
    if file == "weights":
        file = shards(result)[-1]
        right = (result / file).read_bytes()
        hub.stored = lambda content: damage(content) if content == right else content
    else:
        hub.kept = lambda name, content: damage(content) if name == file else content
    run = push(client, result)
    assert (run.code, run.out) == (6, ""), run.err
    error, hint = run.err.splitlines()
    assert f"refs/pr/1 is not what kvpatch.json says: {file} is absent or differs" in error
    assert f"{hub.url}/{REPOSITORY}/discussions/1" in hint
    assert not hub.holds("main")
    assert hub.pulls[1].status == "open"
    assert not hub.count("POST", "/merge")


def test_a_file_that_came_with_the_request_is_not_merged(
    client: Client, hub: WritableHub, result: Path
) -> None:
    def smuggle(request: Request) -> None:
        if "/commit/refs" in request.path:
            hub.add_commit("refs/pr/1", {**hub.holds("refs/pr/1"), "modeling_x.py": b"evil"})

    hub.served = smuggle
    run = push(client, result)
    assert run.code == 6
    assert "modeling_x.py is none of ours" in run.err
    assert not hub.holds("main")


def test_the_request_of_somebody_else_is_left_alone(
    client: Client, hub: WritableHub, result: Path
) -> None:
    hub.exists = True
    main = hub.add_commit("main", {})
    hub.add_commit("refs/pr/1", {"modeling_x.py": b"evil"})
    title = f"Upload by kvpatch ({digest(result)[:12]})"
    hub.pulls[1] = PullRequest(title, main, author="mallory")
    assert push(client, result).code == 0
    assert [pull.status for pull in hub.pulls.values()] == ["open", "merged"]
    assert hub.holds("main") == files_of(result)


def test_main_that_moved_meanwhile_keeps_what_it_got(
    client: Client, hub: WritableHub, result: Path
) -> None:
    def edit(request: Request) -> Answer | None:
        if request.path.endswith("/merge"):
            hub.add_commit("main", {**hub.holds("main"), "photo.png": b"pixels"})
        return None

    hub.fault = edit
    run = push(client, result)
    assert run.code == 0, run.err
    assert hub.holds("main") == {**files_of(result), "photo.png": b"pixels"}


def test_a_merge_that_loses_a_file_is_noticed(
    client: Client, hub: WritableHub, result: Path
) -> None:
    def lose(request: Request) -> None:
        if request.path.endswith("/merge"):
            merged = hub.holds("main")
            hub.add_commit("main", {n: c for n, c in merged.items() if n != "config.json"})

    hub.served = lose
    run = push(client, result)
    assert run.code == 6
    assert "at main is not what kvpatch.json says: config.json is absent or differs" in run.err
    assert "push again" in run.err


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda path: (path / "config.json").write_text("{}"), 6, "config.json has 2 bytes"),
        (lambda path: (path / "LICENSE").unlink(), 6, "LICENSE is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), 6, "model.safetensors was"),
        (lambda path: (path / "kvpatch.json").unlink(), 3, "was not made by kvpatch"),
    ],
    ids=["changed", "incomplete", "stray-weights", "not-ours"],
)
def test_a_folder_that_is_not_what_it_says_stays_at_home(
    client: Client,
    hub: WritableHub,
    result: Path,
    tmp_path: Path,
    change: object,
    code: int,
    message: str,
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(result, folder)
    change(folder)
    run = push(client, folder)
    assert run.code == code
    assert message in run.err
    assert not hub.requests
