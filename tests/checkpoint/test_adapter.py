"""Adapters merged while a checkpoint is read: against peft, exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.adapters import merged
from convert.checkpoint.adapter import find_adapter
from convert.checkpoint.reader import Checkpoint
from convert.families import FAMILIES
from convert.loading import load_model
from kvpatch.errors import InputModelError
from tests.adapted import EVERY, as_peft, effective_weights, opened, write_adapter, write_base
from tests.helpers import assert_equal

Q = ["q_proj"]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": list(EVERY)}),
    "rslora": ("llama", {"target_modules": list(EVERY), "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": list(EVERY),
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 5},
            "alpha_pattern": {"^model.layers.0.mlp.up_proj": 1, "self_attn.v_proj": 3, "v_proj": 9},
        },
    ),
    "regex": ("llama", {"target_modules": r".*\.0\.(self_attn|mlp)\.(q|k|up)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "layers": ("llama", {"target_modules": list(EVERY), "layers_to_transform": [1]}),
    "excluded": ("llama", {"target_modules": list(EVERY), "exclude_modules": ["mlp.up_proj"]}),
    "bias": ("llama:bias-tied", {"target_modules": Q, "bias": "all"}),
    "bias of targets": ("llama:bias-tied", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "lora bias": ("llama:bias-tied", {"target_modules": Q, "lora_bias": True}),
    "copies": ("llama", {"target_modules": Q, "modules_to_save": ["lm_head", "norm"]}),
    "copied part": ("llama", {"target_modules": Q, "modules_to_save": ["mlp"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", *Q]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "square conv1d": ("gpt2", {"target_modules": [r"attn.c_proj"]}),
    "conv1d, embeddings": ("gpt2:scaled-untied", {"target_modules": ["c_attn", "wte", "lm_head"]}),
    "fused": ("phi3", {"target_modules": "all-linear"}),
    "fused neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"]}),
    "opt": ("opt", {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["embed_positions"]}),
    "experts apart": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
}
# base with one tensor for both embeddings, which peft does not merge rightly: whether it splits
TIED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "neither": ("llama:bias-tied", {"target_modules": Q}, False),
    "input": ("llama:bias-tied", {"target_modules": ["embed_tokens", *Q]}, True),
    "output": ("llama:bias-tied", {"target_modules": ["lm_head", *Q]}, True),
    "both": ("llama:bias-tied", {"target_modules": ["embed_tokens", "lm_head"]}, True),
    "kept": (
        "llama:bias-tied",
        {"target_modules": ["embed_tokens", *Q], "ensure_weight_tying": True},
        False,
    ),
    "copied input": (
        "llama:bias-tied",
        {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
        True,
    ),
    "copied output": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}, True),
    "copied both": (
        "gpt2",
        {"target_modules": ["c_fc"], "modules_to_save": ["lm_head", "wte"]},
        True,
    ),
    "copies kept": (
        "llama:bias-tied",
        {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        False,
    ),
}
Saved = Callable[[str], Path]


def _compared(folder: Path, expected: Any) -> None:
    """Fail unless all that is read of a folder is what peft computes with."""
    with opened(folder, "merge") as found, Checkpoint(folder) as base:
        tied = found.config["tie_word_embeddings"]
        assert set(found.tensors) >= set(base.tensors)
        for name, info in found.tensors.items():
            tensor = found.read(name)
            assert_equal(tensor, expected[name].reshape(info.shape))
            pieces = b"".join(bytes(chunk) for chunk in found.chunks(name))
            assert pieces == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if tied:
            assert "lm_head.weight" not in found.tensors
            (one,) = (n for n in found.tensors if n.endswith(("embed_tokens.weight", "wte.weight")))
            assert_equal(expected["lm_head.weight"], found.read(one))


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_that_peft_computes_with_and_merges(form: str, tmp_path: Path) -> None:
    name, keys = FORMS[form]
    folder = write_adapter(write_base(tmp_path / "model", name), **keys)
    model = as_peft(folder)
    expected = dict(effective_weights(model))
    _compared(folder, _as_stored(expected, folder))
    for stored, tensor in model.merge_and_unload().named_parameters():
        assert_equal(expected[stored], tensor.detach())


def _as_stored(weights: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Experts as they lie on the disk; what no adapter touches there is the base's."""
    return {**load_file(folder / "model.safetensors"), **weights}


