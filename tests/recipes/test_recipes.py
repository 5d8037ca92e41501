"""Every recipe says what it does: the dry run on the true shapes of its model agrees with it."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from convert.cli import app
from convert.recipe import ClaRecipe, GqaRecipe, MlaRecipe, MqaRecipe, Recipe
from convert.recipe_file import load_recipe
from kvpatch.errors import UsageError
from tests.recipes.shapes import ITEM_BYTES, PUBLISHED, PublishedModel, write_headers_only

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text()

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Header-only checkpoint of every published model, by repository."""
    return {
        repository: write_headers_only(model, tmp_path_factory.mktemp("hollow"))
        for repository, model in PUBLISHED.items()
    }


def run(*arguments: str) -> dict[str, Any]:
    """What a command prints with ``--json``."""
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def dry_run(path: Path, hollow: dict[str, Path]) -> dict[str, Any]:
    source = hollow[load_recipe(path).source]
    return run("run", str(path), "--dry-run", "--set", f"source={source}")


def kv_heads_wanted(path: Path) -> int:
    """Target that the file name promises."""
    name = path.stem
    return 1 if name.endswith("-mqa") else int(name.rpartition("-gqa")[2])


def expected_token_bytes(model: PublishedModel, kv_heads: int) -> int:
    """One key and one value of every KV head of every layer."""
    return (
        2 * model.config["num_hidden_layers"] * kv_heads * model.head_dim * ITEM_BYTES[model.dtype]
    )


def expected_output_bytes(model: PublishedModel, kv_heads: int) -> int:
    """The published size, less the rows of k_proj and v_proj that pooling takes away."""
    config = model.config
    biased = config["model_type"] == "qwen2"  # the one family here with a bias on k and v
    rows = (config["num_key_value_heads"] - kv_heads) * model.head_dim
    removed = 2 * config["num_hidden_layers"] * rows * (config["hidden_size"] + biased)
    return ITEM_BYTES[model.dtype] * (model.parameters - removed)


def header_comment(path: Path) -> list[str]:
    return [
        line.removeprefix("#").strip()
        for line in path.read_text().splitlines()
        if line.startswith("#")
    ]


@pytest.mark.parametrize("repository", PUBLISHED, ids=lambda name: name.rpartition("/")[2])
def test_hollow_checkpoint_has_the_published_size(repository: str) -> None:
    model = PUBLISHED[repository]
    assert sum(map(prod, model.shapes().values())) == model.parameters


@pytest.mark.parametrize("repository", PUBLISHED, ids=lambda name: name.rpartition("/")[2])
def test_hollow_checkpoint_takes_no_disk(repository: str, hollow: dict[str, Path]) -> None:
    stats = [file.stat() for file in hollow[repository].iterdir()]
    assert sum(stat.st_size for stat in stats) > 3 * 10**9
    assert sum(512 * stat.st_blocks for stat in stats) < 10**6


@each_recipe
def test_recipe_loads_and_names_its_output_after_itself(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.source in PUBLISHED
    assert recipe.output == f"./{path.stem}"
    assert recipe.kv_heads == kv_heads_wanted(path)
    assert recipe.merge == "mean"


@each_recipe
def test_recipe_with_a_misspelt_key_is_refused(path: Path, tmp_path: Path) -> None:
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text().replace("merge:", "merg:"))
    with pytest.raises(UsageError, match=r"unknown key 'merg'; did you mean 'merge'"):
        load_recipe(wrong)


@each_recipe
def test_dry_run_gives_the_right_numbers(path: Path, hollow: dict[str, Path]) -> None:
    model = PUBLISHED[load_recipe(path).source]
    before, after = model.config["num_key_value_heads"], kv_heads_wanted(path)
    plan = dry_run(path, hollow)
    assert plan["class"] == model.config["architectures"][0]
    assert plan["kv_heads"] == [before, after]
    assert plan["kv_bytes_per_token"] == [expected_token_bytes(model, n) for n in (before, after)]
    assert plan["bytes"] == [expected_output_bytes(model, n) for n in (before, after)]
    assert sum(plan["files"].values()) == expected_output_bytes(model, after)


