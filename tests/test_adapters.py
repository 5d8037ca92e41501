"""Sources with a LoRA adapter, from the command line: against models that peft merged and saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.checkpoint.manifest import read_manifest
from convert.loading import load_model
from convert.preparing import prepare
from convert.recipe import make_recipe
from tests.adapted import EVERY, as_peft, save_merged, set_base, write_adapter, write_base
from tests.families.stock import full_logits, random_ids
from tests.families.texts import random_text, write_tokenizer
from tests.faults.hub_client import Client
from tests.faults.hub_server import Hub, serve
from tests.faults.running import Run, cli, contents
from tests.helpers import assert_close
from tests.training.small import FLAGS, weights

KINDS = {
    "gqa": ["gqa", "--kv-heads", "2", "--merge", "svd", "--samples", "4", "--context", "16"],
    "cla": ["cla", "--share", "2"],
    "mla": ["mla", "--kv-budget", "16+4", "--rope-select", "stride"],
    "mla-kvpatch": ["mla", "--kv-budget", "16+4", "--target", "kvpatch"],
}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
# model, adapter, and whether its two embeddings are one tensor before and after
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": list(EVERY), "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"]}),
    "phi3": ("phi3", {"target_modules": "all-linear", "use_rslora": True}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: a base, it with an adapter beside it, the adapter alone, and both merged by peft."""
    root = tmp_path_factory.mktemp("adapters")
    (root / "text.txt").write_text(random_text(400, seed=3))
    for name, (model, keys) in ADAPTED.items():
        base = write_base(root / name, model)
        write_tokenizer(base)
        beside = Path(shutil.copytree(base, root / f"{name}-beside"))
        write_adapter(beside, **keys)
        save_merged(beside, root / f"{name}-merged")
    alone = root / "alone"
    alone.mkdir()
    for file in ADAPTER_FILES:
        shutil.copy(root / "llama-beside" / file, alone)
    set_base(alone, "../llama")
    return root


def _convert(kind: str, source: Path, out: Path, *flags: str) -> Path:
    command, *more = KINDS[kind]
    text = ["--calibration", str(source.parent / "text.txt")] if kind == "gqa" else []
    run = cli([command, str(source), str(out), *more, *text, *flags, "-q"])
    assert run.code == 0, run.err
    return out


def _assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in KINDS), ("gpt2", "gqa"), ("gpt2", "cla"), ("phi3", "mla")],
)
def test_conversions_are_those_of_the_merged_model(
    name: str, kind: str, place: Path, tmp_path: Path
) -> None:
    ours = _convert(kind, place / f"{name}-beside", tmp_path / "ours", "--adapter", "merge")
    theirs = _convert(kind, place / f"{name}-merged", tmp_path / "theirs")
    _assert_same_weights(ours, theirs)
    config = json.loads((ours / "config.json").read_text())
    expected = json.loads((theirs / "config.json").read_text())
    assert config == {**expected, "tie_word_embeddings": config["tie_word_embeddings"]}
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    manifest = read_manifest(ours)
    assert set(manifest["source"]["files"]) == {"model.safetensors", *ADAPTER_FILES}
    assert manifest["recipe"]["adapter"] == "merge"
    card = " ".join((ours / "README.md").read_text().split())
    assert "The LoRA adapter that lies beside its weights was merged into them first." in card
    assert "bit for bit" not in card


@pytest.mark.parametrize("name", ADAPTED)
def test_results_compute_what_base_and_adapter_do(name: str, place: Path) -> None:
    """Also where one tensor was both embeddings, which merging by peft would spoil."""
    model = load_model(place / f"{name}-beside", dtype=torch.float64, adapter="merge")
    ids = random_ids(model)
    expected = full_logits(as_peft(place / f"{name}-beside").double(), ids)
    assert_close(full_logits(model.double(), ids), expected, atol=1e-10)


