"""A plan for a model on the Hub: what it says with the weights here, without fetching them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.safetensors_header import header_bytes
from convert.recipe import make_recipe
from tests.faults.hub_client import Client
from tests.faults.hub_server import Hub, serve
from tests.faults.running import Run, cli, contents, gqa
from tests.faults.small_llama import write_llama

REPOSITORY, COMMIT = "someone/small-llama", "0" * 39 + "1"
BLOCK = 1 << 17
OF_THE_SOURCE = {"source", "revision", "output"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weight files several times as large as what is first asked for of each."""
    return write_llama(
        tmp_path_factory.mktemp("headers") / "model", layers=3, hidden=128, inner=1024
    )


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    files = {name: c for name, c in contents(folder).items() if type(c) is bytes}
    unwanted = {"original/model.safetensors": b"other", "consolidated.safetensors": b"other"}
    with serve(Hub(REPOSITORY, {COMMIT: {**files, **unwanted}}, {"main": COMMIT})) as served:
        yield served


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def _plan(run: Run) -> dict[str, Any]:
    assert run.code == 0, run.err
    plan: dict[str, Any] = json.loads(run.out)
    return plan


def _weights_sent(hub: Hub) -> dict[str, int]:
    return {name: size for name, size in hub.sent.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    "command",
    [
        ["gqa", "--kv-heads", "2"],
        ["cla", "--share", "2"],
        ["mla", "--kv-budget", "16+4"],
        ["mla", "--kv-budget", "25%"],
    ],
    ids=" ".join,
)
def test_the_plan_needs_the_headers_alone(
    client: Client, hub: Hub, folder: Path, tmp_path: Path, command: list[str]
) -> None:
    name, *flags = command
    flags = [str(tmp_path / "out"), *flags, "--dry-run", "--json"]
    plan = _plan(client([name, REPOSITORY, *flags]))
    local = _plan(cli([name, str(folder), *flags]))
    assert {k: v for k, v in plan.items() if k not in OF_THE_SOURCE} == {
        k: v for k, v in local.items() if k not in OF_THE_SOURCE
    }
    assert (plan["source"], plan["revision"]) == (REPOSITORY, COMMIT)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert all(size > 3 * BLOCK for size in sizes.values())
    sent = _weights_sent(hub)
    assert sent.keys() == sizes.keys()
    assert all(size <= 2 * BLOCK for size in sent.values())
    assert not list(client.cache.rglob("*.safetensors")), "half a file would pass for a whole one"


def test_what_is_chosen_by_its_loss_needs_the_weights(
    client: Client, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    flags = [str(tmp_path / "out"), "--share", "2", "--layers", "auto", "--dry-run", "--json"]
    plan = _plan(client(["cla", REPOSITORY, *flags]))
    local = _plan(cli(["cla", str(folder), *flags]))
    assert plan["kv_source_layers"] == local["kv_source_layers"]
    _assert_fetched_after_the_headers(hub, folder)


def test_what_is_refused_is_not_fetched(client: Client, hub: Hub, tmp_path: Path) -> None:
    run = client(["gqa", REPOSITORY, str(tmp_path / "out"), "--kv-heads", "3"])
    assert run.code == 2
    assert all(size <= 2 * BLOCK for size in _weights_sent(hub).values())
    assert not list(client.cache.rglob("*.safetensors"))


def _assert_fetched_after_the_headers(hub: Hub, folder: Path) -> None:
    """Whole weights were sent once, and before that no more than their headers."""
    sizes, sent = (
        {p.name: p.stat().st_size for p in folder.glob("*.safetensors")},
        _weights_sent(hub),
    )
    assert sent.keys() == sizes.keys()
    assert all(0 < sent[name] - size <= 2 * BLOCK for name, size in sizes.items())


@pytest.mark.parametrize(
    ("keys", "alone"),
    [
        ({"method": "gqa", "kv_heads": 2}, True),
        ({"method": "mqa"}, True),
        ({"method": "cla", "share": 2, "layers": "0:2"}, True),
        ({"method": "cla", "share": 2, "layers": "auto"}, False),
        ({"method": "mla", "rank": 16, "rope_dims": 4}, True),
        ({"method": "mla", "kv_budget": "16+4"}, True),
        ({"method": "mla", "kv_budget": "25%"}, True),
        ({"method": "export", "target": "native"}, False),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_recipes_know_what_their_plan_needs(keys: dict[str, Any], alone: bool) -> None:
    assert make_recipe({"source": "org/name", **keys}).planned_from_headers is alone


def test_a_tensor_without_its_bytes_is_not_read_as_zeros(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "headers"
    copy.mkdir()
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    for path in folder.glob("*.json"):
        (copy / path.name).write_bytes(path.read_bytes())
    for name, size in sizes.items():
        with (folder / name).open("rb") as stream:
            (copy / name).write_bytes(header_bytes(stream, size, name))
    with Checkpoint(copy, sizes=sizes) as headers, Checkpoint(folder) as whole:
        assert headers.tensors == whole.tensors
        with pytest.raises(AssertionError, match="only the header"):
            headers.read("lm_head.weight")


def test_weights_in_the_cache_are_used(client: Client, hub: Hub, tmp_path: Path) -> None:
    assert client(gqa(REPOSITORY, tmp_path / "first")).code == 0
    hub.sent.clear()
    run = client(gqa(REPOSITORY, tmp_path / "out", "--dry-run", "--json"))
    assert _plan(run)["revision"] == COMMIT
    assert not _weights_sent(hub)
    offline = client(gqa(REPOSITORY, tmp_path / "out", "--dry-run", "--json"), HF_HUB_OFFLINE="1")
    assert offline.out == run.out


def test_a_conversion_after_the_plan_fetches_whole_files(
    client: Client, hub: Hub, folder: Path, tmp_path: Path
) -> None:
    assert client(gqa(REPOSITORY, tmp_path / "out", "--dry-run")).code == 0
    assert client(gqa(REPOSITORY, tmp_path / "out")).code == 0
    assert cli(gqa(folder, tmp_path / "local")).code == 0
    ours, local = contents(tmp_path / "out"), contents(tmp_path / "local")
    assert {n: c for n, c in ours.items() if n.endswith(".safetensors")} == {
        n: c for n, c in local.items() if n.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-2], "is truncated"),
        (lambda content: b"<!doctype html>" + content, "is an HTML page"),
        (lambda content: content[:8] + b"?" + content[9:], "not valid JSON"),
    ],
    ids=["truncated", "html", "header"],
)
def test_damage_is_seen_from_the_header(
    client: Client, hub: Hub, tmp_path: Path, damage: Any, message: str
) -> None:
    name = "model-00002-of-00003.safetensors"
    hub.commits[COMMIT] = {**hub.commits[COMMIT], name: damage(hub.commits[COMMIT][name])}
    run = client(gqa(REPOSITORY, tmp_path / "out", "--dry-run"))
    assert run.code == 3, run.err
    assert name in run.err
    assert message in run.err