@pytest.mark.parametrize("form", TIED)
def test_embeddings_that_were_one_are_what_each_computes_with(form: str, tmp_path: Path) -> None:
    name, keys, splits = TIED[form]
    folder = write_adapter(write_base(tmp_path / "model", name), **keys)
    _compared(folder, effective_weights(as_peft(folder)))
    with opened(folder, "merge") as found:
        assert ("lm_head.weight" in found.tensors) is splits
        assert (found.config.get("tie_word_embeddings") is False) is splits


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_are_rounded_once_to_the_dtype_of_the_base(
    dtype: torch.dtype, own: torch.dtype, tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "model", dtype=dtype)
    write_adapter(folder, target_modules=list(EVERY), r=3, lora_alpha=5)
    file = folder / "adapter_model.safetensors"
    factors = {name: tensor.to(own) for name, tensor in load_file(file).items()}
    save_file(factors, file)
    wide = torch.promote_types(dtype, torch.float32)
    with opened(folder, "merge") as found, Checkpoint(folder) as base:
        for name in found.tensors:
            before, tensor = base.read(name), found.read(name)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" not in factors:
                assert_equal(tensor, before)
                continue
            a, b = (factors[f"{module}.lora_{side}.weight"].to(wide) for side in "AB")
            assert_equal(tensor, (before.to(wide) + (b @ a) * (5 / 3)).to(dtype))


def test_pieces_do_not_follow_rows(tmp_path: Path) -> None:
    folder = write_adapter(write_base(tmp_path / "model"), target_modules=[*EVERY, "embed_tokens"])
    with opened(folder, "merge") as found:
        for name in found.tensors:
            whole = found.read(name).view(torch.uint8).numpy().tobytes()
            for size in (8, 104, 1000):
                assert b"".join(bytes(chunk) for chunk in found.chunks(name, size)) == whole


def test_experts_that_were_trained_one_by_one_are_merged_one_by_one(tmp_path: Path) -> None:
    """As peft does with adapters of releases that had a module for each expert."""
    folder = write_adapter(write_base(tmp_path / "model", "mixtral"), target_modules=Q)
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(2)
    tensors = load_file(file)
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".experts." in name:
            for side, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
                drawn = torch.randint(-8, 9, shape, generator=generator) / 16
                module = name.removesuffix(".weight")
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = drawn
    save_file(tensors, file)
    _config(target_modules=["q_proj", "w1", "w2", "w3"])(folder)
    ours = load_model(folder, dtype=torch.float32, adapter="merge")
    expected = dict(as_peft(folder).merge_and_unload().named_parameters())
    assert len(expected) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        assert_equal(parameter.detach(), expected[name].detach())


def test_files_are_those_of_both(tmp_path: Path) -> None:
    folder = write_adapter(write_base(tmp_path / "model"), target_modules=Q)
    own = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    with opened(folder, "merge") as found, opened(folder, "ignore") as plain:
        assert set(found.files) == set(found.paths) == own
        assert set(plain.files) == {"model.safetensors"}
        assert {name: found.sha256(name) for name in plain.files} == {
            name: plain.sha256(name) for name in plain.files
        }
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(InputModelError, match="json changed during the run"):
            found.check_unchanged("adapter_config.json")


def test_a_pickled_adapter_is_read_only_if_allowed(tmp_path: Path) -> None:
    folder = write_adapter(write_base(tmp_path / "model"), target_modules=Q)
    expected = dict(effective_weights(as_peft(folder)))
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    with pytest.raises(InputModelError, match="is pickled"):
        find_adapter(folder)
    with opened(folder, "merge", allow_pickle=True) as found:
        name = "model.layers.1.self_attn.q_proj.weight"
        assert_equal(found.read(name), expected[name])


