"""``kvpatch verify`` finds what is wrong with a result, and passes what is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from convert.cli import app
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.verify import _Runner, verify_checkpoint
from kvpatch.errors import VerificationError

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def converted(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "gqa"
    recipe = {"method": "gqa", "kv_heads": 2, "source": str(demo_model), "output": str(out)}
    return convert(make_recipe(recipe))


@pytest.fixture
def result(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "gqa"))


def failures(folder: Path, source: Path | None = None, *, run: bool = True) -> set[str]:
    checks = verify_checkpoint(folder, source, run=run)
    return {check.name for check in checks if check.status == "failed"}


def test_a_sound_result_passes_every_check(converted: Path, demo_model: Path) -> None:
    checks = verify_checkpoint(converted, demo_model)
    assert [check.status for check in checks] == ["ok"] * 9, checks


def _flip_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _change(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = torch.nan
    return tensor


def _drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _swap_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = [token for token, index in vocabulary.items() if 40 < index < 120][:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    for token in ("b", "o", "x"):  # letters of the probe text, so that its ids do change
        other = next(t for t in vocabulary if t not in "box" and vocabulary[t] > 20)
        vocabulary[token], vocabulary[other] = vocabulary[other], vocabulary[token]
    (folder / "tokenizer.json").write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "flipped bit": (_flip_bit, {"hashes", "untouched tensors"}),
    "NaN": (lambda f: _change(f, K_PROJ, _nan), {"hashes", "finite", "cached decoding"}),
    "lost tensor": (lambda f: _drop(f, "model.norm.weight"), {"hashes", "shapes", "loading"}),
    "lost attention tensor": (lambda f: _drop(f, K_PROJ), {"hashes", "shapes", "loading"}),
    "wrong head count": (
        lambda f: _edit_config(f, num_key_value_heads=4),
        {"hashes", "shapes", "loading"},
    ),
    "missing file": (lambda f: (f / "generation_config.json").unlink(), {"hashes"}),
    "other tokens": (_swap_tokens, {"hashes", "tokens"}),
    "stray weights": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), {"hashes"}),
    "changed source tensor": (
        lambda f: _change(f, "model.layers.0.mlp.up_proj.weight", lambda t: t * 2),
        {"hashes", "untouched tensors"},
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str, result: Path, demo_model: Path) -> None:
    damage, expected = DAMAGE[name]
    damage(result)
    assert failures(result, demo_model) == expected


def test_another_source_is_noticed(converted: Path, demo_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo_model, tmp_path / "other"))
    _change(other, K_PROJ, lambda tensor: tensor + 1)
    assert failures(converted, other, run=False) == {"source"}


def test_a_foreign_model_is_checked_without_hashes(demo_model: Path) -> None:
    checks = {check.name: check.status for check in verify_checkpoint(demo_model)}
    assert checks.pop("hashes") == "skipped"
    assert set(checks.values()) == {"ok"}


def test_exit_code_and_json(result: Path) -> None:
    runner = CliRunner()
    sound = runner.invoke(app, ["verify", str(result), "--files-only", "--json", "-q"])
    assert sound.exit_code == 0
    assert json.loads(sound.stdout)["ok"] is True
    _flip_bit(result)
    damaged = runner.invoke(app, ["verify", str(result), "--files-only", "--json", "-q"])
    assert damaged.exit_code == 6
    assert json.loads(damaged.stdout)["ok"] is False
    assert runner.invoke(app, ["verify", str(result / "absent")]).exit_code == 3


def test_rounding_that_a_model_amplifies_is_no_fault(
    result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no tolerance at all, what rounding of the embeddings changes still is allowed."""
    monkeypatch.setattr("convert.verify._CACHE_TOLERANCE", 0.0)
    runner = _Runner(result)
    runner.loading()
    assert "24 tokens" in runner.cached()

    def off(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits * 1.003 if logits.shape[1] == 1 else logits

    runner._model.lm_head.register_forward_hook(off)
    with pytest.raises(VerificationError, match="logits with a cache differ by 3"):
        runner.cached()