def test_models_stop_generating_where_the_folder_says(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "llama-beside", tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    for choice in ("merge", "ignore"):
        model = load_model(folder, dtype=torch.float32, adapter=choice)
        assert model.generation_config.eos_token_id == [2, 7]


def test_the_base_alone_is_converted_if_that_is_said(place: Path, tmp_path: Path) -> None:
    ours = _convert("cla", place / "llama-beside", tmp_path / "a", "--adapter", "ignore")
    theirs = _convert("cla", place / "llama", tmp_path / "b")
    _assert_same_weights(ours, theirs)
    assert not ADAPTER_FILES & {path.name for path in ours.iterdir()}
    assert set(read_manifest(ours)["source"]["files"]) == {"model.safetensors"}
    card = (ours / "README.md").read_text()
    assert "The adapter that lies beside its weights was left out." in card
    assert "bit for bit" in card


@pytest.mark.parametrize(
    "command",
    [
        *(["gqa", "--kv-heads", "2"], ["mqa"], ["cla", "--share", "2"]),
        *(["mla", "--kv-budget", "16+4"], ["mqa", "--dry-run"], ["eval", "--retrieval"], ["bench"]),
    ],
    ids=" ".join,
)
def test_an_adapter_beside_the_weights_needs_a_choice(
    command: list[str], place: Path, tmp_path: Path
) -> None:
    name, *flags = command
    out = [] if name in {"eval", "bench"} else [str(tmp_path / "out")]
    run = cli([name, str(place / "llama-beside"), *out, *flags])
    assert run.code == 2, run.err
    assert "an adapter lies beside the weights of llama-beside" in run.err
    hint = run.err.splitlines()[-1]
    assert "--adapter merge" in hint
    assert "--adapter ignore" in hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "choice", "message"),
    [
        ("llama", "merge", "there is no adapter in llama"),
        ("alone", "ignore", "alone is an adapter without weights; without it, nothing is left"),
        ("llama-beside", "both", "adapter: must be 'merge' or 'ignore'"),
    ],
)
def test_choices_that_there_are_not_are_refused(
    source: str, choice: str, message: str, place: Path, tmp_path: Path
) -> None:
    run = cli(["mqa", str(place / source), str(tmp_path / "out"), "--adapter", choice])
    assert run.code == 2
    assert message in run.err


def test_the_plan_names_the_adapter_and_what_becomes_of_it(place: Path) -> None:
    def plan(source: str, *flags: str) -> tuple[dict[str, Any], str]:
        command = ["mqa", str(place / source), "out", "--dry-run", *flags]
        text = cli(command)
        assert text.code == 0, text.err
        return json.loads(cli([*command, "--json"]).out), text.out

    data, text = plan("llama-beside", "--adapter", "merge")
    count = 2 * len(EVERY) + 1
    expected = {"action": "merge", "file": "adapter_model.safetensors", "rank": 4, "tensors": count}
    assert data["adapter"] == {**expected, "base": None}
    assert (
        f"adapter: adapter_model.safetensors, LoRA of rank 4, merged into {count} tensors" in text
    )
    actions = {tensor["name"]: tensor["action"] for tensor in data["tensors"]}
    assert actions["model.layers.0.mlp.up_proj.weight"] == "merge"
    assert actions["model.embed_tokens.weight"] == "copy"
    assert plan("alone")[0]["adapter"] == {**expected, "base": "llama"}
    data, text = plan("llama-beside", "--adapter", "ignore")
    assert data["adapter"]["action"] == "ignore"
    assert "adapter: left out (adapter_config.json)" in text
    assert plan("llama")[0]["adapter"] is None


def test_another_adapter_is_another_plan(place: Path, tmp_path: Path) -> None:
    source = shutil.copytree(place / "llama-beside", tmp_path / "source")

    def identity(choice: str) -> str:
        recipe = {"method": "mqa", "source": str(source), "adapter": choice}
        with prepare(make_recipe(recipe)) as prepared:
            return prepared.plan.plan_id

    first = identity("merge")
    assert identity("ignore") != first
    assert identity("merge") == first
    write_adapter(place / "llama", source, seed=6, target_modules=["q_proj"])
    assert identity("merge") != first