def _config(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return rewrite


P = "base_model.model."
L0 = f"{P}model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_config(peft_type="IA3"), "peft_type is 'IA3'; only LORA can be merged"),
        (_config(peft_type="PROMPT_TUNING"), "'PROMPT_TUNING'"),
        (_config(peft_type="LOHA"), "'LOHA'"),
        (_config(use_dora=True), "use_dora: DoRA, which scales the rows"),
        (_config(layer_replication=[[0, 2], [1, 2]]), "layer_replication: "),
        (
            _config(init_lora_weights="loftq"),
            "init_lora_weights is 'loftq': the base was quantised",
        ),
        (_config(init_lora_weights="pissa_niter_4"), "the base's weights were changed"),
        (_config(target_parameters=["experts.down_proj"]), "target_parameters: "),
        (_config(trainable_token_indices=[1]), "trainable_token_indices: "),
        (_config(some_new_key={"a": 1}), "some_new_key: this kvpatch does not know it"),
        (_config(r="4"), "r must be a positive integer, found '4'"),
        (_config(rank_pattern={"q_proj": 0}), "rank_pattern must be ranks by module"),
        (_config(rank_pattern={"(": 3}), "which is no regular expression"),
        (_config(r=5), r"have shapes \(4, 48\) and \(80, 4\), expected \(5, in\) and \(out, 5\)"),
        (_config(target_modules=["k_proj"]), "which the target_modules .* do not name"),
        (_config(layers_to_transform=1), "layers.0.self_attn.q_proj, which the target_modules"),
        (
            _config(exclude_modules="model.layers.1.*"),
            "layers.1.self_attn.q_proj, which the target",
        ),
        (_config(modules_to_save=["lm_head"]), r"lacks \['lm_head.weight'\], which its modules_to"),
        (
            _tensors(lambda t: t.update({f"{L0}lora_magnitude_vector": torch.ones(80)})),
            "no tensor of",
        ),
        (_tensors(lambda t: t.pop(f"{L0}lora_B.weight")), "expected a pair of lora_A and lora_B"),
        (_tensors(lambda t: t.update({f"{P}score.weight": torch.ones(2, 48)})), "score.weight"),
        (
            _tensors(lambda t: t.update({f"{P}model.norm.weight": torch.ones(40)})),
            r"is for a tensor of shape \(40,\), and 'model.norm.weight' of the base has \(48,\)",
        ),
        (
            _tensors(lambda t: t.update({f"{P}lm_head.weight": torch.ones(99, 48)})),
            r"is for a tensor of shape \(99, 48\)",
        ),
        (
            _tensors(
                lambda t: t.update(
                    {
                        f"{P}model.layers.9.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
                        for side, shape in (("A", (4, 48)), ("B", (80, 4)))
                    }
                )
            ),
            "for which the base has no place: .*layers.9.self_attn.q_proj.lora_A",
        ),
        (_tensors(lambda t: t[f"{L0}lora_B.weight"].fill_(torch.nan)), "holds NaN or infinity"),
        (
            _tensors(
                lambda t: t.update({f"{L0}lora_A.weight": torch.ones(4, 48, dtype=torch.int8)})
            ),
            "which is no LoRA's",
        ),
    ],
)
def test_what_is_no_sum_of_this_base_and_a_plain_lora_is_refused(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = write_adapter(write_base(tmp_path / "model"), target_modules=Q)
    change(folder)
    with pytest.raises(InputModelError, match=message):
        _read_all(folder)


def _read_all(folder: Path) -> None:
    with opened(folder, "merge") as found:
        for name in found.tensors:
            found.read(name)


def test_a_sum_that_overflows_is_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "model", dtype=torch.float16)
    write_adapter(folder, target_modules=Q, lora_alpha=1e7)
    with (
        opened(folder, "merge") as found,
        pytest.raises(InputModelError, match="overflows in float16 once adapter_model"),
    ):
        found.read("model.layers.0.self_attn.q_proj.weight")


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(write_base(tmp_path / "model"), target_modules=Q)
    file = folder / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**load_file(file), name: torch.ones(80, 48, dtype=torch.int8)}, file)
    adapter = find_adapter(folder)
    assert adapter is not None
    with Checkpoint(folder) as base, pytest.raises(InputModelError, match="base is quantised"):
        merged(base, adapter, FAMILIES["llama"])
