"""``kvpatch bench``: what it runs, counts, draws and tells."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import kvpatch
from convert import bench
from convert.bench import Bench, bench_checkpoints
from convert.cli import app
from convert.reporting.speed import speed
from kvpatch.errors import UsageError
from tests.families.stock import make
from tests.families.tiny import settings
from tests.helpers import load_folder
from tests.test_cli import run

PROMPT, NEW, BATCH = 20, 3, 2
TOKENS = {"prompt": PROMPT, "new": NEW, "batch": BATCH, "rounds": 1}
# the demo model in float32: keys and values of 6 layers, 8 heads of 16
DEMO_BYTES = 2 * 6 * 8 * 16 * 4 * BATCH * (PROMPT + NEW)


@pytest.fixture(scope="module")
def latent(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with latents, which can be patched."""
    out = tmp_path_factory.mktemp("bench") / "mla"
    assert run("mla", demo_model, out, "--kv-budget", "25%").exit_code == 0
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the demo model is given."""
    shapes: list[tuple[int, ...]] = []
    forward = LlamaForCausalLM.forward

    def watched(self: Any, input_ids: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    return shapes


def _patching(monkeypatch: pytest.MonkeyPatch, *, possible: bool) -> list[str]:
    """Put a patch in the place of ours that does nothing; what happens is in the list."""
    events: list[str] = []

    @contextmanager
    def patched(model: Any) -> Iterator[str]:
        if not possible:
            raise UsageError("no attention module can be patched; model.layers.0: because")
        events.append("in")
        yield "2 of 2 modules"
        events.append("out")

    monkeypatch.setattr(bench.kvpatch, "patched", patched)
    return events


def test_every_token_is_decoded_alone_after_the_prompt(
    demo_model: Path, calls: list[tuple[int, ...]]
) -> None:
    measured = bench_checkpoints([("demo", demo_model)], **TOKENS, patched=False)
    once = [(BATCH, PROMPT), *[(BATCH, 1)] * NEW]
    assert calls == 2 * once  # the first round is not counted
    assert [(r.model, r.attention) for r in measured.runs] == [("demo", "stock")]


def test_rates_are_tokens_of_all_sequences_over_seconds(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # three readings in a round: start, after the prompt, after the new tokens
    seconds = [[50.0, 90.0], [1.0, 8.0], [4.0, 2.0], [2.0, 4.0]]
    readings = itertools.chain.from_iterable((0.0, a, a + b) for a, b in seconds)
    monkeypatch.setattr(bench, "_now", lambda _: next(readings))

    (got,) = bench_checkpoints([("demo", demo_model)], **TOKENS | {"rounds": 3}, patched=False).runs

    assert got.prefill_tokens_per_second == pytest.approx(BATCH * PROMPT / 2)
    assert got.decode_tokens_per_second == pytest.approx(BATCH * NEW / 4)


def test_the_cache_holds_what_is_planned(demo_model: Path, latent: Path) -> None:
    models = [("demo", demo_model), ("mla", latent)]
    demo, mla = bench_checkpoints(models, **TOKENS, patched=False).runs
    assert demo.cache_bytes == demo.planned_cache_bytes == DEMO_BYTES
    assert mla.cache_bytes == mla.planned_cache_bytes
    assert 0.2 * DEMO_BYTES < mla.cache_bytes <= 0.25 * DEMO_BYTES


def test_the_peak_is_that_of_the_run(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB that are taken and given back while the model runs show, those before do not."""
    forward = LlamaForCausalLM.forward
    before = torch.ones(300 << 20, dtype=torch.uint8)
    del before
    (quiet,) = bench_checkpoints([("demo", demo_model)], **TOKENS, patched=False).runs

    def wasteful(self: Any, *arguments: Any, **named: Any) -> Any:
        waste = torch.ones(100 << 20, dtype=torch.uint8)
        del waste
        return forward(self, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", wasteful)
    (loud,) = bench_checkpoints([("demo", demo_model)], **TOKENS, patched=False).runs
    assert quiet.peak_bytes is not None
    assert loud.peak_bytes is not None
    assert 80 << 20 < loud.peak_bytes - quiet.peak_bytes < 120 << 20


def test_stock_and_patched_take_turns(
    demo_model: Path, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _patching(monkeypatch, possible=True)
    both = bench_checkpoints([("demo", demo_model)], **TOKENS)
    assert [(r.attention, r.detail) for r in both.runs] == [
        ("stock", None),
        ("patched", "2 of 2 modules"),
    ]
    # once to see what it does, then in both rounds
    assert events == ["in", "out"] * 3
    assert len(calls) == 4 * (1 + NEW)


def test_only_patched_is_measured_where_that_is_asked_for(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _patching(monkeypatch, possible=True)
    only = bench_checkpoints([("demo", demo_model)], **TOKENS, patched=True)
    assert [r.attention for r in only.runs] == ["patched"]


def test_what_cannot_be_patched_is_measured_in_stock_form_and_said(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _patching(monkeypatch, possible=False)
    notes: list[str] = []
    found = bench_checkpoints([("demo", demo_model)], **TOKENS, note=notes.append)
    assert [r.attention for r in found.runs] == ["stock"]
    assert notes == ["demo is measured in stock form alone: no attention module can be patched"]
    with pytest.raises(UsageError, match="no attention module"):
        bench_checkpoints([("demo", demo_model)], **TOKENS, patched=True)


def test_what_patching_does_is_told(latent: Path) -> None:
    stock, patched = bench_checkpoints([("mla", latent)], **TOKENS).runs
    assert patched.detail == str(kvpatch.patch(load_folder(latent)))
    assert patched.cache_bytes == stock.cache_bytes


def test_prompts_past_what_the_model_was_made_for(demo_model: Path, tmp_path: Path) -> None:
    """With RoPE they are measured and said, with a table of positions they cannot be."""
    flags = ("--prompt", 510, "--new", 3, "--rounds", 1, "--no-patched")
    result = CliRunner().invoke(app, ["bench", str(demo_model), *map(str, flags)])
    assert result.exit_code == 0, result.stderr
    assert "--prompt 510 --new 3 (513 tokens) is more than the 512 tokens that" in result.stderr
    make("gpt2", settings("gpt2")).save_pretrained(tmp_path)
    refused = run("bench", tmp_path, "--prompt", 60, "--new", 5)
    assert refused.exit_code == 2
    assert f"(65 tokens) is more than the 64 positions of {tmp_path}" in refused.stderr
    assert run("bench", tmp_path, "--prompt", 60, "--new", 4, "--rounds", 1).exit_code == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--device", "cuda"], 2, "no CUDA device"),
        (["--dtype", "int8"], 2, "--dtype int8"),
        (["--plot", "speed.jpg"], 2, ".png or .svg"),
        (["--new", "0"], 2, ""),
    ],
    ids=["device", "dtype", "plot", "new"],
)
def test_what_cannot_be_measured_is_refused(
    demo_model: Path, flags: list[str], code: int, said: str
) -> None:
    result = run("bench", demo_model, *flags)
    assert result.exit_code == code
    assert said in result.stderr
    assert not result.stdout


def test_the_command_prints_json_alone_and_draws(
    demo_model: Path, latent: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "speed.png"
    arguments = ("bench", latent, "--against", demo_model, "--prompt", PROMPT, "--new", NEW)
    result = run(*arguments, "--rounds", 1, "--plot", plot, "--no-patched", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [r["model"] for r in data["runs"]] == [str(demo_model), str(latent)]
    assert data.keys() == Bench.__dataclass_fields__.keys()
    height, width, _ = imread(plot).shape
    assert width > height > 0

    again = run(*arguments, "--plot", plot)
    assert again.exit_code == 7


def test_the_table_compares_with_the_first(demo_model: Path, latent: Path) -> None:
    arguments = ("bench", latent, "--against", demo_model, "--prompt", PROMPT, "--new", NEW)
    result = run(*arguments, "--rounds", 1)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("1 x 20 tokens of prompt, 3 new; float32 on cpu")
    table = [line for line in lines if str(demo_model) in line or str(latent) in line]
    assert table[0].count("(1.00x)") == 2
    said = str(kvpatch.patch(load_folder(latent))).splitlines()[0]
    assert f"{latent}: {said}" in lines


def test_the_plot_shows_every_run() -> None:
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second", "cache_bytes", "peak_bytes")
    runs = [
        {"model": model, "attention": attention, **dict.fromkeys(keys, 0)}
        for model in ("org/source", "./mla")
        for attention in ("stock", "patched")
    ]
    for number, (measured, key) in enumerate(itertools.product(runs, keys), 1):
        measured[key] = number  # type: ignore[assignment]
    data = {"batch": 1, "prompt": 8, "new": 2, "dtype": "bfloat16", "device": "cpu", "runs": runs}
    panels = speed(data).axes
    shown = [[bar.get_width() for bar in panel.patches] for panel in panels]
    assert shown == [[measured[key] for measured in runs] for key in keys]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["source, stock", "source, patched", "mla, stock", "mla, patched"]
    colours = [bar.get_facecolor() for bar in panels[0].patches]
    assert colours[0] == colours[1] != colours[2] == colours[3]

    runs[0]["peak_bytes"] = None  # type: ignore[assignment]
    assert len(speed(data).axes) == 3
