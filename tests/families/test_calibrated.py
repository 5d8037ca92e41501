"""Calibrated conversions of a few families through the whole pipeline.

The families between them have biases, caps, windows, partial and interleaved RoPE, layers without
RoPE, parallel residuals, norms of queries and keys, experts, and a class of another family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert import convert, make_recipe
from kvpatch.errors import UsageError
from tests.families.stock import attentions, change_kv_heads, full_logits, kv_fields, load, make
from tests.families.texts import random_text, token_ids, write_tokenizer
from tests.families.tiny import settings
from tests.faults.running import Run, cli
from tests.helpers import assert_close

_FAMILIES = (
    *("llama", "qwen2", "gemma2", "phi", "cohere", "olmo2", "gpt_neox", "mixtral", "smollm3"),
)
_SAMPLES, _CONTEXT = 24, 32
_FLAGS = {"samples": _SAMPLES, "context": _CONTEXT}

# folder of a model, by name and the number of different KV heads; None for all different
Source = Callable[[str, int | None], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    @cache
    def saved(name: str, kv_heads: int | None = None) -> Path:
        folder = tmp_path_factory.mktemp("calibrated") / "model"
        model = make(name, settings(name), seed=2)
        if kv_heads is not None:
            change_kv_heads(model, kv_heads, lambda heads: heads[0], dtype=torch.float32)
        return _save(model, folder)

    return saved


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text(random_text(2000, seed=0))
    return file


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _convert(source: Path, out: Path, **keys: object) -> Path:
    recipe = {"method": "gqa", "source": str(source), "output": str(out), "merge": "svd", **keys}
    if recipe["method"] == "gqa":
        recipe["kv_heads"] = 2
    return convert(make_recipe(recipe))


def _calibrated(source: Path, out: Path, text: Path, **keys: object) -> Path:
    return _convert(source, out, calibration=str(text), **{**_FLAGS, **keys})


def _held_out() -> Tensor:
    """Windows that no conversion has seen, [16, T]."""
    return token_ids(random_text(16 * _CONTEXT, seed=1)).view(16, _CONTEXT)


def _assert_equal_to_rounding(source: Path, out: Path) -> None:
    """Refits sum over some hundred tokens in float32; each sum is off by as many epsilons."""
    expected, actual = (full_logits(load(folder), _held_out()) for folder in (source, out))
    epsilon = torch.finfo(torch.float32).eps * _SAMPLES * _CONTEXT
    assert_close(actual, expected, atol=epsilon * float(expected.abs().max()))


def _divergence(source: Path, *results: Path) -> list[float]:
    """Mean KL divergence of each result from the source on text that nobody has seen."""
    truth = full_logits(load(source), _held_out()).log_softmax(-1)
    found = (full_logits(load(folder), _held_out()).log_softmax(-1) for folder in results)
    return [float((truth.exp() * (truth - one)).sum(-1).mean()) for one in found]


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "kvpatch.json").read_text())
    return manifest


@pytest.mark.parametrize("name", _FAMILIES)
def test_heads_that_are_copies_stay_exact(
    source: Source, text: Path, tmp_path: Path, name: str
) -> None:
    out = _calibrated(source(name, 2), tmp_path / "out", text)
    _assert_equal_to_rounding(source(name, 2), out)


@pytest.mark.parametrize("name", _FAMILIES)
def test_calibration_loses_less(source: Source, text: Path, tmp_path: Path, name: str) -> None:
    model = source(name, None)
    mean = _convert(model, tmp_path / "mean", merge="mean")
    free = _convert(model, tmp_path / "free")
    out = _calibrated(model, tmp_path / "out", text)
    lost = _divergence(model, mean, free, out)
    assert lost[0] > lost[1] > lost[2] > 0
    layers = _manifest(out)["layers"]
    assert [layer["layer"] for layer in layers] == list(range(settings(name)["num_hidden_layers"]))
    assert all(layer["attention_kl"] > 0 for layer in layers)
    assert all(0 < layer["output_error"] < 1 for layer in layers)


def test_every_refit_brings_the_model_closer_on_the_text_it_sees(
    source: Source, text: Path, tmp_path: Path
) -> None:
    """Between merges that see the same windows, here the whole text."""
    model, windows = source("llama", None), token_ids(text.read_text())[:1984].view(62, _CONTEXT)
    truth = full_logits(load(model), windows).log_softmax(-1)

    def lost(merge: str, refit: str) -> float:
        keys: dict[str, object] = {"merge": merge, "refit": refit, "group": "adjacent"}
        if (merge, refit) != ("mean", "none"):
            keys |= {"calibration": str(text), "samples": 62, "context": _CONTEXT}
        out = _convert(model, tmp_path / f"{merge}-{refit}", **keys)
        found = full_logits(load(out), windows).log_softmax(-1)
        return float((truth.exp() * (truth - found)).sum(-1).mean())

    assert lost("mean", "none") > lost("mean", "o")
    none = lost("svd", "none")
    assert none > lost("svd", "o")
    assert none > lost("svd", "q") > lost("svd", "qo")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox"])
def test_two_runs_write_the_same_bytes(
    source: Source, text: Path, tmp_path: Path, name: str
) -> None:
    outs = [_calibrated(source(name, None), tmp_path / run, text) for run in ("one", "two")]
    one, two = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert one == two


@torch.no_grad()
def _in_pairs(copies: tuple[int, ...] = (), *, layers: int = 4) -> Any:
    """A Llama; the layer after each of ``copies`` sees what that one sees, and has its KV."""
    model = make("llama", {**settings("llama"), "num_hidden_layers": layers}, seed=3)
    for producer, reader in ((first, first + 1) for first in copies):
        one, other = (model.model.layers[index] for index in (producer, reader))
        for weight in (one.self_attn.o_proj.weight, one.mlp.down_proj.weight):
            weight.zero_()
        other.input_layernorm.load_state_dict(one.input_layernorm.state_dict())
        modules = attentions(model)
        fields = zip(*(kv_fields(modules[i], 4) for i in (producer, reader)), strict=True)
        for made, read in fields:
            for head, weight in enumerate(read):
                weight.copy_(made[(head + 1) % 4])
    return model


def test_layers_with_copies_stay_exact(text: Path, tmp_path: Path) -> None:
    model = _save(_in_pairs((0, 2)), tmp_path / "model")
    out = _calibrated(model, tmp_path / "out", text, method="cla", share=2)
    _assert_equal_to_rounding(model, out)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_calibration_loses_less_between_layers(
    text: Path, tmp_path: Path, kv_heads: int | None
) -> None:
    model = _save(_in_pairs(), tmp_path / "model")
    keys = {"method": "cla", "share": 2, "kv_heads": kv_heads}
    mean = _convert(model, tmp_path / "mean", **keys, merge="mean")
    bare = _calibrated(model, tmp_path / "bare", text, **keys, refit="none")
    out = _calibrated(model, tmp_path / "out", text, **keys)
    lost = _divergence(model, mean, bare, out)
    assert lost[0] > lost[1] > lost[2] > 0


def test_calibrated_losses_choose_the_layers(text: Path, tmp_path: Path) -> None:
    """Layers 1 and 2, 3 and 4 merge without loss, which their inputs alone tell."""
    folder = _save(_in_pairs((1, 3), layers=5), tmp_path / "model")
    keys = {"method": "cla", "share": 2, "layers": "auto", "refit": "none"}
    out = _calibrated(folder, tmp_path / "out", text, **keys)
    assert _manifest(out)["kv_cache"]["kv_source_layers"] == [0, 1, 1, 3, 3]


def test_the_first_layer_never_shares_of_itself(text: Path, tmp_path: Path) -> None:
    """Although it would lose nothing."""
    folder = _save(_in_pairs((0, 2)), tmp_path / "model")
    keys = {"method": "cla", "share": 2, "layers": "auto", "refit": "none"}
    out = _calibrated(folder, tmp_path / "out", text, **keys)
    assert _manifest(out)["kv_cache"]["kv_source_layers"] == [0, 1, 1, 1]


def test_the_text_and_its_tokens_are_on_record(source: Source, text: Path, tmp_path: Path) -> None:
    keys = {"samples": 5, "context": 16, "refit": "none"}
    out = _calibrated(source("llama", None), tmp_path / "out", text, **keys, seed=3)
    windows = token_ids(text.read_text())[: 2000 // 16 * 16].view(-1, 16)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:5]
    tokens = windows[chosen.sort().values]
    assert _manifest(out)["calibration"] == {
        "text": "train.txt",
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "samples": 5,
        "context": 16,
    }
    recipe = _manifest(out)["recipe"]
    assert {key: recipe[key] for key in (*keys, "seed")} == {**keys, "seed": 3}
    assert str(text) not in (out / "kvpatch.json").read_text(), "the path is nobody's business"


def test_jsonl_is_text_in_documents(source: Source, text: Path, tmp_path: Path) -> None:
    content = text.read_text()
    lines = [json.dumps({"text": content[:700], "n": 1}), "", json.dumps({"text": content[700:]})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    outs = [
        _calibrated(source("llama", None), tmp_path / file.suffix, file, refit="none")
        for file in (text, tmp_path / "train.jsonl")
    ]
    one, two = (_manifest(out)["calibration"]["tokens_sha256"] for out in outs)
    assert one == two


def _cli(source: Path, out: Path, *flags: object) -> Run:
    arguments = ["gqa", source, out, "--kv-heads", 2, "--merge", "svd", *flags]
    return cli([str(argument) for argument in arguments])


def test_flags_reach_the_calibration(source: Source, text: Path, tmp_path: Path) -> None:
    flags = ["--samples", 4, "--context", 8, "--seed", 7, "--device", "cpu", "--refit", "o"]
    run = _cli(source("llama", None), tmp_path / "out", "--calibration", text, *flags)
    assert run.code == 0, run.err
    recipe = _manifest(tmp_path / "out")["recipe"]
    wanted = {"samples": 4, "context": 8, "seed": 7, "refit": "o", "group": "similar"}
    assert {key: recipe[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("olmo2", {"refit": "q"}, "--refit q does not work here: a norm stands between"),
        ("qwen3", {"refit": "qo"}, "--refit qo does not work here: a norm stands between"),
        ("cohere:norm-bias-untied", {"refit": "q"}, "--refit q does not work here: a norm"),
        ("olmo:bias-clip", {"merge": "mean", "refit": "q"}, "the clamp clip_qkv 0.7 stands"),
        ("bloom", {}, "--calibration does not work for bloom, whose scores have ALiBi"),
        ("mpt", {}, "--calibration does not work for mpt, whose scores have ALiBi"),
        ("falcon", {"refit": "none"}, "--calibration does not work for falcon"),
        ("llama", {"merge": "mean"}, "merge mean without refit makes no use of calibration"),
        ("llama", {"merge": "first", "refit": "none"}, "merge first without refit makes no use"),
        ("llama", {"context": 65}, "--context 65 is longer than this model's 64 tokens"),
        ("llama", {"device": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_is_refused(
    source: Source, text: Path, tmp_path: Path, name: str, keys: Mapping[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        _calibrated(source(name, None), tmp_path / "out", text, **keys)
    assert message in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refit", [None, "o"])
def test_norms_of_queries_leave_the_output_to_refit(
    source: Source, text: Path, tmp_path: Path, refit: str | None
) -> None:
    out = _calibrated(source("qwen3", None), tmp_path / "out", text, refit=refit)
    recipe = _manifest(out)["recipe"]
    assert (recipe["refit"], recipe["group"]) == ("o", "adjacent")


@pytest.mark.parametrize(
    ("file", "content", "code", "message"),
    [
        ("missing.txt", None, 2, "cannot read the text"),
        ("missing.jsonl", None, 2, "cannot read the text"),
        ("missing.parquet", None, 2, "missing.parquet"),
        ("empty.txt", b"", 3, "has 0 tokens, fewer than 24 windows of 32"),
        ("empty.jsonl", b"\n\n", 3, "has 0 tokens, fewer than 24 windows of 32"),
        ("short.txt", b"x" * 767, 3, "has 767 tokens, fewer than 24 windows of 32"),
        ("binary.txt", b"\xff\xfe\x00\x80" * 999, 2, "cannot read the text"),
        ("binary.jsonl", b"\xff\xfe\x00\x80" * 999, 2, "cannot read the text"),
        ("keyless.jsonl", b'{"text": "x"}\n{"content": "x"}\n', 2, "keyless.jsonl:2: expected"),
        ("list.jsonl", b'["text"]\n', 2, 'list.jsonl:1: expected an object with a key "text"'),
        ("torn.jsonl", b'{"text": "x"\n', 2, "torn.jsonl:1: expected an object"),
        ("noise.parquet", b"PAR1" * 99, 2, "noise.parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_texts_that_are_none(
    source: Source, tmp_path: Path, file: str, content: bytes | None, code: int, message: str
) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    before = list(tmp_path.iterdir())
    flags = ("--samples", _SAMPLES, "--context", _CONTEXT)
    run = _cli(source("llama", None), tmp_path / "out", "--calibration", path, *flags)
    assert run.code == code, run.err
    assert message in run.err
    assert run.out == ""
    assert list(tmp_path.iterdir()) == before


def test_a_model_without_tokenizer_is_no_model_to_calibrate(text: Path, tmp_path: Path) -> None:
    make("llama", settings("llama")).save_pretrained(tmp_path / "model")
    run = _cli(tmp_path / "model", tmp_path / "out", "--calibration", text)
    assert run.code == 3
    assert "has no tokenizer" in run.err
