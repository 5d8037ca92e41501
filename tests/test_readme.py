"""What the README shows is what happens: its numbers, commands and lists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.cli import app
from convert.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _block(name: str) -> str:
    return README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def test_demo_prints_the_table_shown() -> None:
    result = CliRunner().invoke(app, ["demo", "--json", "-q"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    shown = [re.split(r"\s{2,}", line) for line in _block("demo").splitlines()[3:-1]]
    assert [row["variant"] for row in rows] == [line[0] for line in shown]
    for row, (_, _, perplexity, kl) in zip(rows, shown, strict=True):
        # the last digit may differ between processors, whose sums round in another order
        assert row["perplexity"] == pytest.approx(float(perplexity), abs=0.011)
        assert row["kl"] == pytest.approx(float(kl), abs=0.0011)


def test_pooling_to_one_head_visibly_hurts_the_demo_model() -> None:
    lines = [re.split(r"\s{2,}", line) for line in _block("demo").splitlines()[3:-1]]
    perplexity = {line[0]: float(line[2]) for line in lines}
    assert perplexity["MQA, 1 KV head, mean"] > 5 * perplexity["source, 8 KV heads"]


def test_benchmark_table_quotes_the_results() -> None:
    results = json.loads((ROOT / "benchmarks/results/convert.json").read_text())
    expected = []
    for run in results["runs"]:
        copy = run["medians"]["copy"]["wall"]
        for way in ("copy", "kvpatch", "usual"):
            median = run["medians"][way]
            memory = "" if way == "copy" else f"{median['peak_rss'] / 1e6:.0f} MB"
            ratio = "1 x" if way == "copy" else f"{median['wall'] / copy:.2f} x"
            size = f"{run['source_bytes'] / 1e9:.2f} GB"
            expected.append([size, f"{median['wall']:.1f} s", memory, ratio])
    cells = [line.strip("|").split("|") for line in _block("benchmark").splitlines()[3:]]
    shown = [[cell.strip() for i, cell in enumerate(row) if i != 1] for row in cells]
    assert shown == expected


@pytest.mark.parametrize(("block", "count"), [("quality", 5), ("mla", 3)])
def test_quality_tables_quote_the_results(block: str, count: int) -> None:
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in _block(block).strip().splitlines()
    ]
    assert len(lines) == count + 2
    steps = lines[0][1:]
    for what, *cells in lines[2:]:
        of = [row for row in rows if (row["model"], row["what"]) == ("classics-mha-6m", what)]
        measured = {row["step"]: row["lost"] for row in of}
        measured = {step: f"{measured[step]:.3f}" for step in steps if step in measured}
        assert cells == [measured.get(step, "") for step in steps]
        assert len(measured) >= 5


def test_uptraining_table_quotes_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks/results/uptrain.json").read_text())["rows"]
    curves = {row["name"]: row["curve"] for row in rows}
    cells = [line.strip("|").split("|") for line in _block("uptrain").strip().splitlines()[2:]]
    shown = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}
    assert len(shown) == 8
    for name, numbers in shown.items():
        first, last = curves[name][0], curves[name][-1]
        assert last["tokens"] >= 300_000
        quarter = next(point for point in curves[name] if point["tokens"] >= 75_000)
        losses = [point["eval_nll"] for point in (first, quarter, last)]
        assert numbers == [f"{n:.3f}" for n in (*losses, first["eval_kl"], last["eval_kl"])]


def test_absorbed_decoding_quotes_the_results() -> None:
    runs = json.loads((ROOT / "benchmarks/results/absorbed.json").read_text())["runs"]
    (run,) = [r for r in runs if (r["cache"], r["threads"]) == ("dynamic", 1)]
    ratios = run["wall"]["whole"]
    stock, llama = ratios["stock_by_absorbed"], ratios["absorbed_by_llama"]
    assert f"1/{stock:.1f} of the stock" in _block("absorbed")
    assert f"{llama:.2f} of that\nof the Llama" in _block("absorbed")


def test_every_family_is_listed() -> None:
    listed = README.split("## Supported models")[1].split("\n\n")[1]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(FAMILIES)


def test_every_command_is_listed() -> None:
    listed = set(re.findall(r"^\| `kvpatch (\w+)", README, flags=re.MULTILINE))
    result = CliRunner().invoke(app, ["--help"])
    commands = set(re.findall(r"^  (\w+)  ", result.stdout.split("Commands:")[1], re.MULTILINE))
    assert listed == commands


def test_two_commands_do_all_the_set_up() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"$ make {target} " in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
