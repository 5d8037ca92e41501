"""Packing, and going on where a stream was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.loading import load_tokenizer
from convert.tokens import TextTokens
from convert.training.data import (
    IGNORED,
    Batch,
    Encoder,
    Piece,
    Sequences,
    check_text,
    pieces_of,
    stack,
)
from kvpatch.errors import InputModelError, UsageError
from tests.families.texts import token_ids, write_tokenizer


def _encode(piece: Piece) -> list[int]:
    return [ord(character) for character in piece.text]


def _stream(
    documents: list[str], *, context: int = 8, seed: int | None = None, packed: bool = True
) -> Sequences:
    def pieces() -> Iterator[Piece]:
        return (Piece(text) for text in documents)

    return Sequences(pieces, _encode, context=context, seed=seed, packed=packed)


def _text(tokens: Tensor) -> str:
    return "".join(map(chr, tokens.tolist()))


def test_documents_follow_one_another_and_no_target_crosses() -> None:
    first, second = _stream(["abcde", "fgh", "ijklmnop"]).whole(2)
    assert _text(first.tokens[0]) == "abcdefgh"
    assert first.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert first.targets.tolist() == [[*map(ord, "bcde"), IGNORED, *map(ord, "gh"), IGNORED]]
    assert _text(second.tokens[0]) == "ijklmnop"


def test_a_document_that_is_cut_goes_on_at_position_zero() -> None:
    first, second = _stream(["a" * 10 + "b" * 6]).whole(2)
    assert _text(second.tokens[0]) == "aabbbbbb"
    assert first.positions.tolist() == second.positions.tolist() == [list(range(8))]


def test_unpacked_sequences_hold_one_document_each() -> None:
    found = _stream(["abc", "defghijklm", "no"], packed=False).take(4)
    assert [_text(sequence.tokens[0]).rstrip("\0") for sequence in found] == [
        "abc",
        "defghijk",
        "lm",
        "no",
    ]
    assert found[0].targets.tolist() == [[ord("b"), ord("c"), *[IGNORED] * 6]]


def test_every_token_of_the_text_comes_once_before_it_begins_anew() -> None:
    documents = [chr(97 + index % 26) * (index % 7 + 1) for index in range(300)]
    whole = "".join(documents)
    epoch, both = len(whole) // 8, 2 * len(whole) // 8
    sequences = [_text(s.tokens[0]) for s in _stream(documents, seed=3).take(both)]
    chunks = [(whole * 2)[start : start + 8] for start in range(0, both * 8, 8)]
    assert sorted(sequences[:epoch]) == sorted(chunks[:epoch])
    assert sorted(sequences[epoch:]) == sorted(chunks[epoch:])
    assert sequences[:epoch] != chunks[:epoch]


def test_neighbours_in_a_long_text_are_far_apart() -> None:
    count = 5000
    stream = _stream(["".join(chr(1000 + index) * 8 for index in range(count))], seed=0)
    first = torch.tensor([int(s.tokens[0, 0]) - 1000 for s in stream.take(500)], dtype=torch.float)
    # of numbers that are even over the whole text, with an error of 65 and 33
    assert abs(first.mean() - count / 2) < 260
    assert abs(first.std() - count / 12**0.5) < 130


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 255, 256, 257, 700])
def test_a_restored_stream_goes_on_bit_by_bit(taken: int, packed: bool) -> None:
    documents = [chr(97 + index % 26) * (index % 11 + 1) for index in range(150)]
    stream = _stream(documents, seed=1, packed=packed)
    stream.take(taken)
    state = json.loads(json.dumps(stream.state()))
    want = stream.take(300)
    have = _stream(documents, seed=1, packed=packed).restore(state).take(300)
    for ours, theirs in zip(have, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_how_many_are_taken_at_a_time_changes_nothing() -> None:
    documents = ["abcdefghijklm", "nop", "qrstuvw"]
    one, many = _stream(documents, seed=2), _stream(documents, seed=2)
    singly = stack([one.take(1)[0] for _ in range(300)])
    assert all(map(torch.equal, singly, stack(many.take(300))))


def test_documents_without_text_are_skipped_and_counted_once() -> None:
    """In the first epoch, also by a stream that goes on where another was."""
    documents = ["abcdefgh", "", "ijklmnop", "", ""]
    stream = _stream(documents)
    assert [_text(sequence.tokens[0]) for sequence in stream.take(3)] == [
        "abcdefgh",
        "ijklmnop",
        "abcdefgh",
    ]
    said = ["documents of the text that have no text (null or empty) and are skipped: 3"]
    assert stream.warnings == said
    for state in (stream.state(), _stream(documents).state()):
        later = _stream(documents).restore(state)
        later.take(300)
        assert later.warnings == said
    assert _stream(["abcdefgh"]).warnings == []


def test_a_text_of_nothing_is_refused() -> None:
    with pytest.raises(InputModelError, match="no tokens"):
        _stream([""]).take(1)
    with pytest.raises(InputModelError, match="not one sequence"):
        _stream(["abc"]).whole(1)


def _jsonl(path: Path) -> None:
    path.write_text('{"text": "ab"}\n\n{"text": "cd"}\n')


def _parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["ab", "cd"]}), path)


@pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", _jsonl), ("parquet", _parquet)], ids=["jsonl", "parquet"]
)
def test_documents_of_files(suffix: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / f"text.{suffix}"
    write(path)
    assert list(pieces_of(str(path))()) == [Piece("ab"), Piece("cd")]


def test_a_long_text_is_one_document_in_pieces(tmp_path: Path) -> None:
    path, text = tmp_path / "text.txt", "".join(f"line {n} é\n" for n in range(30_000))
    path.write_text(text)
    pieces = list(pieces_of(str(path))())
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\r\ncd")
    assert list(pieces_of(str(tmp_path / "a.txt"))()) == [Piece("ab\ncd")]


@pytest.mark.parametrize(
    ("rows", "found", "said"),
    [
        ([{"text": "ab"}, {"text": None}, {"text": ""}], [Piece("ab"), Piece(""), Piece("")], None),
        ([{"text": "ab"}, {"text": 3}], [Piece("ab")], "hub:n:c@s, row 2: expected a text or null"),
        ([{"messages": []}], [], 'hub:n:c@s, row 1: expected an object with a key "text", found t'),
    ],
)
def test_rows_of_the_hub_are_read_as_those_of_files(
    monkeypatch: pytest.MonkeyPatch, rows: list[Any], found: list[Piece], said: str | None
) -> None:
    def load_dataset(*arguments: object, **options: object) -> list[Any]:
        assert arguments == ("n", "c")
        assert options == {"split": "s", "streaming": True}
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    pieces, have = pieces_of("hub:n:c@s")(), list[Piece]()
    with nullcontext() if said is None else pytest.raises(UsageError, match=said):
        have.extend(pieces)
    assert have == found


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_empty_files_and_other_texts_are_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("[]" if name == "a.json" else "")
    with pytest.raises(InputModelError, match=f"{path} is empty"):
        check_text(str(path))
    path.write_text('[3, "x"]' if name == "a.json" else '{"text": 3}\n{"text": "x"}')
    with nullcontext() if name == "a.txt" else pytest.raises(UsageError, match=f"{path}"):
        check_text(str(path))
    check_text("hub:not/there")


def test_a_document_is_encoded_between_its_ends_and_refused_past_the_table(
    demo_model: Path,
) -> None:
    tokenizer = load_tokenizer(demo_model)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer("Mia has", add_special_tokens=False)["input_ids"]
    encode = Encoder(TextTokens(tokenizer, 512, "the text"))
    assert encode(Piece("Mia has")) == [begin, *ids, end]
    assert encode(Piece("Mia has", first=False)) == [*ids, end]
    assert encode(Piece("Mia has", last=False)) == [begin, *ids]
    assert Encoder(TextTokens(tokenizer, max(ids) + 1, "the text"))(Piece("Mia has"))
    with pytest.raises(InputModelError, match=f"the text has the token .* the id {max(ids)}, but"):
        Encoder(TextTokens(tokenizer, max(ids), "the text"))(Piece("Mia has"))


def test_what_begins_documents_does_not_end_them(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.bos_token = "<bos>"
    encode = Encoder(TextTokens(tokenizer, 97, "the text"))
    assert encode(Piece("ab")) == token_ids("ab").tolist()


def test_a_text_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the text"):
        list(pieces_of(str(tmp_path / "none.txt"))())


def test_batches_stack() -> None:
    batch = stack(_stream(["abcdefgh" * 3]).whole(3))
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == batch.positions.shape == batch.targets.shape == (3, 8)
