"""The retrieval probe, against plain loops and models that copy by rule."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner

from convert.cli import app
from convert.loading import Pair, load_pair, load_tokenizer
from convert.paired import paired_mean
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.retrieval import KEYS, built_in_text, default_lengths, measure_retrieval
from convert.texts import Text
from kvpatch.errors import InputModelError, UsageError, VerificationError

CUES = {"digits": "The pass key is", "words": "The secret words are"}


class Copier:
    """Predicts what followed the longest earlier match of the last tokens, within ``reach``.

    Its logits are 0 but for that token, whose probability is 1/2.
    """

    def __init__(self, vocabulary: int, reach: int = 10**6, limit: int = 512) -> None:
        self.vocabulary, self.reach = vocabulary, reach
        self.config = LlamaConfig(max_position_embeddings=limit)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.seen: list[list[int]] = []

    def __call__(self, tokens: torch.Tensor, *, use_cache: bool, logits_to_keep: int) -> Any:
        self.seen += tokens.tolist()
        length = tokens.shape[1]
        logits = torch.zeros(*tokens.shape, self.vocabulary)
        for row, ids in zip(logits, tokens.tolist(), strict=True):
            for end in range(length - logits_to_keep, length):
                row[end, self._next(ids[: end + 1])] = math.log(self.vocabulary - 1)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(self.vocabulary, 1)

    def _next(self, ids: list[int]) -> int:
        def match(at: int) -> int:
            return next(
                (n for n in range(at) if ids[at - 1 - n] != ids[-1 - n]), at
            )  # tokens before ``at`` that agree with the last ones

        return ids[max(range(max(1, len(ids) - self.reach), len(ids)), key=match)]


def chunks_of(size: int) -> Any:
    """A tokenizer that joins cue and key: characters, ``size`` at a time, with no opening."""
    known: dict[str, int] = {}

    def encode(text: str, **_: Any) -> dict[str, list[int]]:
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        return {"input_ids": [known.setdefault(part, len(known)) for part in parts]}

    return encode


@pytest.mark.parametrize("key", KEYS)
def test_a_model_that_copies_finds_every_key(demo_model: Path, key: str) -> None:
    tokenizer = load_tokenizer(demo_model)
    pair = Pair("copier", tokenizer, Copier(512), None)
    result = measure_retrieval(pair, built_in_text(), lengths=[96, 128], trials=3, key=key)
    assert [(cell.length, cell.depth) for cell in result.cells] == [
        (length, depth) for length in (96, 128) for depth in (0, 25, 50, 75, 100)
    ]
    assert all(cell.exact.value == 1.0 for cell in result.cells)
    # each token of the key has probability 1/2, and about 1/1022 without the statement
    assert all(cell.log_likelihood.value > 15 * math.log(0.5) for cell in result.cells)
    assert result.gain.value > 3 * math.log(511)


def test_a_short_reach_finds_what_was_stated_late(demo_model: Path) -> None:
    source, model = Copier(512), Copier(512, reach=70)
    pair = Pair("copier", load_tokenizer(demo_model), model, source)
    result = measure_retrieval(pair, built_in_text(), lengths=[64, 256], depths=[0, 100], trials=2)
    found = {(cell.length, cell.depth): cell.exact.value for cell in result.cells}
    assert found == {(64, 0): 1.0, (64, 100): 1.0, (256, 0): 0.0, (256, 100): 1.0}
    assert result.exact.value == 0.75
    assert result.exact.source == 1.0
    assert result.exact.difference == -0.25
    assert result.exact.difference_error == 0.0  # every trial lost the same


def test_texts_hold_the_key_once_where_it_should_be(demo_model: Path) -> None:
    tokenizer, model = load_tokenizer(demo_model), Copier(512)
    pair = Pair("copier", tokenizer, model, None)
    measure_retrieval(pair, built_in_text(), lengths=[200], depths=[0, 50, 100], trials=4)
    assert all(len(ids) == 200 and ids[0] == tokenizer.bos_token_id for ids in model.seen)
    keys = set()
    for start in range(0, len(model.seen), 4):
        without, first, middle, last = map(tokenizer.decode, model.seen[start : start + 4])
        key = without.rpartition(" ")[2]
        keys.add(key)
        assert len(key) == 5
        assert without.count(key) == 1
        assert without.endswith(f"\nThe pass key is {key}")
        for text in (first, middle, last):
            assert text.count(f"\nThe pass key is {key}") == 2
            assert text.endswith(f"\nThe pass key is {key}")
        assert first.startswith(f"<s>\nThe pass key is {key}.\n")
        assert last.endswith(f"\nThe pass key is {key}.\n\nThe pass key is {key}")
        before, after = middle.split(f"\nThe pass key is {key}.\n")
        ends = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
        assert abs(len(ends[0]) - (len(ends[1]) - 14)) < 8  # cut where tokens were, not letters
    assert len(keys) == 4


def test_keys_that_join_the_cue_in_one_token_are_asked_for_whole() -> None:
    for size in (3, 4, 5):
        model = Copier(100_000, limit=128)
        pair = Pair("chunks", chunks_of(size), model, None)
        result = measure_retrieval(pair, built_in_text(), lengths=[64], depths=[50], trials=3)
        # only a whole token can be found; a sentence's tokens repeat since it starts anew
        assert result.exact.value == 1.0
        tokens = math.ceil((len(" 12345") + len(f"\n{CUES['digits']}") % size) / size)
        assert result.cells[0].log_likelihood.value == pytest.approx(tokens * math.log(0.5))


@torch.no_grad()
def _by_hand(model: Any, ids: list[int], tokenizer: Any, cue: str) -> tuple[float, bool]:
    """Log likelihood of the tokens after the last cue, and whether greedy decoding gives them."""
    end = next(n for n in range(len(ids), 0, -1) if tokenizer.decode(ids[:n]).endswith(cue))
    likely = 0.0
    for at in range(end, len(ids)):
        logits = model(torch.tensor([ids[:at]])).logits[0, -1].double()
        likely += float(logits.log_softmax(-1)[ids[at]])
    prompt = torch.tensor([ids[:end]])
    count = len(ids) - end
    greedy = model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return likely, greedy[0].tolist() == ids


@pytest.mark.parametrize("key", KEYS)
def test_numbers_agree_with_a_plain_loop(
    demo_model: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = load_pair(demo_model, None, dtype=torch.float64)
    texts: list[list[int]] = []
    forward = type(pair.model).forward

    def recording(self: Any, tokens: torch.Tensor, **options: Any) -> Any:
        texts.extend(tokens.tolist())
        return forward(self, tokens, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(pair.model), "forward", recording)
        result = measure_retrieval(
            pair, built_in_text(), lengths=[100], depths=[100], trials=3, key=key, batch=4
        )
    rows = [_by_hand(pair.model, ids, pair.tokenizer, CUES[key]) for ids in texts]
    without, stated = [row[0] for row in rows[::2]], [row[0] for row in rows[1::2]]
    gains = [b - a for a, b in zip(without, stated, strict=True)]
    (cell,) = result.cells
    assert cell.log_likelihood.value == pytest.approx(statistics.fmean(stated), abs=1e-9)
    assert cell.gain.value == pytest.approx(statistics.fmean(gains), abs=1e-9)
    assert cell.gain.error == pytest.approx(statistics.stdev(gains) / 3**0.5, abs=1e-9)
    assert cell.exact.value == pytest.approx(statistics.fmean(row[1] for row in rows[1::2]))
    assert result.gain == cell.gain


def test_a_seed_repeats_itself_and_others_do_not(demo_model: Path) -> None:
    pair = load_pair(demo_model, demo_model, dtype=None)

    def probe(seed: int) -> Any:
        return measure_retrieval(
            pair, built_in_text(), lengths=[64], depths=[0, 100], trials=2, seed=seed
        )

    assert probe(3) == probe(3)
    assert probe(3).gain.value != probe(4).gain.value
    assert probe(3).gain.difference == probe(3).gain.difference_error == 0.0


def test_paired_errors_are_those_of_the_differences() -> None:
    ours, theirs = [1.0, 4.0, 2.0, 9.0], [2.0, 4.5, 3.5, 9.0]
    result = paired_mean(ours, theirs)
    # differences -1, -0.5, -1.5, 0: mean -0.75, squares about it sum to 1.25
    assert result.value == 4.0
    assert result.source == 4.75
    assert result.difference == -0.75
    assert result.difference_error == pytest.approx(math.sqrt(1.25 / 3 / 4))
    assert result.error == pytest.approx(math.sqrt(38 / 3 / 4))
    assert paired_mean([5.0], None).error is None
    with pytest.raises(ValueError, match="zip"):
        paired_mean(ours, theirs[:2])


def test_lengths_follow_the_model() -> None:
    assert default_lengths(512) == [128, 256, 512]
    assert default_lengths(131_072) == [1024, 2048, 4096]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lengths": []}, "--lengths is empty"),
        ({"lengths": [20]}, "too short"),
        ({"depths": [101]}, "--depths 101"),
        ({"key": "colours"}, "--key colours"),
    ],
)
def test_impossible_probes_are_refused(demo_model: Path, wrong: dict[str, Any], words: str) -> None:
    pair = Pair("copier", load_tokenizer(demo_model), Copier(512), None)
    with pytest.raises(UsageError, match=words):
        measure_retrieval(pair, built_in_text(), **wrong)


def test_lengths_past_what_the_model_was_made_for(demo_model: Path) -> None:
    """With RoPE they are measured and said, with a table of positions they cannot be."""
    model, warnings = Copier(512, limit=64), list[str]()
    pair = Pair("copier", load_tokenizer(demo_model), model, None)
    how: dict[str, Any] = {"lengths": [60, 128], "depths": [0], "trials": 2}
    result = measure_retrieval(pair, built_in_text(), **how, warn=warnings.append)
    assert [(cell.length, cell.exact.value) for cell in result.cells] == [(60, 1.0), (128, 1.0)]
    (warning,) = warnings
    assert warning.startswith("--lengths 128 is more than the 64 tokens that copier was made for")
    source = Copier(512)
    source.config = GPT2Config(n_positions=100)  # type: ignore[assignment]
    pair = Pair("copier", load_tokenizer(demo_model), model, source)
    with pytest.raises(UsageError, match="--lengths 128 is more than the 100 positions of its sou"):
        measure_retrieval(pair, built_in_text(), **how)


@pytest.mark.parametrize("spoilt", ["text", "key"])
def test_tokens_without_a_row_are_refused(demo_model: Path, spoilt: str) -> None:
    """A model of 40 rows, too few for the text; one of 300, too few for the key alone."""
    text = built_in_text() if spoilt == "text" else Text("aaa", "0", ["a" * 9])
    tokenizer = load_tokenizer(demo_model)
    rows = {"text": 40, "key": 1 + max(tokenizer("a" * 9)["input_ids"])}[spoilt]
    pair = Pair("copier", tokenizer, Copier(512), Copier(rows))
    with pytest.raises(InputModelError, match=f"{text.name} has the token .* has {rows} rows"):
        measure_retrieval(pair, text, lengths=[64], trials=1)


def test_logits_that_are_no_numbers_are_an_error(demo_model: Path) -> None:
    class Broken(Copier):
        def __call__(self, tokens: torch.Tensor, **options: Any) -> Any:
            return SimpleNamespace(logits=super().__call__(tokens, **options).logits * math.nan)

    pair = Pair("broken", load_tokenizer(demo_model), Broken(512), None)
    with pytest.raises(VerificationError, match="NaN"):
        measure_retrieval(pair, built_in_text(), lengths=[64], trials=1)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), "-q"])


def test_the_command_measures_text_and_keys_and_saves_both(
    demo_model: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "mqa", tmp_path / "words.txt"
    text.write_text("Petra is in the kitchen with a brown hat. " * 40)
    convert(make_recipe({"method": "mqa", "source": str(demo_model), "output": str(out)}))
    probe = ["--retrieval", "--lengths", "48,64", "--depths", "0,100", "--trials", "2"]
    measure = ["eval", out, "--text", text, "--context", "64", "--samples", "2", *probe]
    for _ in range(2):  # the same measurements again replace themselves
        result = run(*measure, "--against", demo_model, "--save", "--json")
        assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    saved = json.loads((out / "kvpatch.json").read_text())
    assert saved["retrieval"] == [printed.pop("retrieval")]
    assert saved["evaluations"] == [printed]
    card = (out / "README.md").read_text()
    assert card.count("### Retrieval") == 1
    gain = saved["retrieval"][0]["cells"][1]["gain"]
    row = f"| 100 % | {gain['value']:.2f} ({gain['source']:.2f}) |"
    assert row in card
    assert f"{gain['difference']:+.2f} ± {gain['difference_error']:.2f}" in card
    assert run("verify", out, "--files-only").exit_code == 0
    assert run("eval", out, *probe, "--save").exit_code == 0
    assert "Perplexity" not in run("eval", out, *probe).stdout
    saved = json.loads((out / "kvpatch.json").read_text())
    assert [len(saved[name]) for name in ("evaluations", "retrieval")] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to measure"),
        (["--retrieval", "--lengths", "64,many"], "--lengths 64,many"),
        (["--retrieval", "--depths", ""], "--depths"),
        (["--tasks", "arc_easy", "--lengths", "64"], "--lengths is for --retrieval, which is not"),
        (["--retrieval", "--context", "64"], "--context is for --text"),
        (["--retrieval", "--num-fewshot", "1"], "--num-fewshot is for --tasks"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    demo_model: Path, flags: list[str], words: str
) -> None:
    result = run("eval", demo_model, *flags)
    assert result.exit_code == 2
    assert words in result.stderr
