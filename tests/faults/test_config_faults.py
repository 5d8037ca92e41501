"""config.json that is damaged, contradicts the tensors, or describes what cannot be converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.builders import (
    CONFIG,
    assert_refused,
    attention,
    frame,
    llama_tensors,
    replace_header,
    run_gqa,
    write_json,
    write_model,
)
from tests.faults.running import cli

TABLE = 12  # lines: title, eight rows, the rest, hint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2},
            [(attention(0, "q"), "(16, 8)", "(8, 8)"), (attention(1, "o"), "(8, 16)", "(8, 8)")],
        ),
        ({"head_dim": 4}, [(attention(1, "v"), "(16, 8)", "(8, 8)")]),
        ({"hidden_size": 16, "head_dim": 2}, [(attention(0, "k"), "(8, 16)", "(8, 8)")]),
        ({"num_hidden_layers": 3}, [(attention(2, "q"), "(8, 8)", "None")]),
        ({"num_hidden_layers": 1}, [(attention(1, "q"), "no layer 1", "(8, 8)")]),
        ({"vocab_size": 17}, [("model.embed_tokens.weight", "(17, 8)", "(16, 8)")]),
    ],
    ids=["heads", "head_dim", "hidden", "more_layers", "fewer_layers", "vocab"],
)
def test_config_contradicts_the_tensors(
    tmp_path: Path, changes: dict[str, object], rows: list[tuple[str, str, str]]
) -> None:
    model = write_model(tmp_path / "model", **changes)
    message = assert_refused(model, "config.json contradicts the tensors", lines=TABLE)
    for name, config, file in rows:
        assert f"\n  {name}: config says {config}, file has {file}\n" in message


def test_many_contradictions_are_counted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=100)
    missing = 4 * 98  # q, k, v and o of the layers that are not there; eight are listed
    assert_refused(model, f"... and {missing - 8} more", lines=TABLE)


def test_untied_head_is_missing(model: Path) -> None:
    tensors = {n: t for n, t in llama_tensors().items() if n != "lm_head.weight"}
    _rewrite(model, tensors)
    assert_refused(model, "lm_head.weight: config says present", "tie_word_embeddings", lines=TABLE)


def test_bias_of_another_width(tmp_path: Path) -> None:
    name = attention(0, "k").replace("weight", "bias")
    model = write_model(tmp_path / "model", {name: torch.ones(6)})
    assert_refused(model, f"{name}: config says (8,), file has (6,)", lines=TABLE)


def _rewrite(model: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 10**12, "num_key_value_heads": 10**12, "head_dim": 2},
        {"num_hidden_layers": 10**12},
    ],
    ids=["heads", "layers"],
)
def test_absurd_counts_are_refused_before_they_cost_time_or_memory(
    tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    import convert.facts

    # a loop over the layers ends the test at once instead of filling the memory
    ropes = convert.facts.layer_ropes

    def counted(*args: Any, layers: int, **options: Any) -> Any:
        assert layers < 10**6, "positions are laid out for every layer that config.json claims"
        return ropes(*args, layers=layers, **options)

    monkeypatch.setattr(convert.facts, "layer_ropes", counted)
    model = write_model(tmp_path / "model", **changes)
    assert_refused(model, next(iter(changes)), str(10**12))


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (None, "config.json is missing"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "llama", "model_type": "mistral"}', "'model_type' stands there twice"),
        ("{}", "no model_type"),
        ('{"model_type": 7}', "no model_type"),
        ('{"x": ' + "[" * 100_000, "not valid JSON"),
    ],
    ids=["missing", "empty", "cut", "list", "twice", "no_type", "type_7", "deep"],
)
def test_config_is_damaged(model: Path, text: str | None, fact: str) -> None:
    (model / "config.json").unlink()
    if text is not None:
        (model / "config.json").write_text(text)
    assert_refused(model, fact, "config.json")


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", comment="\ud800")
    assert_refused(model, "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"model_type": "llava", "text_config": {}}, "wraps a text model (text_config"),
        ({"model_type": "x_vl", "vision_config": {}}, "wraps a text model (vision_config"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3 caches a latent already"),
    ],
    ids=["unknown", "encoder_decoder", "text_config", "vision_config", "latent"],
)
def test_model_that_cannot_be_converted(
    tmp_path: Path, config: dict[str, object], fact: str
) -> None:
    model = write_model(tmp_path / "model", **config)
    message = assert_refused(
        model, str(config["model_type"]), fact, "add a row to convert/families/table.py"
    )
    for family in ("llama", "mistral", "qwen3", "gemma2"):
        assert family in message


@pytest.mark.parametrize("extra", [{}, {"is_encoder_decoder": True}, {"text_config": {}}], ids=str)
def test_model_type_forges_no_line(tmp_path: Path, extra: dict[str, object]) -> None:
    model = write_model(tmp_path / "model", model_type="x\nerror: forged", **extra)
    assert_refused(model, "forged")  # which allows two lines only: message and hint


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, found 0"),
        ({"num_attention_heads": "4"}, "found '4'"),
        ({"num_attention_heads": True}, "found True"),
        ({"num_attention_heads": None}, "found None"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"head_dim": 2.0}, "head_dim"),
        ({"hidden_size": 2}, "head_dim"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not one of"),
        ({"torch_dtype": 7}, "dtype '7' is not one of"),
        ({"torch_dtype": "torch.float32"}, "dtype 'torch.float32' is not one of"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, found None"),
        ({"per_layer_config": {"1": {}}}, "per_layer_config"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": ["x"]}}, "rope_theta"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "mistral", "layer_types": 5}, "layer_types"),
        (
            {"model_type": "gemma2", "head_dim": 2, "query_pre_attn_scalar": "x"},
            "query_pre_attn_scalar",
        ),
        (
            {"model_type": "gemma2", "head_dim": 2, "query_pre_attn_scalar": 0},
            "query_pre_attn_scalar",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_value_that_makes_no_sense_is_named(
    tmp_path: Path, changes: dict[str, object], fact: str
) -> None:
    model = write_model(tmp_path / "model", **changes)
    assert_refused(model, "config.json", fact)


@pytest.mark.parametrize(
    ("wanted", "facts"),
    [
        (3, ("--kv-heads 3", "4 KV heads", "Choose one of 1, 2")),
        (4, ("--kv-heads 4", "Choose one of 1, 2")),
        (8, ("--kv-heads 8", "Choose one of 1, 2")),
        (0, ("kv_heads", "greater than or equal to 1", "found 0")),
        (-2, ("kv_heads", "greater than or equal to 1", "found -2")),
        (10**30, (f"--kv-heads {10**30}", "Choose one of 1, 2")),
    ],
)
def test_wrong_kv_heads(model: Path, tmp_path: Path, wanted: int, facts: tuple[str, ...]) -> None:
    run = cli(["gqa", str(model), str(tmp_path / "out"), f"--kv-heads={wanted}"])
    assert run.code == 2
    for fact in facts:
        assert fact in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_model_with_one_kv_head_has_nothing_to_pool(tmp_path: Path) -> None:
    narrow = {attention(layer, part): torch.ones(2, 8) for layer in range(2) for part in "kv"}
    model = write_model(tmp_path / "model", narrow, num_key_value_heads=1)
    run = cli(["mqa", str(model), str(tmp_path / "out")])
    assert (run.code, "single KV head (MQA) already" in run.err) == (2, True)


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", None])
def test_quantised_by_its_config(tmp_path: Path, method: str | None) -> None:
    quantization = {"bits": 4} | ({"quant_method": method} if method else {})
    model = write_model(tmp_path / "model", quantization_config=quantization)
    assert_refused(model, "quantised", method or "unknown", "Convert the unquantised checkpoint")


@pytest.mark.parametrize("value", ["fp8", ["gptq"], {"quant_method": "x\nerror: forged"}], ids=str)
def test_quantised_by_a_config_of_another_form(tmp_path: Path, value: object) -> None:
    model = write_model(tmp_path / "model", quantization_config=value)
    assert_refused(model, "quantised")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
@pytest.mark.parametrize("name", [attention(1, "k"), "model.layers.0.mlp.up_proj.weight"])
def test_quantised_by_its_dtypes(model: Path, name: str, dtype: str) -> None:
    tensors = llama_tensors()
    shape = list(tensors.pop(name).shape)
    _rewrite(model, tensors)
    file = model / "model.safetensors"
    size, data = shape[0] * shape[1], sum(4 * tensor.numel() for tensor in tensors.values())
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [data, data + size]}
    replace_header(file, {name: entry})
    file.write_bytes(file.read_bytes() + bytes(size))
    assert_refused(model, f"'{name}' has dtype", "quantised", "Convert the unquantised checkpoint")


def test_remote_code_is_neither_run_nor_copied(tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_trap.TrapForCausalLM"}
    )
    trap = tmp_path / "ran"
    (model / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w')\n")
    run = run_gqa(model, tmp_path / "out")
    assert run.code == 0
    assert "warning: auto_map is left out" in run.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIG, "num_key_value_heads": 2}
    assert not (tmp_path / "out" / "modeling_trap.py").exists()
    assert not trap.exists()


def test_config_of_the_result_keeps_unknown_keys_in_their_order(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", zz_custom={"b": [1, None], "a": "é"}, aa_custom=1e-7)
    assert run_gqa(model, tmp_path / "out").code == 0
    before = json.loads((model / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(after.items()) == list({**before, "num_key_value_heads": 2}.items())


def test_tied_head_on_disk_is_copied(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tie_word_embeddings=True)
    assert run_gqa(model, tmp_path / "out").code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["lm_head.weight"].equal(llama_tensors()["lm_head.weight"])


@pytest.mark.parametrize("content", [b"", frame({})], ids=["empty_file", "no_tensors"])
def test_inspect_refuses_what_convert_refuses(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    run = cli(["inspect", str(model)])
    assert (run.code, run.out) == (3, "")
    assert run.err.startswith("error: ")


def test_inspect_names_a_contradiction(model: Path) -> None:
    write_json(model / "config.json", {**CONFIG, "num_key_value_heads": 2})
    run = cli(["inspect", str(model)])
    assert run.code == 3
    assert f"{attention(0, 'k')}: config says (4, 8), file has (8, 8)" in run.err