@each_recipe
def test_dry_run_changes_keys_and_values_only(path: Path, hollow: dict[str, Path]) -> None:
    model = PUBLISHED[load_recipe(path).source]
    group = model.config["num_key_value_heads"] // kv_heads_wanted(path)
    fates = {fate["name"]: fate for fate in dry_run(path, hollow)["tensors"]}
    shapes = model.shapes()
    assert set(fates) == set(shapes)
    for name, (rows, *rest) in shapes.items():
        pooled = re.search(r"\.self_attn\.[kv]_proj\.", name) is not None
        assert fates[name]["action"] == ("convert" if pooled else "copy"), name
        assert fates[name]["before"] == [rows, *rest], name
        assert fates[name]["after"] == [rows // group if pooled else rows, *rest], name


@each_recipe
def test_inspect_offers_the_conversion_at_this_size(path: Path, hollow: dict[str, Path]) -> None:
    recipe = load_recipe(path)
    model, target = PUBLISHED[recipe.source], kv_heads_wanted(path)
    command = f"kvpatch gqa --kv-heads {target}" if target > 1 else "kvpatch mqa"
    now, *rows = run("inspect", str(hollow[recipe.source]))["kv"]
    (row,) = [row for row in rows if row["command"] == command]
    heads = model.config["num_key_value_heads"]
    assert now["bytes_per_token"] == expected_token_bytes(model, heads)
    assert row["bytes_per_token"] == expected_token_bytes(model, target)


@each_recipe
def test_header_comment_quotes_the_dry_run(path: Path, hollow: dict[str, Path]) -> None:
    plan = dry_run(path, hollow)
    heads, token, size = plan["kv_heads"], plan["kv_bytes_per_token"], plan["bytes"]
    quoted = [
        line for line in header_comment(path) if re.match("class|KV cache|weights|peak", line)
    ]
    assert quoted == [
        f"class      {plan['class']}, {heads[0]} -> {heads[1]} KV heads",
        f"KV cache   {token[0]:,} -> {token[1]:,} bytes per token",
        f"weights    {size[0]:,} -> {size[1]:,} bytes",
        f"peak RAM   {plan['peak_ram'] / 1e6:.0f} MB, predicted",
    ]


@each_recipe
def test_header_comment_gives_the_command_and_its_limits(path: Path) -> None:
    header = header_comment(path)
    assert f"kvpatch run recipes/{path.name}" in header
    assert any(line.startswith("Not measured: how good this model is") for line in header)


def test_readme_lists_every_recipe(hollow: dict[str, Path]) -> None:
    listed = [line for line in README.splitlines() if ".yaml)" in line]
    assert listed == [_readme_row(path, dry_run(path, hollow)) for path in RECIPES]


def _readme_row(path: Path, plan: dict[str, Any]) -> str:
    heads, token = plan["kv_heads"], plan["kv_bytes_per_token"]
    cells = (
        f"[`{path.stem}`]({path.name})",
        f"`{load_recipe(path).source}`",
        f"`{plan['class']}`",
        f"{heads[0]} -> {heads[1]}",
        f"{token[0]:,} -> {token[1]:,}",
    )
    return f"| {' | '.join(cells)} |"


def readme_keys() -> dict[str, str]:
    """Key and default of every row of the README's last table."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README.partition("## Keys")[2], re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a key stands there twice"
    return dict(rows)


_MODELS: tuple[type[Recipe], ...] = (GqaRecipe, MqaRecipe, ClaRecipe, MlaRecipe)
_KEYS = sorted({key for model in _MODELS for key in model.model_fields})


def test_readme_explains_every_key() -> None:
    assert sorted(readme_keys()) == _KEYS


@pytest.mark.parametrize("key", _KEYS)
def test_readme_says_which_methods_have_a_key(key: str) -> None:
    having = [model for model in _MODELS if key in model.model_fields]
    names = [f"`{model.model_fields['method'].default}`" for model in having]
    methods = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    (row,) = re.findall(rf"^\| `{key}` \|.*$", README.partition("## Keys")[2], re.MULTILINE)
    said = re.findall(r"Only for ([^.]+)\.", row)
    assert said == ([] if len(having) == len(_MODELS) else [methods])


@pytest.mark.parametrize("key", _KEYS)
def test_readme_gives_the_default(key: str) -> None:
    defaults = {_default(key, model) for model in _MODELS if key in model.model_fields}
    assert readme_keys()[key] in defaults


def _default(key: str, model: type[Recipe]) -> str:
    field = model.model_fields[key]
    if field.is_required() or key == "method":  # without its method a recipe is refused
        return "required"
    if field.default is None:
        return "the source's" if key == "dtype" else "none"
    value = field.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def test_method_is_required(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("source: ./model\nkv_heads: 2\n")
    with pytest.raises(UsageError, match="method must be one of"):
        load_recipe(recipe)