def test_an_adapter_alone_is_merged_into_its_base(place: Path, tmp_path: Path) -> None:
    ours = _convert("gqa", place / "alone", tmp_path / "ours")
    _assert_same_weights(ours, _convert("gqa", place / "llama-merged", tmp_path / "theirs"))
    manifest = read_manifest(ours)
    assert manifest["recipe"]["adapter"] == "merge"
    assert manifest["source"]["name"] == "alone"
    assert manifest["source"]["base"] == {"name": "llama", "repository": None, "revision": None}
    assert set(manifest["source"]["files"]) == {"model.safetensors", *ADAPTER_FILES}
    card = (ours / "README.md").read_text()
    assert "It is a LoRA adapter of llama, and was merged into that model first." in card
    assert not ADAPTER_FILES & {path.name for path in ours.iterdir()}


def test_side_files_of_the_adapter_go_first(place: Path, tmp_path: Path) -> None:
    base = shutil.copytree(place / "llama", tmp_path / "base")
    (base / "LICENSE").write_text("of the base\n")
    (base / "vocab.txt").write_text("of a tokenizer that the adapter does not have\n")
    (base / "generation_config.json").write_text('{"do_sample": false}\n')
    alone = shutil.copytree(place / "alone", tmp_path / "alone")
    set_base(alone, str(base))
    out = _convert("cla", alone, tmp_path / "first")
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "vocab.txt").exists()
    write_tokenizer(alone)
    (alone / "generation_config.json").write_text('{"do_sample": true}\n')
    (alone / "chat_template.jinja").write_text("{{ messages }}\n")
    out = _convert("cla", alone, tmp_path / "second")
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    assert (out / "LICENSE").read_text() == "of the base\n"
    assert not (out / "vocab.txt").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "names no base: base_model_name_or_path is None"),
        ("/nowhere/llama", "its base '/nowhere/llama' is neither a folder here nor a repository"),
        ("../llama-beside", "is one of llama-beside, which is or has an adapter itself"),
        (".", "which is or has an adapter itself"),
    ],
    ids=str,
)
def test_a_base_that_is_not_there_is_refused(
    base: str | None, message: str, place: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(place / "alone", place / tmp_path.name)
    set_base(alone, base)
    run = cli(["mqa", str(alone), str(tmp_path / "out")])
    assert run.code in {2, 3}
    assert message in run.err


@pytest.fixture(scope="module")
def result(place: Path) -> Path:
    return _convert("gqa", place / "llama-beside", place / "result", "--adapter", "merge")


def _numbers(*arguments: object) -> dict[str, Any]:
    run = cli([*map(str, arguments), "--json"])
    assert run.code == 0, run.err
    data: dict[str, Any] = json.loads(run.out)
    return data


def test_what_is_measured_is_what_was_converted(place: Path, result: Path) -> None:
    text = ("--text", place / "text.txt", "--context", "16", "--samples", "2")
    merged = _numbers("eval", place / "llama-merged", *text)
    alone = _numbers("eval", place / "llama", *text)
    assert merged["nll"] != alone["nll"]
    for source, flags in (("llama-beside", ["--adapter", "merge"]), ("alone", [])):
        assert _numbers("eval", place / source, *text, *flags) == merged
    assert _numbers("eval", place / "llama-beside", *text, "--adapter", "ignore") == alone
    # the result remembers
    expected = _numbers("eval", result, *text, "--against", place / "llama-merged")
    for source in ("llama-beside", "alone"):
        assert _numbers("eval", result, *text, "--against", place / source) == expected


def test_the_teacher_is_what_was_converted(place: Path, result: Path, tmp_path: Path) -> None:
    for teacher in ("llama-merged", "llama-beside", "alone"):
        run = cli(
            [
                *(
                    "uptrain",
                    str(result),
                    str(tmp_path / teacher),
                    "--teacher",
                    str(place / teacher),
                ),
                *("--data", str(place / "text.txt"), *FLAGS, "--tokens", "64"),
            ]
        )
        assert run.code == 0, run.err
        _assert_same_weights(tmp_path / teacher, tmp_path / "llama-merged")


def test_a_result_with_an_adapter_beside_it_is_not_trained(
    place: Path, result: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(result, tmp_path / "start")
    for file in ADAPTER_FILES:
        shutil.copy(place / "llama-beside" / file, start)
    arguments = ["--data", str(place / "text.txt"), "--tokens", "64", "--dry-run"]
    run = cli(["uptrain", str(start), str(tmp_path / "out"), *arguments])
    assert run.code == 2
    assert "an adapter lies beside the weights of start" in run.err


@pytest.mark.parametrize(
    ("source", "warning"),
    [
        ("llama-beside", "an adapter lies beside the weights (adapter_config.json): conversions"),
        ("alone", "this is an adapter of llama, which is described here; conversions merge it"),
        ("llama", ""),
    ],
)
def test_inspect_says_that_there_is_an_adapter(source: str, warning: str, place: Path) -> None:
    run = cli(["inspect", str(place / source)])
    assert run.code == 0, run.err
    assert run.out == cli(["inspect", str(place / "llama")]).out
    assert warning in run.err
    assert bool(run.err) is bool(warning)


REPOSITORY, OLD, NEW = "someone/small", "0" * 39 + "1", "0" * 39 + "2"


def _files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if type(content) is bytes}


@pytest.fixture
def hub(place: Path) -> Iterator[Hub]:
    commits = {OLD: _files(place / "llama"), NEW: _files(place / "llama-beside")}
    with serve(Hub(REPOSITORY, commits, {"main": NEW})) as served:
        yield served


def _succeeded(run: Run) -> Run:
    assert run.code == 0, run.err
    return run


def test_an_adapter_on_the_hub_is_planned_from_headers(
    hub: Hub, place: Path, tmp_path: Path
) -> None:
    client = Client(hub.url, tmp_path / "home")
    flags = [str(tmp_path / "out"), "--adapter", "merge", "--dry-run", "--json"]
    plan = json.loads(_succeeded(client(["mqa", REPOSITORY, *flags])).out)
    local = json.loads(_succeeded(cli(["mqa", str(place / "llama-beside"), *flags])).out)
    names = {"source", "revision"}
    assert {k: v for k, v in plan.items() if k not in names} == {
        k: v for k, v in local.items() if k not in names
    }
    assert not list(client.cache.rglob("*.safetensors"))
    run = _succeeded(client(["inspect", REPOSITORY]))
    assert "an adapter lies beside the weights" in run.err


def test_the_base_of_an_adapter_is_fetched_at_its_revision(
    hub: Hub, place: Path, tmp_path: Path
) -> None:
    client = Client(hub.url, tmp_path / "home")
    alone = Path(shutil.copytree(place / "alone", tmp_path / "alone"))
    set_base(alone, REPOSITORY, revision=OLD)
    dry = _succeeded(client(["mqa", str(alone), str(tmp_path / "out"), "--dry-run", "--json"]))
    assert json.loads(dry.out)["adapter"]["base"] == REPOSITORY
    assert not list(client.cache.rglob("*.safetensors"))
    _succeeded(client(["mqa", str(alone), str(tmp_path / "out"), "-q"]))
    _succeeded(cli(["mqa", str(place / "llama-merged"), str(tmp_path / "local"), "-q"]))
    _assert_same_weights(tmp_path / "out", tmp_path / "local")
    base = read_manifest(tmp_path / "out")["source"]["base"]
    assert base == {"name": REPOSITORY, "repository": REPOSITORY, "revision": OLD}
    assert f"base_model: {REPOSITORY}\n" in (tmp_path / "out" / "README.md").read_text()
    hub.commits[NEW] = _files(place / "alone")
    run = client(["mqa", REPOSITORY, str(tmp_path / "again")])
    assert run.code == 3, run.err
    assert "its base '../llama' is neither a folder here nor a repository" in run.err
