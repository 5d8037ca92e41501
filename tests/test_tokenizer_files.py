"""Tokenizers that do not load are refused with the reason, and tokens without a row are found."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from convert.loading import load_tokenizer, quiet_transformers
from convert.tokenizer_files import tokenizer_warnings, tokens_past
from kvpatch.errors import InputModelError
from tests.families.texts import write_tokenizer

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# one piece, "a", of a sentencepiece model: field 1, two bytes, of which field 1 is the piece
_PIECES = b"\n\x03\n\x01a"
_RANKS = base64.b64encode(b"a") + b" 0\n"


def _json(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def _replaced(folder: Path, name: str, content: bytes, **settings: Any) -> None:
    """Another vocabulary in the place of tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _cut(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text()[:99])


_CODE = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
_LLAMA = {"tokenizer_class": "LlamaTokenizer"}
_BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "none": (
        lambda folder: _without(folder, "tokenizer.json", "tokenizer_config.json"),
        "it has no vocabulary, which is in one of tokenizer.json",
        "beside config.json",
    ),
    "settings alone": (
        lambda folder: _without(folder, "tokenizer.json"),
        "it has no vocabulary",
        "beside config.json",
    ),
    "cut": (
        lambda folder: _cut(folder, "tokenizer.json"),
        "tokenizer.json is damaged: ",
        "Download tokenizer.json again",
    ),
    "empty": (
        lambda folder: (folder / "tokenizer.json").write_text("") and None,
        "tokenizer.json is damaged: Expecting value",
        "Download tokenizer.json again",
    ),
    "a list": (
        lambda folder: (folder / "tokenizer.json").write_text("[]") and None,
        "tokenizer.json is damaged: it is not a JSON object",
        "Download tokenizer.json again",
    ),
    "pointer": (
        lambda folder: (folder / "tokenizer.json").write_text(_POINTER) and None,
        "tokenizer.json is a Git LFS pointer, not a tokenizer",
        "git lfs pull",
    ),
    "unknown model": (
        lambda folder: _json(folder, "tokenizer.json", model={"type": "XYZ"}),
        "tokenizer.json is not one for tokenizers ",
        "update the package tokenizers",
    ),
    "settings cut": (
        lambda folder: _cut(folder, "tokenizer_config.json"),
        "tokenizer_config.json is damaged: ",
        "Download tokenizer_config.json again",
    ),
    "code": (
        lambda folder: _replaced(folder, "words.x", b"", auto_map=_CODE, tokenizer_class="X"),
        "it needs code that comes with it (tokenization_x.XTokenizer), which kvpatch never runs",
        "with code that you trust",
    ),
    "sentencepiece": (
        lambda folder: _replaced(folder, "tokenizer.model", _PIECES, **_LLAMA),
        "tokenizer.model is a sentencepiece model, and what reads it is not installed: sentence",
        "pip install sentencepiece protobuf",
    ),
    "tiktoken": (
        lambda folder: _replaced(folder, "tokenizer.model", _RANKS, **_LLAMA),
        "tokenizer.model is a tiktoken model, and what reads it is not installed: tiktoken",
        "pip install tiktoken",
    ),
    "pointer to pieces": (
        lambda folder: _replaced(folder, "tokenizer.model", _POINTER.encode(), **_LLAMA),
        "tokenizer.model is a Git LFS pointer, not a tokenizer",
        "git lfs pull",
    ),
    "another": (
        lambda folder: _replaced(folder, "vocab.x", b"", tokenizer_class="XTokenizer"),
        "",
        "download them again",
    ),
}
_NEEDED = {"sentencepiece": ("sentencepiece", "protobuf"), "tiktoken": ("tiktoken",)}


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without weights, whose tokenizer loads."""
    LlamaConfig(vocab_size=97).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with quiet_transformers():
        assert load_tokenizer(tmp_path)("ab")["input_ids"] == [67, 68]
    return tmp_path


@pytest.mark.parametrize("case", _BROKEN)
def test_what_does_not_load_is_refused_with_the_reason(folder: Path, case: str) -> None:
    if any(map(_installed, _NEEDED.get(case, ()))):
        pytest.skip(f"what reads {case} models is installed")
    spoil, reason, hint = _BROKEN[case]
    spoil(folder)
    with quiet_transformers(), pytest.raises(Exception) as theirs:  # noqa: PT011
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with quiet_transformers(), pytest.raises(InputModelError) as ours:
        load_tokenizer(folder)
    said = f"{folder} has no tokenizer that transformers can load: "
    assert ours.value.message.startswith(said + reason)
    assert hint in (ours.value.hint or "")
    if not reason:
        words = " ".join(str(theirs.value).split())[:100]
        assert ours.value.message.startswith(f"{said}{theirs.typename}: {words}")
        assert len(ours.value.message) < len(said) + 300


@pytest.mark.parametrize("present", [(), ("protobuf",), ("sentencepiece",)], ids=str)
def test_only_what_is_missing_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...]
) -> None:
    monkeypatch.setattr("convert.tokenizer_files._installed", lambda package: package in present)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: 1 / 0)
    _replaced(folder, "tokenizer.model", _PIECES, **_LLAMA)
    missing = [package for package in _NEEDED["sentencepiece"] if package not in present]
    with pytest.raises(InputModelError, match=" and ".join(missing) + "$") as caught:
        load_tokenizer(folder)
    assert caught.value.hint == f"pip install {' '.join(missing)}"


def test_an_empty_tokenizer_of_no_files_is_none(tmp_path: Path) -> None:
    """transformers makes one of nothing for GPT-2, in which every text has no tokens."""
    GPT2Config().save_pretrained(tmp_path)
    with quiet_transformers():
        assert AutoTokenizer.from_pretrained(tmp_path)("text")["input_ids"] == []
        with pytest.raises(InputModelError, match="it has no vocabulary"):
            load_tokenizer(tmp_path)


def _characters() -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))


def _unigram() -> Tokenizer:
    return Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0), ("c", -3.0)], unk_id=0))


def _words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))


@pytest.mark.parametrize("make", [_characters, _unigram, _words])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("form", ["whole", "added alone", "settings alone"])
def test_tokens_past_a_table_are_those_of_transformers(
    make: Callable[[], Tokenizer], rows: int, form: str, tmp_path: Path
) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=make())
    fast.add_tokens(["<tool>", AddedToken("<end>", special=True)])
    fast.save_pretrained(tmp_path)
    vocabulary: dict[str, int] = fast.get_vocab()
    wanted = {token: number for token, number in vocabulary.items() if number >= rows}
    added = {token: number for token, number in wanted.items() if token.startswith("<")}
    if form == "added alone":
        _without(tmp_path, "tokenizer.json", "tokenizer_config.json")
        (tmp_path / "added_tokens.json").write_text(json.dumps(fast.get_added_vocab()))
    if form == "settings alone":
        _without(tmp_path, "tokenizer.json")
        decoder = {n: {"content": t} for t, n in fast.get_added_vocab().items()}
        _json(tmp_path, "tokenizer_config.json", added_tokens_decoder=decoder)
    assert tokens_past(tmp_path, rows) == (wanted if form == "whole" else added)


def test_warnings_name_some_tokens(folder: Path, demo_model: Path) -> None:
    assert tokenizer_warnings(folder, 97) == []
    said = (
        "the tokenizer has 2 tokens past the 95 rows of the embedding table ('}' is 95, '~' is 96)"
    )
    assert tokenizer_warnings(folder, 95) == [f"{said}: texts with such tokens are refused"]
    assert "('z' is 92, '{' is 93, '|' is 94, ...)" in tokenizer_warnings(folder, 92)[0]
    shutil.copy(demo_model / "tokenizer.json", folder)
    assert tokenizer_warnings(folder, 512) == []
    for spoilt in ("[]", '{"added_tokens": 3}', '{"model": {"vocab": {"a": "b"}}}', "{"):
        (folder / "tokenizer.json").write_text(spoilt)
        (warning,) = tokenizer_warnings(folder, 512)
        assert "tokenizer" in warning
    _without(folder, "tokenizer.json", "tokenizer_config.json")
    assert tokenizer_warnings(folder, 512) == []
