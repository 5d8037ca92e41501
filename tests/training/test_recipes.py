"""The recipes that train, and the accelerate config beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from convert.checkpoint.manifest import read_manifest
from convert.recipe_file import load_recipe
from convert.training.recipe import UptrainRecipe, parse_count
from kvpatch.errors import UsageError
from tests.faults.running import cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "uptraining"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if "accelerate" not in path.name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, UptrainRecipe)
    assert f"recipes/uptraining/{path.name}" in path.read_text()


def test_the_small_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, out = tmp_path / "mqa", tmp_path / "out"
    monkeypatch.chdir(ROOT)
    assert cli(["mqa", "convert/assets/demo-model", str(start), "-q"]).code == 0
    keys = (f"source={start}", f"output={out}", "tokens=2048")
    flags = [word for key in keys for word in ("--set", key)]
    run = cli(["run", str(FOLDER / "demo-cpu.yaml"), "-q", *flags])
    assert run.code == 0, run.err
    curve = read_manifest(out)["trainings"][0]["curve"]
    assert curve[-1]["eval_kl"] < curve[0]["eval_kl"]


def test_the_accelerate_config_is_one() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = FOLDER / "fsdp2-8gpu-accelerate.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")
    assert yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_version"] == 2


def test_a_misspelt_key_names_its_line_and_its_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("method: uptrain\nsource: a\ndata: b\ntokens: 1k\nbatches: 3\n")
    with pytest.raises(UsageError, match=r"wrong.yaml:5: unknown key 'batches'.*'batch'"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "count"), [("300k", 300_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), (7, 7)]
)
def test_counts(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "-3", "3x", "0", True, "1e3"])
def test_what_is_no_count(text: object) -> None:
    with pytest.raises(ValueError, match="not a number of tokens"):
        parse_count(text)
