"""Packing, and going on where a stream was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convert.training.data import IGNORED, Batch, Piece, Sequences, pieces_of, stack
from kvpatch.errors import InputModelError, UsageError


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


def test_a_text_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the text"):
        list(pieces_of(str(tmp_path / "none.txt"))())


def test_batches_stack() -> None:
    batch = stack(_stream(["abcdefgh" * 3]).whole(3))
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == batch.positions.shape == batch.targets.shape == (3, 8)
