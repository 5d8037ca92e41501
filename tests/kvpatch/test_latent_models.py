"""Latent models trained, adapted, placed, compiled, saved and loaded; configs that are refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from kvpatch.models import FAMILIES, latent_kvpatch, source_files
from kvpatch.models.configuration_kvpatch import config_class
from kvpatch.models.modeling_kvpatch import causal_lm_class
from tests.families import tiny
from tests.families.stock import Float64, full_logits, random_ids
from tests.helpers import assert_close, assert_equal
from tests.kvpatch.latents import EACH, NORMED, SHIFTED, latent_model
from tests.kvpatch.stacks import MODELS, pairs, stock_model

# a fresh model by name, with layers that share latents
Latents = Callable[[str], Any]

_PROJECTIONS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    @cache
    def made(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name.replace(":", "-"))
        return latent_model(name, stock_model(name), folder, pairs(name))

    return lambda name: copy.deepcopy(made(name))


@pytest.fixture(scope="module")
def saved(latent: Latents, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Folder of a model in float32, and the model."""

    @cache
    def save(name: str) -> tuple[Path, Any]:
        weights = latent(name).float()
        weights.config.dtype = torch.float32
        # made anew, with the rotary frequencies that a model in float32 has
        model = type(weights)._from_config(weights.config, attn_implementation="eager").eval()
        model.load_state_dict(weights.state_dict())
        folder = tmp_path_factory.mktemp(name.replace(":", "-"))
        model.save_pretrained(folder)
        return folder, model

    return save


def _gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def _without_dropout(model: Any) -> Any:
    for module in model.modules():
        for key in ("attention_dropout", "output_dropout", "hidden_dropout", "dropout", "p"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return model.train()


@torch.no_grad()
def _decoded(model: Any, ids: Tensor) -> Tensor:
    past = DynamicCache()
    return torch.cat([model(part, past_key_values=past).logits for part in ids.split(1, 1)], 1)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("name", ["llama", "cohere", "gptj", "bloom", "gpt2"])
def test_gradients_outside_the_attention_are_those_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, absorbed: bool
) -> None:
    stock = stock_model(name)
    model = latent_model(name, stock, tmp_path)
    monkeypatch.setattr(latent_kvpatch, "prefers_absorbed", lambda *_, **__: absorbed)
    ids = random_ids(stock)
    with Float64():
        want, have = _gradients(stock, ids), _gradients(model, ids)
    same = {
        key for key in want.keys() & have.keys() if "attn" not in key and "attention" not in key
    }
    assert any("mlp" in key for key in same)
    for key in same:
        assert_close(have[key], want[key], atol=1e-10)


