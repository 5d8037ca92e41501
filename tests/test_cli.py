"""The command line as a user meets it: results on stdout, messages on stderr, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from convert.cli import app

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_gqa_prints_the_output_path_and_nothing_else(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("gqa", demo_model, out, "--kv-heads", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert "kvpatch verify" in result.stderr
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 4


def test_mqa_is_gqa_with_one_head(demo_model: Path, tmp_path: Path) -> None:
    assert run("mqa", demo_model, tmp_path / "mqa", "-q").exit_code == 0
    assert run("gqa", demo_model, tmp_path / "gqa", "--kv-heads", 1, "-q").exit_code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mqa", "gqa")]
    assert weights[0] == weights[1]


def test_quiet_leaves_stderr_empty(demo_model: Path, tmp_path: Path) -> None:
    result = run("mqa", demo_model, tmp_path / "out", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""


def test_json_of_a_conversion(demo_model: Path, tmp_path: Path) -> None:
    result = run("mqa", demo_model, tmp_path / "out", "--json", "-q")
    assert json.loads(result.stdout) == {"output": str(tmp_path / "out")}


def test_dry_run_names_every_tensor_and_writes_nothing(demo_model: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    result = run("gqa", demo_model, tmp_path / "o", "--kv-heads", 2, "--dry-run", "--json", "-q")
    plan = json.loads(result.stdout)
    with safe_open(demo_model / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {tensor["name"] for tensor in plan["tensors"]} == names
    converted = {t["name"] for t in plan["tensors"] if t["action"] == "convert"}
    assert converted == {name for name in names if "k_proj" in name or "v_proj" in name}
    assert plan["kv_bytes_per_token"][0] == 4 * plan["kv_bytes_per_token"][1]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_for_people_shows_bytes_and_memory(demo_model: Path, tmp_path: Path) -> None:
    result = run("mqa", demo_model, tmp_path / "out", "--dry-run")
    assert "model.layers.*.self_attn.k_proj.weight" in result.stdout
    assert "peak memory" in result.stdout
    assert "KV cache per token" in result.stdout


def test_run_takes_a_recipe_and_overrides(demo_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: gqa\nsource: {demo_model}\noutput: {tmp_path / 'a'}\nkv_heads: 4\n")
    out = tmp_path / "b"
    result = run("run", recipe, "--set", f"output={out}", "--set", "kv_heads=2", "-q")
    assert result.exit_code == 0, result.stderr
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 2


def test_flags_and_recipe_give_the_same_bytes(demo_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: gqa\nsource: {demo_model}\noutput: {tmp_path / 'a'}\nkv_heads: 4\n")
    assert run("run", recipe, "-q").exit_code == 0
    assert run("gqa", demo_model, tmp_path / "b", "--kv-heads", 4, "-q").exit_code == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_inspect_of_a_folder(demo_model: Path) -> None:
    result = run("inspect", demo_model, "--context", 100, "--batch", 3, "--json")
    data = json.loads(result.stdout)
    assert data["model"]["family"] == "llama"
    assert data["model"]["conversions"]["gqa"] == {
        "kv_heads": [1, 2, 4],
        "target": "LlamaForCausalLM",
    }
    assert data["kv"][0]["bytes"] == 100 * 3 * data["kv"][0]["bytes_per_token"]
    designs = " ".join(row["design"] for row in data["kv"])
    assert all(name in designs for name in ("MHA", "GQA", "MQA", "CLA2", "MLA", "window"))


def test_inspect_of_bare_dimensions_reproduces_the_published_table() -> None:
    result = run("inspect", "--layers", 61, "--heads", 128, "--head-dim", 128, "--context", 100_000)
    assert result.exit_code == 0, result.stderr
    for size in ("4.00 MB", "400 GB", "500 kB", "31.2 kB", "70.3 kB"):
        assert size in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "--layers", "2"],
        ["inspect", ".", "--layers", "2"],
        ["gqa", "src", "out"],
        ["gqa", "src", "out", "--kv-heads", "two"],
        ["gqa", "src", "out", "--kv-heads", "2", "--merge", "median"],
        ["gqa", "src", "out", "--kv-heads", "2", "--dtype", "int4"],
        ["gqa", "src", "out", "--kv-heads", "2", "--max-shard-size", "many"],
        ["gqa", "src", "out", "--kv-heads", "0"],
        ["melt", "src", "out"],
        ["run", "absent.yaml"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_unexpected_errors_exit_with_1_and_ask_for_a_report(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("convert.preparing.make_plan", broken)
    result = run("mqa", demo_model, tmp_path / "out")
    assert result.exit_code == 1
    assert "bug in kvpatch: ZeroDivisionError: planted" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("mqa", demo_model, tmp_path / "out", "--debug").stderr


def test_python_m_convert_is_kvpatch() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "convert", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.startswith("kvpatch ")
