"""Sources on the Hub, against a server on the loopback interface: one commit, or one clear error.

Every run is a child of its own, because huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.faults.hub_client import TOKEN, Client, assert_refused
from tests.faults.hub_server import Answer, Hub, Request, serve
from tests.faults.running import cli, contents, gqa
from tests.faults.small_llama import write_llama

REPOSITORY = "someone/small-llama"
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


def _files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if type(content) is bytes}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model at either commit; all weights differ."""
    root = tmp_path_factory.mktemp("hub-faults")
    return {
        commit: write_llama(root / commit, layers=2, seed=seed)
        for seed, commit in enumerate((OLD, NEW))
    }


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    extra = {"pytorch_model.bin": b"pickle", "modeling_small.py": b"code", "photo.png": b"pixels"}
    commits = {commit: _files(folder) | extra for commit, folder in folders.items()}
    refs = {"main": NEW, "v1": OLD, "refs/pr/1": OLD}
    with serve(Hub(REPOSITORY, commits, refs)) as served:
        yield served


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def _check_converted(out: Path, source: Path, commit: str) -> None:
    """The output holds what the same folder gives locally, and says where it comes from."""
    local = out.with_name(f"local-{commit}")
    assert cli(gqa(source, local)).code == 0
    ours, reference = _files(out), _files(local)
    recorded = json.loads(ours.pop("kvpatch.json"))["source"]
    card = ours.pop("README.md").decode()
    del reference["kvpatch.json"], reference["README.md"]
    assert ours == reference
    assert (recorded["repository"], recorded["revision"]) == (REPOSITORY, commit)
    assert f"base_model: {REPOSITORY}" in card


@pytest.mark.parametrize(
    ("source", "flags", "commit"),
    [
        (REPOSITORY, (), NEW),
        (f"{REPOSITORY}@v1", (), OLD),
        (REPOSITORY, ("--revision", "v1"), OLD),
        (f"{REPOSITORY}@{OLD}", (), OLD),
        (f"{REPOSITORY}@refs/pr/1", (), OLD),
    ],
    ids=["main", "at-tag", "revision-flag", "commit", "pull-request"],
)
def test_converts_one_commit(
    client: Client,
    hub: Hub,
    tmp_path: Path,
    folders: dict[str, Path],
    source: str,
    flags: tuple[str, ...],
    commit: str,
) -> None:
    out = tmp_path / "out"
    run = client(gqa(source, out, *flags))
    assert run.code == 0, run.err
    _check_converted(out, folders[commit], commit)
    assert run.err.splitlines() == [f"converted to {out}; check it with: kvpatch verify {out}"]
    assert not hub.files & {"pytorch_model.bin", "modeling_small.py", "photo.png"}


