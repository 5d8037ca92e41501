"""Converted models on disk: saved, loaded by the package, and loaded without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from kvpatch.models import FAMILIES, auto_map, family_of, source_files
from tests.families import tiny
from tests.families.stock import random_ids
from tests.helpers import assert_equal
from tests.kvpatch.stacks import CLASSIC, converted, pairs, stock_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a model with fewer heads and shared layers, in float32, and the model."""

    @cache
    def save(name: str) -> tuple[Path, Any]:
        weights = converted(name, stock_model(name), 2, pairs(name)).float()
        weights.config.dtype = torch.float32
        # made anew, with the rotary frequencies that a model in float32 has
        model = type(weights)._from_config(weights.config, attn_implementation="eager").eval()
        model.load_state_dict(weights.state_dict())
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder, model

    return save


@pytest.mark.parametrize("name", CLASSIC)
def test_saving_and_loading_changes_nothing(saved: Any, name: str) -> None:
    folder, model = saved(name)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    assert loaded.config.kv_source_layers == pairs(name)
    assert loaded.config.num_key_value_heads == 2
    ids = random_ids(model)
    with torch.no_grad():
        assert_equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", CLASSIC)
def test_the_folder_holds_stock_names_but_for_the_attention(
    saved: Any, tmp_path: Path, name: str
) -> None:
    folder, _ = saved(name)
    names = set(load_file(folder / "model.safetensors"))
    stock_model(name).float().save_pretrained(tmp_path)
    stock = set(load_file(tmp_path / "model.safetensors"))
    family = family_of(tiny.family(name))
    prefixes = [family.attention_prefix.format(layer=layer) for layer in range(4)]
    assert all(any(key.startswith(prefix) for key in names) for prefix in prefixes)
    assert _outside(names, prefixes) == _outside(stock, prefixes)
    for prefix, layer, source in zip(prefixes, range(4), pairs(name), strict=True):
        own = {key.removeprefix(prefix) for key in names if key.startswith(prefix)}
        projections = {key.split(".")[0] for key in own if "norm" not in key}
        reader = source != layer
        assert projections == {"q_proj", "o_proj"} | (set() if reader else {"k_proj", "v_proj"})
        assert not (reader and any(key.startswith("k_") for key in own))


def _outside(names: set[str], prefixes: list[str]) -> set[str]:
    return {name for name in names if not name.startswith(tuple(prefixes))}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_resaved_folder_carries_its_code(saved: Any, tmp_path: Path, name: str) -> None:
    folder, _ = saved(name)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    family = family_of(tiny.family(name))
    assert config["auto_map"] == auto_map(name)
    assert config["model_type"] == family.converted_type
    assert config["architectures"] == [family.class_names["AutoModelForCausalLM"]]
    for file in source_files():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_base_model_loads_alone(saved: Any) -> None:
    folder, model = saved("stablelm")
    base, report = AutoModel.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert report["unexpected_keys"] == {"lm_head.weight"}
    assert not report["missing_keys"]
    ids = random_ids(model)
    with torch.no_grad():
        hidden = base(ids).last_hidden_state
        assert_equal(hidden, model(ids, output_hidden_states=True).hidden_states[-1])


# loads folders, and writes logits and the model again
_SCRIPT = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)
warnings.simplefilter("ignore", FutureWarning)
{prepare}
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
out = Path(sys.argv[1])
ids = torch.arange(3, 9)[None]
for folder in map(Path, sys.argv[2:]):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **{how}
    )
    assert not any(report.values()), report
    model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False)
    model.save_pretrained(out / folder.name)
    torch.save(model(ids).logits.detach(), out / folder.name / "logits.pt")
{check}
"""


def _run(prepare: str, check: str, how: dict[str, Any], out: Path, *folders: Path) -> None:
    out.mkdir()
    script = _SCRIPT.replace("{prepare}", prepare).replace("{check}", check)
    result = subprocess.run(
        [sys.executable, "-c", script.replace("{how}", repr(how)), out, *folders],
        capture_output=True,
        text=True,
        check=False,
        cwd=out,
        env={**os.environ, "HF_MODULES_CACHE": str(out / "modules")},
    )
    assert result.returncode == 0, result.stderr[-3000:]


# an editable install of kvpatch is a finder on the meta path
_WITHOUT = """
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if not (Path(entry) / "kvpatch").is_dir()]
"""


def test_trust_remote_code_alone_loads_a_folder(saved: Any, tmp_path: Path) -> None:
    names = ["llama", "gpt_neox", "bloom"]
    folders = [saved(name)[0] for name in names]
    once, twice = tmp_path / "once", tmp_path / "twice"
    how = {"trust_remote_code": True}
    check = """
assert type(model).__module__.startswith("transformers_modules.")
import importlib.util
assert importlib.util.find_spec("kvpatch") is None
"""
    _run(_WITHOUT, check, how, once, *folders)
    again = [once / folder.name for folder in folders]
    _run(_WITHOUT, check, how, twice, *again)
    for name, folder in zip(names, again, strict=True):
        _, model = saved(name)
        with torch.no_grad():
            expected = model(torch.arange(3, 9)[None]).logits
        assert_equal(torch.load(folder / "logits.pt"), expected)
        assert_equal(torch.load(twice / folder.name / "logits.pt"), expected)


@pytest.mark.parametrize(
    "prepare",
    [
        "import kvpatch\nassert not {'torch', 'transformers'} & set(sys.modules)",
        "from transformers import AutoConfig\nimport kvpatch",
    ],
    ids=["before transformers", "after transformers"],
)
def test_import_kvpatch_loads_a_folder_without_remote_code(
    saved: Any, tmp_path: Path, prepare: str
) -> None:
    folder, model = saved("llama")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((bare / "config.json").read_text())
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    check = """
assert type(model).__module__ == "kvpatch.models.modeling_kvpatch"
assert "transformers.models.phi.modeling_phi" not in sys.modules
"""
    _run(prepare, check, {}, tmp_path / "out", bare)
    with torch.no_grad():
        expected = model(torch.arange(3, 9)[None]).logits
    assert_equal(torch.load(tmp_path / "out" / "bare" / "logits.pt"), expected)


def test_shipped_files_import_one_another_torch_and_transformers_alone() -> None:
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    shipped = {str(file) for file in source_files()}
    modeling = next(file for file in shipped if file.endswith("modeling_kvpatch.py"))
    assert {modeling, *get_relative_import_files(modeling)} == shipped
    standard = set(sys.stdlib_module_names)
    for file in shipped:
        assert set(get_imports(file)) - standard <= {"torch", "transformers"}
        assert set(get_relative_import_files(file)) <= shipped


def test_every_class_is_an_attribute_of_its_module() -> None:
    from kvpatch.models import configuration_kvpatch, modeling_kvpatch

    for module in (configuration_kvpatch, modeling_kvpatch):
        with pytest.raises(AttributeError, match="KvpatchNothing"):
            _ = module.KvpatchNothing
    for model_type, family in FAMILIES.items():
        for auto, where in family.auto_map.items():
            module, name = where.split(".")
            home = {"configuration_kvpatch": configuration_kvpatch}.get(module, modeling_kvpatch)
            found = getattr(home, name)
            assert (found.__name__, found.__module__) == (name, home.__name__)
            assert found is getattr(home, name)
            if auto != "AutoConfig":
                assert found.config_class.model_type == f"kvpatch_{model_type}"
