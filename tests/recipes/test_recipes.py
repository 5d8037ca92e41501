"""Every recipe says what it does: the dry run on the true shapes of its model agrees with it."""

from __future__ import annotations

import math
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest

from convert.recipe_file import load_recipe
from kvpatch.errors import UsageError
from tests.recipes.dry_runs import FOLDER, RECIPES, Hollow, dry_run, held, run
from tests.recipes.shapes import ITEM_BYTES, PUBLISHED, PublishedModel

README = (FOLDER / "README.md").read_text()
POOLED = [path for path in RECIPES if load_recipe(path).merge == "mean"]

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
each_pooled = pytest.mark.parametrize("path", POOLED, ids=lambda path: path.stem)


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
    """The published size, less buffers, and rows of k_proj and v_proj that pooling takes away."""
    config = model.config
    biased = config["model_type"] == "qwen2"  # the one family here with a bias on k and v
    rows = (config["num_key_value_heads"] - kv_heads) * model.head_dim
    removed = 2 * config["num_hidden_layers"] * rows * (config["hidden_size"] + biased)
    removed += sum(math.prod(shape) for shape in model.buffers.values())
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
def test_hollow_checkpoint_takes_no_disk(repository: str, hollow: Hollow) -> None:
    stats = [file.stat() for file in hollow[repository].iterdir()]
    assert sum(stat.st_size for stat in stats) > 3 * 10**9
    assert sum(512 * stat.st_blocks for stat in stats) < 10**6


@each_recipe
def test_recipe_loads_and_names_its_output_after_itself(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.source in PUBLISHED
    assert recipe.output == f"./{path.stem}"


@each_pooled
def test_pooling_recipe_is_named_after_its_heads(path: Path) -> None:
    assert load_recipe(path).kv_heads == kv_heads_wanted(path)


@each_recipe
def test_recipe_with_a_misspelt_key_is_refused(path: Path, tmp_path: Path) -> None:
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text().replace("output:", "outptu:"))
    with pytest.raises(UsageError, match=r"unknown key 'outptu'; did you mean 'output'"):
        load_recipe(wrong)


@each_pooled
def test_dry_run_gives_the_right_numbers(path: Path, hollow: Hollow) -> None:
    model = PUBLISHED[load_recipe(path).source]
    before, after = model.config["num_key_value_heads"], kv_heads_wanted(path)
    plan = dry_run(path, hollow)
    assert plan["class"] == model.config["architectures"][0]
    assert plan["kv_heads"] == [before, after]
    assert plan["kv_bytes_per_token"] == [expected_token_bytes(model, n) for n in (before, after)]
    published = ITEM_BYTES[model.dtype] * model.parameters
    assert plan["bytes"] == [published, expected_output_bytes(model, after)]
    assert sum(plan["files"].values()) == expected_output_bytes(model, after)


@each_pooled
def test_dry_run_changes_keys_and_values_only(path: Path, hollow: Hollow) -> None:
    model = PUBLISHED[load_recipe(path).source]
    group = model.config["num_key_value_heads"] // kv_heads_wanted(path)
    fates = {fate["name"]: fate for fate in dry_run(path, hollow)["tensors"]}
    shapes = model.shapes()
    assert set(fates) == set(shapes)
    for name, (rows, *rest) in shapes.items():
        if name in model.buffers:  # which the class computes
            assert (fates[name]["action"], fates[name]["after"]) == ("drop", None)
            continue
        pooled = re.search(r"\.self_attn\.[kv]_proj\.", name) is not None
        assert fates[name]["action"] == ("convert" if pooled else "copy"), name
        assert fates[name]["before"] == [rows, *rest], name
        assert fates[name]["after"] == [rows // group if pooled else rows, *rest], name


@each_pooled
def test_inspect_offers_the_conversion_at_this_size(path: Path, hollow: Hollow) -> None:
    recipe = load_recipe(path)
    model, target = PUBLISHED[recipe.source], kv_heads_wanted(path)
    command = f"kvpatch gqa --kv-heads {target}" if target > 1 else "kvpatch mqa"
    now, *rows = run("inspect", str(hollow[recipe.source]))["kv"]
    (row,) = [row for row in rows if row["command"] == command]
    heads = model.config["num_key_value_heads"]
    assert now["bytes_per_token"] == expected_token_bytes(model, heads)
    assert row["bytes_per_token"] == expected_token_bytes(model, target)


@each_recipe
def test_header_comment_quotes_the_dry_run(path: Path, hollow: Hollow) -> None:
    plan = dry_run(path, hollow)
    token, size, calibrated = plan["kv_bytes_per_token"], plan["bytes"], path not in POOLED
    quoted = [
        line for line in header_comment(path) if re.match("class|KV cache|weights|peak", line)
    ]
    assert quoted == [
        f"class      {plan['class']}, {_held(plan)}",
        f"KV cache   {token[0]:,} -> {token[1]:,} bytes per token",
        f"weights    {size[0]:,} -> {size[1]:,} bytes",
        f"peak RAM   {plan['peak_ram'] / 1e6:.0f} MB, predicted" + " for 2 cores" * calibrated,
    ]


def _held(plan: dict[str, Any]) -> str:
    """What is cached in a layer, before and after, in words."""
    before, after = plan["kv_heads"]
    sources, latent = plan["kv_source_layers"], plan["latent"]
    if latent is not None:
        sizes = f"latent of {latent['rank']}, rotary key of {latent['rope_dims']}"
        return f"{before} KV heads -> {sizes}"
    own = len(set(sources))
    shared = f" in {own} of {len(sources)} layers" if own < len(sources) else ""
    return f"{before} -> {after} KV heads{shared}"


@each_recipe
def test_header_comment_gives_the_command_and_its_limits(path: Path) -> None:
    header = header_comment(path)
    assert f"kvpatch run recipes/{path.name}" in header
    assert any(line.startswith("Not measured: how good this model is") for line in header)


def test_readme_lists_every_recipe(hollow: Hollow) -> None:
    listed = [line for line in README.splitlines() if ".yaml)" in line]
    assert listed == [_readme_row(path, dry_run(path, hollow)) for path in RECIPES]


def _readme_row(path: Path, plan: dict[str, Any]) -> str:
    token = plan["kv_bytes_per_token"]
    cells = (
        f"[`{path.stem}`]({path.name})",
        f"`{load_recipe(path).source}`",
        f"`{plan['class']}`",
        " -> ".join(held(plan)),
        f"{token[0]:,} -> {token[1]:,}",
    )
    return f"| {' | '.join(cells)} |"