def test_branch_that_moves_during_the_download(
    client: Client, hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """The revision is resolved before the first file; from then on requests name the commit."""
    hub.refs["main"] = OLD

    def move(request: Request) -> None:
        if "/resolve/" in request.path:
            hub.refs["main"] = NEW

    hub.served = move
    assert client(gqa(REPOSITORY, tmp_path / "out")).code == 0
    _check_converted(tmp_path / "out", folders[OLD], OLD)
    client(gqa(REPOSITORY, tmp_path / "later"))
    _check_converted(tmp_path / "later", folders[NEW], NEW)


def test_inspect_fetches_the_config_alone(client: Client, hub: Hub) -> None:
    run = client(["inspect", REPOSITORY, "--json"])
    assert run.code == 0, run.err
    assert json.loads(run.out)["model"]["kv_heads"] == 8
    assert hub.files == {"config.json"}


def _status(status: int, code: str | None = None) -> Callable[[Request], Answer]:
    return lambda request: Answer.error(status, code)


def _gated_files(request: Request) -> Answer | None:
    """Anybody may look at the page of a gated model; only its files are refused."""
    return Answer.error(403, "GatedRepo") if "/resolve/" in request.path else None


@pytest.mark.parametrize("command", ["gqa", "inspect"])
@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (_status(404, "RepoNotFound"), "the Hub has no model", "hf auth login"),
        (_status(401, "RepoNotFound"), "the Hub has no model", "hf auth login"),
        (_status(401), "401", "hf auth login"),
        (_status(403, "GatedRepo"), "is gated", "Accept its terms"),
        (_gated_files, "is gated", "Accept its terms"),
        (_status(404, "RevisionNotFound"), "has no revision 'v1'", ""),
        (_status(429), "429", "Wait a while"),
        (_status(500), "500", "Wait a while"),
        (_status(503), "503", "Wait a while"),
    ],
    ids=[
        "absent",
        "private",
        "bad-token",
        "gated",
        "gated-files",
        "no-revision",
        "429",
        "500",
        "503",
    ],
)
def test_refusals(
    client: Client,
    hub: Hub,
    tmp_path: Path,
    fault: Callable[[Request], Answer | None],
    message: str,
    hint: str,
    command: str,
) -> None:
    hub.fault = fault
    source = f"{REPOSITORY}@v1"
    arguments = gqa(source, tmp_path / "out") if command == "gqa" else ["inspect", source]
    assert_refused(client(arguments), REPOSITORY, message, hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["gqa", "inspect"])
def test_nobody_listens(tmp_path: Path, command: str) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        client = Client(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "home")
        arguments = ["inspect", REPOSITORY]
        if command == "gqa":
            arguments = gqa(REPOSITORY, tmp_path / "out")
        assert_refused(client(arguments), REPOSITORY, "cannot be reached", "network connection")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["gqa", "inspect"])
def test_offline_without_the_model(client: Client, hub: Hub, tmp_path: Path, command: str) -> None:
    arguments = ["inspect", REPOSITORY]
    if command == "gqa":
        arguments = gqa(REPOSITORY, tmp_path / "out")
    run = client(arguments, HF_HUB_OFFLINE="1")
    assert_refused(run, REPOSITORY, "not in the local cache", "HF_HUB_OFFLINE is set")
    assert not hub.requests


def test_offline_with_the_model(
    client: Client, hub: Hub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    assert client(gqa(REPOSITORY, tmp_path / "first")).code == 0
    hub.requests.clear()
    run = client(gqa(REPOSITORY, tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert run.code == 0, run.err
    assert not hub.requests
    _check_converted(tmp_path / "out", folders[NEW], NEW)


def test_damaged_file_in_the_cache(client: Client, tmp_path: Path) -> None:
    """One flipped bit; size and header are sound, so only the hash in the blob's name tells."""
    assert client(gqa(REPOSITORY, tmp_path / "first")).code == 0
    snapshot = client.cache / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / NEW
    file = snapshot / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    load(bytes(content))
    run = client(gqa(REPOSITORY, tmp_path / "out"))
    assert run.code == 3
    assert f"{file.name} is damaged" in run.err
    assert str(file.resolve()) in run.err
    assert not (tmp_path / "out").exists()


def test_token_is_sent_and_shown_nowhere(client: Client, hub: Hub, tmp_path: Path) -> None:
    run = client(gqa(REPOSITORY, tmp_path / "out", "--verbose"), HF_TOKEN=TOKEN)
    assert run.code == 0, run.err
    assert f"Bearer {TOKEN}" in {request.authorization for request in hub.requests}
    hub.fault = _status(403, "GatedRepo")
    refused = client(gqa(f"{REPOSITORY}@v1", tmp_path / "no", "--debug"), HF_TOKEN=TOKEN)
    assert refused.code == 5
    assert "Traceback" in refused.err
    shown = [run.out, run.err, refused.out, refused.err]
    written = [c for c in contents(tmp_path).values() if type(c) is bytes]
    assert not [text for text in shown if TOKEN in text]
    assert not [content for content in written if TOKEN.encode() in content]