@pytest.mark.parametrize("name", EACH)
def test_gradients_are_the_same_with_checkpointing(latent: Latents, name: str) -> None:
    model = _without_dropout(latent(name).float())
    ids = random_ids(model)
    plain = _gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for key, gradient in _gradients(model, ids).items():
        assert_equal(gradient, plain[key])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_adapters_take_part_in_decoding(latent: Latents, name: str) -> None:
    """A projection with an adapter is more than its weight, so that the absorbed form is out."""
    model = _without_dropout(latent(name).float())
    ids = random_ids(model)
    before = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=_PROJECTIONS))
    assert_equal(adapted(ids).logits.detach(), before)
    adapted(ids, labels=ids).loss.backward()
    trained = {key for key, weight in adapted.named_parameters() if weight.grad is not None}
    readers = sum(source != layer for layer, source in enumerate(pairs(name)))
    assert len(trained) == 2 * (4 * 4 - readers)
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        adapted.eval()
        after = adapted(ids, use_cache=False).logits
    assert float((after - before).abs().max()) > 1e-3
    assert_close(_decoded(adapted, ids), after, atol=1e-5)
    merged = adapted.merge_and_unload()
    assert_close(_decoded(merged, ids), after, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_layers_placed_by_accelerate_compute_the_same(latent: Latents, name: str) -> None:
    model = latent(name).float()
    ids = random_ids(model)
    want = _decoded(model, ids)
    placed = dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    assert_close(_decoded(placed, ids), want, atol=1e-5)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert_close(_decoded(offloaded, ids), want, atol=1e-5)


@pytest.mark.parametrize("absorbed", [False, True])
def test_compiled_forward_has_no_graph_breaks(
    latent: Latents, monkeypatch: pytest.MonkeyPatch, absorbed: bool
) -> None:
    monkeypatch.setattr(latent_kvpatch, "prefers_absorbed", lambda *_, **__: absorbed)
    model = latent("llama").float()
    ids = random_ids(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_attention_weights_come_out_of_both_forms(
    latent: Latents, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = latent(name)
    ids = random_ids(model)
    weights = []
    for absorbed in (False, True):
        monkeypatch.setattr(latent_kvpatch, "prefers_absorbed", lambda *_, a=absorbed, **__: a)
        with torch.no_grad(), Float64():
            weights.append(model(ids, output_attentions=True).attentions)
    assert [tuple(one.shape) for one in weights[0]] == [(2, 4, 9, 9)] * 4
    for one, other in zip(*weights, strict=True):
        assert_close(one, other, atol=1e-10)
        assert not bool(one.triu(1).any())


def test_half_precision_is_as_good_absorbed(
    latent: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by the mean error against float64, which differs by chance alone."""
    exact = latent("llama")
    ids = random_ids(exact, 12)
    truth = full_logits(exact, ids)
    model, errors = latent("llama").bfloat16(), {}
    for absorbed in (False, True):
        monkeypatch.setattr(latent_kvpatch, "prefers_absorbed", lambda *_, a=absorbed, **__: a)
        errors[absorbed] = float((_decoded(model, ids).double() - truth).abs().mean())
    assert errors[True] < 1.5 * errors[False]


@pytest.mark.parametrize("name", EACH)
def test_saving_and_loading_changes_nothing(saved: Callable[[str], Any], name: str) -> None:
    folder, model = saved(name)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    for key in ("kv_lora_rank", "kv_rope_planes", "kv_source_layers", "v_head_dim"):
        assert getattr(loaded.config, key) == getattr(model.config, key)
    ids = random_ids(model)
    with torch.no_grad():
        assert_equal(loaded(ids).logits, model(ids).logits)
    reader = model.family.attention_prefix.format(layer=pairs(name).index(0, 1))
    stored = load_file(folder / "model.safetensors")
    names = {key.removeprefix(reader) for key in stored if key.startswith(reader)}
    parts = {"q_proj.weight", "q_proj.bias", "kv_b_proj.weight", "o_proj.weight", "o_proj.bias"}
    if name in NORMED:
        parts |= {"q_rope.weight", *(key for key in names if key.startswith(model.family.q_norm))}
        assert len(parts) > 6
    assert names == parts


_SCRIPT = """
import importlib.util, sys
from pathlib import Path
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if not (Path(entry) / "kvpatch").is_dir()]
assert importlib.util.find_spec("kvpatch") is None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.arange(3, 9)[None]
for folder in map(Path, sys.argv[1:]):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", trust_remote_code=True
    )
    assert not any(report.values()), report
    assert type(model).__module__.startswith("transformers_modules.")
    model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder.name)
    torch.save(model(ids).logits.detach(), folder.name + "/logits.pt")
"""


def test_trust_remote_code_alone_loads_a_folder(
    saved: Callable[[str], Any], tmp_path: Path
) -> None:
    names = ["llama", "gptj", "bloom", "qwen3", "stablelm:norm-bias"]
    folders = [saved(name)[0] for name in names]
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *folders],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name, folder in zip(names, folders, strict=True):
        again = tmp_path / folder.name
        with torch.no_grad():
            want = saved(name)[1](torch.arange(3, 9)[None]).logits
        assert_equal(torch.load(again / "logits.pt"), want)
        assert {file.name for file in again.glob("*.py")} == {file.name for file in source_files()}
        assert json.loads((again / "config.json").read_text())["kv_source_layers"] == pairs(name)


_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
_LATENT = {
    "kv_lora_rank": [8, 8],
    "kv_rope_planes": [[0, 1], [0, 1]],
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_lora_rank": None}, "belong together, but there is no kv_lora_rank"),
        ({"v_head_dim": None}, "belong together, but there is no v_head_dim"),
        ({"kv_lora_rank": [8]}, "kv_lora_rank has 1 entries, but there are 2 layers"),
        ({"kv_rope_planes": [[0]] * 3}, "kv_rope_planes has 3 entries"),
        ({"kv_lora_rank": [8, 0]}, "kv_lora_rank: layer 1 has 0"),
        ({"kv_lora_rank": [8, True]}, "kv_lora_rank: layer 1 has True"),
        ({"kv_rope_planes": [[0], [8]]}, "layer 1 has 8, but a head has the planes 0 to 7"),
        ({"kv_rope_planes": [[-1], [0]]}, "layer 0 has -1"),
        ({"kv_rope_planes": [[0], []], "qk_nope_head_dim": 0}, "layer 1 has none"),
        ({"qk_nope_head_dim": -1}, "qk_nope_head_dim is -1: give a number from 0"),
        ({"v_head_dim": 0}, "v_head_dim is 0: give a number from 1"),
        ({"kv_source_layers": [0, 0], "kv_lora_rank": [8, 9]}, "their kv_lora_rank differ"),
        (
            {"kv_source_layers": [0, 0], "kv_rope_planes": [[0, 1], [1, 0]]},
            "their kv_rope_planes differ",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(FAMILIES["llama"])(**{**_SIZES, **_LATENT, **settings})


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("gpt2", {}, "layer 0 has .0, 1., but this model has no rotary positions"),
        ("falcon", {"alibi": True}, "this model has no rotary positions"),
        ("gptj", {"rotary_dim": 2}, "layer 0 has 1, but a head has the planes 0 to 0"),
        ("olmo", {"clip_qkv": 0.5}, "clip_qkv clamps keys and values"),
        ("mpt", {"attn_config": {"clip_qkv": 0.5}}, "attn_config.clip_qkv clamps"),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    model_type: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(FAMILIES[model_type])(**{**_SIZES, **_LATENT, **settings})


@pytest.mark.parametrize(
    ("name", "message"),
    [(name, f"{tiny.family(name)}: this model norms its keys and adds a bias") for name in SHIFTED]
    + [("qwen3", "qk_nope_head_dim is 4, but this model norms queries of 16 dims: give 16")],
)
def test_norms_that_latents_do_not_hold_are_refused(name: str, message: str) -> None:
    family = FAMILIES[tiny.family(name)]
    ranks, planes = [8] * 4, [[0, 1]] * 4
    settings = {**MODELS[name], **_LATENT, "kv_lora_rank": ranks, "kv_rope_planes": planes}
    config = config_class(family)(**settings)
    with pytest.raises(ValueError, match=message):
        causal_lm_class(family)(config)


def test_planes_beyond_a_partial_table_are_refused() -> None:
    settings = {**MODELS["phi"], **_LATENT, "kv_lora_rank": [8] * 4}
    planes = [[0], [1], [2], [4]]
    config = config_class(FAMILIES["phi"])(**{**settings, "kv_rope_planes": planes})
    with pytest.raises(ValueError, match="layer 3 has 4, but the rotary table of this model has"):
        causal_lm_class(FAMILIES["phi"])(config)


def test_ordinary_models_have_no_latent_head() -> None:
    assert config_class(FAMILIES["llama"])(**_SIZES).qk_head_dim is None
    assert config_class(FAMILIES["llama"])(**_SIZES, **_LATENT).qk_head_dim == 8
