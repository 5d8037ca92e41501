"""Model cards say what was done, of hand-written manifests and of real conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from convert.card import render_card
from convert.cli import app
from convert.pipeline import convert
from convert.recipe import make_recipe

POOLED = "Pooled heads without further training lose much"
UNTOUCHED = "Tensors outside of attention are the source's, bit for bit."
CALIBRATION = {
    "text": "train.txt",
    "text_sha256": "a1" * 32,
    "tokens_sha256": "b2" * 32,
    "samples": 40,
    "context": 512,
}


def manifest(**changed: Any) -> dict[str, Any]:
    """Of a model of four layers with 8 KV heads, merged to 2 by averaging."""
    return {
        "source": {
            "name": "org/small",
            "repository": "org/small",
            "revision": "c0ffee",
            "architecture": "LlamaForCausalLM",
            "metadata": {"license": "mit"},
            "files": {},
        },
        "recipe": {"method": "gqa", "merge": "mean", "refit": "none", "kv_heads": 2},
        "calibration": None,
        "architecture": "LlamaForCausalLM",
        "kv_cache": {
            "kv_heads": [8, 2],
            "kv_source_layers": [0, 1, 2, 3],
            "context": 4096,
            "bytes_per_token": [4000, 1000],
            "bytes_at_context": [16_384_000, 4_096_000],
        },
        "layers": [layer(index, index) for index in range(4)],
        "evaluations": [],
        **changed,
    }


def layer(index: int, source: int, **more: float) -> dict[str, Any]:
    return {
        "layer": index,
        "source": source,
        "lost_energy_k": 0.1 * index,
        "lost_energy_v": 0.5,
        **more,
    }


def recipe(**keys: Any) -> dict[str, Any]:
    return {"method": "gqa", "merge": "svd", "refit": "none", "group": "adjacent", **keys}


def shared(heads: int, **keys: Any) -> dict[str, Any]:
    """Two pairs of layers that share, each layer with ``heads`` KV heads."""
    own = {"method": "cla", "share": 2, "match": True, "merge": "svd", "refit": "none"}
    cache = manifest()["kv_cache"]
    return manifest(
        recipe={**own, **keys},
        architecture="KvpatchLlamaForCausalLM",
        kv_cache={**cache, "kv_heads": [8, heads], "kv_source_layers": [0, 0, 2, 2]},
        layers=[layer(0, 0), layer(1, 0), layer(2, 2), layer(3, 2)],
    )


def card(content: dict[str, Any]) -> str:
    return render_card(content).decode()


def front_matter(text: str) -> dict[str, Any]:
    matter: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return matter


@pytest.mark.parametrize(
    ("content", "tags", "title"),
    [
        (manifest(), ["gqa"], "small, GQA with 2 KV heads"),
        (
            manifest(kv_cache={**manifest()["kv_cache"], "kv_heads": [8, 1]}),
            ["mqa"],
            "small, MQA",
        ),
        (shared(8), ["cla"], "small, CLA2 with 8 KV heads"),
        (shared(2), ["cla", "gqa"], "small, CLA2 with 2 KV heads"),
        (shared(1, share=3), ["cla", "mqa"], "small, CLA3 with 1 KV head"),
    ],
)
def test_tags_and_title(content: dict[str, Any], tags: list[str], title: str) -> None:
    text = card(content)
    assert front_matter(text) == {
        "base_model": "org/small",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["kvpatch", *tags, "kv-cache"],
    }
    assert f"\n# {title}\n" in text


def test_a_calibrated_merge_names_grouping_refit_and_text() -> None:
    done = recipe(group="similar", refit="qo")
    text = card(manifest(recipe=done, calibration=CALIBRATION))
    assert "merged with those that lose least energy together" in text
    assert "Query and key projections were then refitted" in text
    assert "value and output projections to its outcome" in text
    assert f"40 windows of 512 tokens of train.txt (sha256 `{'a1' * 32}`" in text
    assert f"`{'b2' * 32}`" in text


def test_what_was_not_done_is_not_told() -> None:
    text = card(manifest(recipe=recipe()))
    assert "Neighbouring heads are merged." in text
    assert "refitted" not in text
    assert "Calibrated" not in text
    only_queries = card(manifest(recipe=recipe(refit="q"), calibration=CALIBRATION))
    assert "Query and key projections were then refitted" in only_queries
    assert "alue and output projections" not in only_queries
    only_outputs = card(manifest(recipe=recipe(refit="o"), calibration=CALIBRATION))
    assert "Query and key projections were" not in only_outputs
    assert "Value and output projections were then refitted" in only_outputs


@pytest.mark.parametrize("method", ["gqa", "cla"])
@pytest.mark.parametrize(("merge", "warned"), [("mean", True), ("first", True), ("svd", False)])
def test_only_pooling_is_said_to_lose_much(method: str, merge: str, warned: bool) -> None:
    content = manifest() if method == "gqa" else shared(8)
    text = card({**content, "recipe": {**content["recipe"], "merge": merge}})
    assert (POOLED in text) == warned


def test_the_energy_that_svd_would_lose_stands_beside_the_mean() -> None:
    layers = [layer(i, i, svd_lost_energy_k=share) for i, share in enumerate((0.0, 0.1, 0.2, 0.5))]
    text = card(manifest(layers=layers))
    assert "keys 15.0 %, values 50.0 %" in text  # 0, 10, 20 and 30 %; 50 % of each
    assert "(`--merge svd`) would lose 20.0 % of theirs" in text
    assert "--merge svd" not in card(manifest())


def test_layers_that_share_count_with_what_their_set_would_lose() -> None:
    content = shared(8, merge="mean")
    content["layers"] = [
        layer(0, 0, svd_lost_energy_k=0.0),
        layer(1, 1, svd_lost_energy_k=0.2),
        layer(2, 1),
        layer(3, 1),
    ]
    assert "would lose 15.0 % of theirs" in card(content)
    del content["layers"][1]["svd_lost_energy_k"]  # of large sets it is not computed
    assert "of theirs" not in card(content)


def test_a_sharing_map_is_shown_where_layers_share() -> None:
    text = card(shared(8))
    assert "(`kv_source_layers`): 0, 0, 2, 2." in text
    assert "| layers with keys and values of their own | 4 of 4 | 2 of 4 |" in text
    assert "kv_source_layers" not in card(manifest())
    assert "layers with keys and values of their own" not in card(manifest())


def test_pairing_of_heads_is_that_of_the_recipe() -> None:
    assert "are paired by what they lose together" in card(shared(8))
    assert "Heads at the same place in different layers" in card(shared(8, match=False))


def test_another_stock_class_is_explained_and_nothing_is_called_untouched() -> None:
    source = {**manifest()["source"], "architecture": "GPTNeoXForCausalLM"}
    text = card(manifest(source=source, architecture="PhiForCausalLM"))
    assert "# stock PhiForCausalLM" in text
    assert "not the class of the source, `GPTNeoXForCausalLM`" in text
    assert UNTOUCHED not in text
    assert "import kvpatch" not in text


def test_the_class_of_the_source_needs_no_words() -> None:
    text = card(manifest())
    assert "# stock LlamaForCausalLM" in text
    assert "not the class of the source" not in text
    assert UNTOUCHED in text


def test_a_class_of_kvpatch_is_not_called_stock() -> None:
    text = card(shared(8))
    assert "stock" not in text
    assert "import kvpatch" in text
    assert "trust_remote_code=True" in text
    assert "not the class of the source" not in text
    assert UNTOUCHED in text


@pytest.mark.parametrize(
    "keys", [{"method": "gqa", "kv_heads": 2}, {"method": "cla", "share": 2}], ids=["gqa", "cla"]
)
def test_the_code_of_a_card_loads_the_model(
    demo_model: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    convert(make_recipe({**keys, "source": str(demo_model), "output": str(out)}))
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace("PATH_OR_REPOSITORY", str(out)), found)
    written = json.loads((out / "kvpatch.json").read_text())
    assert type(found["model"]).__name__ == written["architecture"]
    assert len(found["tokenizer"]) == found["model"].config.vocab_size
    stated = json.loads((demo_model / "config.json").read_text())["architectures"]
    assert [written["source"]["architecture"]] == stated


def _eval(out: Path, text: Path) -> tuple[int, str]:
    flags = ["--context", "64", "--samples", "2", "--save", "-q"]
    result = CliRunner().invoke(app, ["eval", str(out), "--text", str(text), *flags])
    return result.exit_code, result.stderr


def test_a_measurement_on_the_calibration_text_is_not_saved(
    demo_model: Path, tmp_path: Path
) -> None:
    words = "Petra is in the kitchen with a brown hat. Where is the brown hat? " * 30
    train, copy, valid = (tmp_path / f"{name}.txt" for name in ("train", "copy", "valid"))
    train.write_text(words)
    copy.write_text(words)  # the text counts, not its name
    valid.write_text("Oren leaves the barn. " + words)
    out = tmp_path / "out"
    convert(
        make_recipe(
            {
                "method": "mqa",
                "merge": "svd",
                "refit": "none",
                "calibration": str(train),
                "samples": 2,
                "context": 32,
                "source": str(demo_model),
                "output": str(out),
            }
        )
    )
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, message = _eval(out, copy)
    assert code == 2
    assert "copy.txt is a text that" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert _eval(out, valid)[0] == 0
    saved = json.loads((out / "kvpatch.json").read_text())["evaluations"]
    assert [evaluation["text"] for evaluation in saved] == ["valid.txt"]


@pytest.mark.parametrize(
    ("inherited", "calibrated", "listed"),
    [
        ({}, None, None),
        ({"datasets": "org/pretraining"}, None, ["org/pretraining"]),
        ({"datasets": ["org/a", "org/b"]}, "org/texts", ["org/a", "org/b", "org/texts"]),
        ({"datasets": ["org/texts"]}, "org/texts", ["org/texts"]),
        ({}, "org/texts", ["org/texts"]),
    ],
)
def test_datasets_are_those_of_the_source_and_of_the_calibration(
    inherited: dict[str, Any], calibrated: str | None, listed: list[str] | None
) -> None:
    source = {**manifest()["source"], "metadata": inherited}
    calibration = {**CALIBRATION, **({"dataset": calibrated} if calibrated else {})}
    text = card(manifest(source=source, calibration=calibration))
    assert front_matter(text).get("datasets") == listed


def test_a_calibration_text_in_the_cache_of_the_hub_names_its_dataset(
    tmp_path: Path, demo_model: Path
) -> None:
    cache = tmp_path / "datasets--org--texts"
    text = cache / "snapshots" / ("a" * 40) / "data" / "train.txt"
    blob = cache / "blobs" / "b1"
    for path in (text, blob):
        path.parent.mkdir(parents=True)
    blob.write_text("The first of many short sentences. " * 400)
    text.symlink_to(blob)
    made = make_recipe(
        {
            "method": "gqa",
            "kv_heads": 2,
            "merge": "svd",
            "source": str(demo_model),
            "output": str(tmp_path / "out"),
            "calibration": str(text),
            "samples": 4,
            "context": 32,
        }
    )
    out = convert(made)
    assert json.loads((out / "kvpatch.json").read_text())["calibration"]["dataset"] == "org/texts"
    assert "org/texts" in front_matter((out / "README.md").read_text())["datasets"]
