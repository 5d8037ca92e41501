"""Recipes that are mistyped, malformed or hostile: exit 2, with the line and the next step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from convert.recipe import ClaRecipe
from convert.recipe_file import load_recipe
from tests.faults.builders import write_model
from tests.faults.running import cli

GOOD = "method: gqa\nsource: {source}\noutput: {out}\nkv_heads: 2\n"


@pytest.fixture
def good(tmp_path: Path) -> str:
    source = write_model(tmp_path / "model")
    return GOOD.format(source=source, out=tmp_path / "out")


def refuse(folder: Path, text: str | bytes, *facts: str, sets: tuple[str, ...] = ()) -> str:
    """Run a recipe that must be refused, and check that nothing was made."""
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(text.encode() if isinstance(text, str) else text)
    before = sorted(folder.rglob("*"))
    run = cli(["run", str(recipe), *(part for item in sets for part in ("--set", item))])
    assert run.code == 2, run.err
    assert run.out == ""
    assert run.err.startswith("error: ")
    for fact in facts:
        assert fact in run.err, run.err
    assert sorted(folder.rglob("*")) == before
    return run.err


def test_good_recipe_runs(tmp_path: Path, good: str) -> None:
    (tmp_path / "recipe.yaml").write_text(good)
    assert cli(["run", str(tmp_path / "recipe.yaml")]).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2


BAD_LINES = (
    ("max_shard_sise: 5GB", ("unknown key 'max_shard_sise'", "did you mean 'max_shard_size'?")),
    ("overwite: true", ("unknown key 'overwite'", "did you mean 'overwrite'?")),
    ("zzz: 1", ("unknown key 'zzz'", "known: source, output")),
    ("7: 1", ("unknown key '7'",)),
    ("merge: median", ("merge: must be 'mean', 'first' or 'svd'", "found 'median'")),
    ("merge: 1", ("merge", "found 1")),
    ("dtype: int8", ("dtype: must be", "'bfloat16'", "found 'int8'")),
    ("resume: 'no'", ("resume", "boolean", "found 'no'")),
    ("overwrite: 1", ("overwrite", "boolean", "found 1")),
    ("revision: 12", ("revision", "string", "found 12")),
    ("max_ram: 5", ("max_ram", "string", "found 5")),
    ("max_ram: 5 parsecs", ("'5 parsecs' is not a size such as 5GB",)),
    ("max_ram: -5GB", ("'-5GB' is not a size",)),
    ("max_ram: 0GB", ("'0GB' is not a size",)),
    (f"max_ram: {'9' * 400}GB", ("max_ram",)),
    ("merge: [mean]", ("merge", "found ['mean']")),
    ("merge: !!python/name:os.system", ("tag", "python/name:os.system")),
    ("merge: !!python/object/apply:os.mkdir [trap]", ("tag", "os.mkdir")),
    ("merge: !custom mean", ("tag", "!custom")),
    ("merge: *name", ("anchors and aliases are not allowed",)),
    ("kv_heads: 3", ("key 'kv_heads' stands there twice",)),
    ("merge: [mean}", ("expected",)),
    ("\tmerge: mean", ("cannot start any token",)),
    ("merge: mean: first", ("not allowed here",)),
)


@pytest.mark.parametrize(("line", "facts"), BAD_LINES, ids=[line[:40] for line, _ in BAD_LINES])
def test_bad_line_is_named(
    tmp_path: Path,
    good: str,
    line: str,
    facts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where os.mkdir would make its folder
    refuse(tmp_path, f"{good}{line}\n", "recipe.yaml:5", *facts)


@pytest.mark.parametrize(
    "value",
    ["!!bool maybe", "!!int ''", "!!float x", "!!timestamp x", "!!binary _", "!!str 2"],
)
def test_explicit_tag_is_refused(tmp_path: Path, good: str, value: str) -> None:
    text = good.replace("kv_heads: 2", f"kv_heads: {value}")
    refuse(tmp_path, text, "recipe.yaml", "tag")


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ("kv_heads: 2", "kv_heads: two", ":4: kv_heads: Input should be a valid integer"),
        ("kv_heads: 2", "kv_heads: 2.0", ":4: kv_heads: Input should be a valid integer"),
        ("kv_heads: 2", "kv_heads: true", ":4: kv_heads: Input should be a valid integer"),
        ("kv_heads: 2", "kv_heads:", ":4: kv_heads: Input should be a valid integer"),
        ("kv_heads: 2", "kv_heads: 0", ":4: kv_heads: Input should be greater than or equal to 1"),
        ("kv_heads: 2", "kv_heads: " + "9" * 5000, "5000 digits"),
        ("kv_heads: 2", f"kv_heads: {10**30}", f"--kv-heads {10**30} does not work"),
        ("kv_heads: 2", "", "recipe.yaml: key 'kv_heads' is missing"),
        (
            "method: gqa",
            "",
            "recipe.yaml: method must be one of gqa, mqa, cla, mla, export, found None",
        ),
        (
            "method: gqa",
            "method: mlx",
            ":1: method must be one of gqa, mqa, cla, mla, export, found 'mlx'",
        ),
        (
            "method: gqa",
            "method: [gqa]",
            ":1: method must be one of gqa, mqa, cla, mla, export, found ['gqa']",
        ),
        ("method: gqa", "method: mqa", ":4: unknown key 'kv_heads'"),
        ("method: gqa", "source: x\nmethod: gqa", ":3: key 'source' stands there twice"),
    ],
    ids=lambda value: value[:30].strip() or "removed",
)
def test_changed_line_is_named(tmp_path: Path, good: str, old: str, new: str, fact: str) -> None:
    refuse(tmp_path, good.replace(old, new), fact)


def test_every_problem_is_told_at_once(tmp_path: Path, good: str) -> None:
    text = good.replace("kv_heads: 2", "kv_heads: x") + "merge: max\n"
    refuse(tmp_path, text, ":4: kv_heads", ":5: merge")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- gqa\n",
        "just text\n",
        "a: 1\n---\nb: 2\n",
        "[a]: 1\n",
        "? {a: 1}\n: 2\n",
        "[" * 5000,
        "a: \x00",
        b"a: \xff",
    ],
    ids=[
        "empty",
        "list",
        "text",
        "documents",
        "list_as_key",
        "map_as_key",
        "deep",
        "nul",
        "not_utf8",
    ],
)
def test_file_is_no_mapping(tmp_path: Path, text: str | bytes) -> None:
    refuse(tmp_path, text, "recipe.yaml")


def test_alias_bomb(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 12)]
    refuse(tmp_path, "\n".join(lines), "recipe.yaml:2: anchors and aliases are not allowed")


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    refuse(tmp_path, "#" * 1_000_001, "1,000,001 bytes", "no recipe")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_there_is_no_file(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "recipe.yaml").mkdir()
    run = cli(["run", str(tmp_path / "recipe.yaml")])
    assert run.code == 2
    assert f"cannot read the recipe {tmp_path / 'recipe.yaml'}" in run.err


def test_output_is_missing(tmp_path: Path, good: str) -> None:
    text = "".join(line for line in good.splitlines(True) if not line.startswith("output"))
    refuse(tmp_path, text, "no output folder is given")


@pytest.mark.parametrize(
    ("item", "facts"),
    [
        ("kv_heads", ("--set kv_heads", "expected key=value")),
        ("kv_head=1", ("--set", "did you mean 'kv_heads'?")),
        ("=1", ("--set", "unknown key ''")),
        ("kv_heads=many", ("--set", "kv_heads", "found 'many'")),
        ("kv_heads=", ("--set", "kv_heads", "found None")),
        ("kv_heads=3", ("--kv-heads 3", "Choose one of 1, 2")),
        ("kv_heads=[", ("--set kv_heads=[",)),
        ("merge=!!python/name:os.system", ("--set", "python/name:os.system")),
        ("merge=*x", ("--set", "anchors and aliases")),
        ("method=mlx", ("--set", "method must be one of gqa, mqa, cla, mla, export, found 'mlx'")),
        ("method=cla", ("recipe.yaml: key 'share' is missing",)),
    ],
)
def test_bad_override(tmp_path: Path, good: str, item: str, facts: tuple[str, ...]) -> None:
    refuse(tmp_path, good, *facts, sets=(item,))


def test_overrides_win_and_the_last_one_wins(tmp_path: Path, good: str) -> None:
    (tmp_path / "recipe.yaml").write_text(good)
    other = tmp_path / "other"
    items = ("kv_heads=2", "kv_heads=1", "merge=first", f"output={other}")
    flags = [part for item in items for part in ("--set", item)]
    run = cli(["run", str(tmp_path / "recipe.yaml"), *flags])
    assert (run.code, run.out) == (0, f"{other}\n")
    assert json.loads((other / "config.json").read_text())["num_key_value_heads"] == 1
    assert json.loads((other / "kvpatch.json").read_text())["recipe"]["merge"] == "first"
    assert not (tmp_path / "out").exists()


def test_override_can_mend_a_recipe(tmp_path: Path, good: str) -> None:
    (tmp_path / "recipe.yaml").write_text(good.replace("kv_heads: 2", "kv_heads: many"))
    assert cli(["run", str(tmp_path / "recipe.yaml"), "--set", "kv_heads=2"]).code == 0


def test_python_tag_runs_nothing(tmp_path: Path, good: str) -> None:
    trap = tmp_path / "trap"
    for tag in ("object/apply", "object/new"):
        refuse(tmp_path, f"{good}merge: !!python/{tag}:os.mkdir ['{trap}']\n", "recipe.yaml:5")
    assert not os.path.lexists(trap)


@pytest.mark.parametrize("text", ["1:6", "10:30", "0:59"])
def test_a_range_is_text_and_no_number_of_base_60(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"source: model\nmethod: cla\nshare: 2\nlayers: {text}\n")
    recipe = load_recipe(file)
    assert isinstance(recipe, ClaRecipe)
    assert recipe.layers == text


@pytest.mark.parametrize("key", ["source", "output", "calibration"])
def test_path_that_no_file_can_have(tmp_path: Path, good: str, key: str) -> None:
    kept = "".join(f"{line}\n" for line in good.splitlines() if not line.startswith(f"{key}:"))
    text = f'{kept}merge: svd\n{key}: "a\\0b"\n'
    refuse(tmp_path, text, "'a\\x00b' cannot be used as a path")
