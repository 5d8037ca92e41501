"""What a conversion says of its result is true of the result."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from convert.checkpoint.manifest import read_manifest
from convert.pipeline import convert, obstacles, prepare
from convert.recipe import make_recipe
from convert.verify import cache_bytes, verify_checkpoint
from kvpatch.errors import UsageError


def _recipe(source: Path, out: Path, **keys: object) -> dict[str, object]:
    return {"method": "mqa", "source": str(source), "output": str(out), **keys}


@torch.no_grad()
def _held_per_token(folder: Path) -> int:
    """Bytes a token takes in the cache of the model as transformers loads it by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 8, dtype=torch.long), past_key_values=cache)
    return cache_bytes(cache) // 8


@pytest.mark.parametrize("key", ["dtype", None], ids=["stated", "not_stated"])
@pytest.mark.parametrize("dtype", [None, "float32"], ids=["own", "cast"])
def test_cache_bytes_in_the_manifest_are_held(
    demo_model: Path, tmp_path: Path, key: str | None, dtype: str | None
) -> None:
    source = Path(shutil.copytree(demo_model, tmp_path / "source"))
    if key is None:
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (source / "config.json").write_text(json.dumps(config))
    keys = {} if dtype is None else {"dtype": dtype}
    out = convert(make_recipe(_recipe(source, tmp_path / "out", **keys)))
    stated = read_manifest(out)["kv_cache"]["bytes_per_token"]
    assert stated == [_held_per_token(source), _held_per_token(out)]


def test_a_cast_is_stated_and_nothing_is_called_untouched(demo_model: Path, tmp_path: Path) -> None:
    out = convert(make_recipe(_recipe(demo_model, tmp_path / "out", dtype="float32")))
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}
    card = (out / "README.md").read_text()
    assert "cast to float32" in card
    assert "bit for bit" not in card
    checks = {c.name: c.status for c in verify_checkpoint(out, demo_model, run=False)}
    assert checks.pop("untouched tensors") == "skipped"
    assert set(checks.values()) == {"ok"}


def test_a_source_without_tokenizer_verifies(demo_model: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("tokenizer*")
    source = Path(shutil.copytree(demo_model, tmp_path / "source", ignore=ignored))
    out = convert(make_recipe(_recipe(source, tmp_path / "out")))
    checks = {c.name: c.status for c in verify_checkpoint(out, source, run=False)}
    assert checks.pop("tokens") == "skipped"
    assert set(checks.values()) == {"ok"}


def test_a_dry_run_tells_what_would_stop_the_run(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    recipe = make_recipe(_recipe(demo_model, tmp_path / "out", max_ram="1MB"))
    with prepare(recipe) as prepared:
        found = obstacles(prepared)
    assert len(found) == 2
    assert "--max-ram" in found[0]
    assert "exists" in found[1]


def test_the_current_folder_is_no_output(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path.parent):
        with pytest.raises(UsageError, match="current folder"):
            convert(make_recipe(_recipe(demo_model, out)))


def test_a_file_named_like_the_output_and_lock_is_left_alone(
    demo_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "poetry.lock").write_text("precious")
    convert(make_recipe(_recipe(demo_model, tmp_path / "poetry")))
    assert (tmp_path / "poetry.lock").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poetry", "poetry.lock"]


@pytest.mark.parametrize(("samples", "warned"), [(31, True), (32, False)])
def test_few_calibration_tokens_are_counted(demo_model: Path, samples: int, warned: bool) -> None:
    """The demo model has 128 input dims: 8 tokens for each are 32 windows of 32."""
    values = {"method": "gqa", "kv_heads": 4, "merge": "svd", "source": str(demo_model)}
    text = resources.files("convert").joinpath("assets/demo-calibration.txt")
    calibration = {"calibration": str(text), "samples": samples, "context": 32}
    with prepare(make_recipe({**values, **calibration})) as prepared:
        few = [warning for warning in prepared.warnings if "are few" in warning]
    assert bool(few) == warned
    if warned:
        assert few[0].startswith("992 calibration tokens are few for 128 input dims")
        assert "with less than 1,024" in few[0]
        assert few[0].endswith("give --samples 32 or --refit none")
