"""Documents of files: every format gives the same, and nothing is read as something else."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from convert.documents import read_documents
from kvpatch.errors import UsageError

DOCUMENTS = ["one fish", "two\nfish", "", "réd\u2028fish", "", "blue\rfish"]
_ROWS = [{"id": n, "text": text} for n, text in enumerate(DOCUMENTS)]
_ROWS[4] = {"id": 4, "text": None}
_LINES = [json.dumps(row, ensure_ascii=False) for row in _ROWS]
_BOM = b"\xef\xbb\xbf"


def _file_name(value: object) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"\w+\.\w+", value) else ""


def _parquet(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(_LINES).encode()),
        ("a.ndjson", "\n\n".join([*_LINES, " "]).encode()),
        ("a.JSONL", "\r\n".join([*_LINES, ""]).encode()),
        ("bom.jsonl", _BOM + "\n".join(_LINES).encode()),
        ("rows.json", json.dumps(_ROWS, indent=1).encode()),
        ("bom.json", _BOM + json.dumps(_ROWS).encode()),
        ("texts.json", json.dumps([*DOCUMENTS[:4], None, DOCUMENTS[5]]).encode()),
        ("mixed.json", json.dumps([*_ROWS[:3], DOCUMENTS[3], *_ROWS[4:]]).encode()),
    ],
    ids=_file_name,
)
def test_rows_are_read_document_by_document(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(tmp_path / name)) == DOCUMENTS


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()], ids=str)
def test_a_column_is_read_document_by_document(tmp_path: Path, kind: Any) -> None:
    texts = pyarrow.array([row["text"] for row in _ROWS], kind)
    path = _parquet(tmp_path / "text.parquet", id=list(range(6)), text=texts)
    assert list(read_documents(path)) == DOCUMENTS
    coded = _parquet(tmp_path / "coded.parquet", text=texts.dictionary_encode())
    assert list(read_documents(coded)) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.py", "a.jsonl.txt"])
def test_anything_else_is_one_document_as_it_stands(tmp_path: Path, name: str) -> None:
    content = '{"text": "x"}\n\na: 1,2\n'
    (tmp_path / name).write_bytes(_BOM + content.encode())
    assert list(read_documents(tmp_path / name)) == [content]
    (tmp_path / name).write_bytes(_BOM)
    assert list(read_documents(tmp_path / name)) == []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("most", [1, 5, 9, 13, 100])
def test_no_more_is_read_than_asked_for(tmp_path: Path, name: str, most: int) -> None:
    texts = ["12345", "6789", "", "0123"]
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / name).write_text(rows if name.endswith("l") else "".join(texts))
    assert "".join(read_documents(tmp_path / name, most=most)) == "".join(texts)[:most]


def test_what_follows_what_is_asked_for_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\nno JSON')
    assert list(read_documents(tmp_path / "a.jsonl", most=3)) == ["abc"]


_TEXT = json.dumps({"text": "x"})
_CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
_ALPACA = {"instruction": "Sum up.", "input": "", "output": "So."}
# content of a file, what is said of it after its name, and of its hint
_REFUSED: dict[str, tuple[str, Any, str, str]] = {
    "number": ("a.jsonl", {"text": 3}, ':2: expected a text or null under "text", found a num', ""),
    "truth": ("a.jsonl", {"text": True}, ":2: expected a text .*, found a boolean: True", ""),
    "list": ("a.jsonl", {"text": ["a"]}, r":2: expected a text .*, found a list: \['a'\]", ""),
    "object": (
        "a.jsonl",
        {"text": {"a": "b" * 99}},
        r":2: .* found an object: \{'a': 'b+\.\.\.",
        "",
    ),
    "half a pair": (
        "a.jsonl",
        {"text": "a\ud83d"},
        ":2: .* surrogate pair at character 1",
        "emoji",
    ),
    "null row": ("a.jsonl", None, ':2: expected an object with a key "text", found null', "text"),
    "text row": ("a.jsonl", "abc", ":2: expected an object .*, found a text", ""),
    "list row": ("a.jsonl", ["text"], ":2: expected an object .*, found a list", ""),
    "other key": ("a.jsonl", {"content": "x"}, ":2: expected .*, found the keys content", '"text"'),
    "chat": ("a.jsonl", _CHAT, ":2: .* found the keys messages", "apply_chat_template"),
    "turns": ("a.jsonl", {"conversations": []}, ":2: .* conversations", "apply_chat_template"),
    "prompts": ("a.jsonl", {"prompt": "a", "completion": "b"}, ":2", r'\["prompt"\] \+ row\["com'),
    "alpaca": ("a.jsonl", _ALPACA, ":2: .* found the keys instruction, input, output", "alpaca"),
    "number in an array": (
        "a.json",
        [_CHAT | {"text": "x"}, {"text": 3}],
        ", item 2: .*number",
        "",
    ),
    "list in an array": ("a.json", ["x", ["y"]], ", item 2: expected an object .* a list", ""),
    "alpaca array": ("a.json", [_ALPACA], ", item 1: .* found the keys instruction", "alpaca"),
    "one chat": (
        "a.json",
        _CHAT,
        ": expected an array of texts, .* found an object",
        "chat messag",
    ),
    "one text": ("a.json", "x", ": expected an array of texts, .* found a text", ""),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_rows_that_are_no_text_are_refused_by_name(tmp_path: Path, case: str) -> None:
    name, value, said, hint = _REFUSED[case]
    path = tmp_path / name
    path.write_text(f"{_TEXT}\n{json.dumps(value)}\n" if "jsonl" in name else json.dumps(value))
    with pytest.raises(UsageError, match=f"^{path}{said}") as caught:
        list(read_documents(path))
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content", "said", "hint"),
    [
        (
            "torn.jsonl",
            b'{"text": "x"\n',
            ':1: expected an object with a key "text", found no J',
            "",
        ),
        ("deep.jsonl", b"[" * 99_999, ":1: expected an object .* found no JSON", ""),
        ("torn.json", b'[{"text": "x"}', ": expected an array .*, found no JSON", ""),
        ("lines.json", b'{"text": "x"}\n{"text": "y"}\n', ": expected an array", "name it .jsonl"),
        ("empty.json", b"", ": expected an array .*, found no JSON", ""),
        ("table.csv", b"text\nx\n", ": .csv is not read as text", "name it .txt"),
        ("table.TSV", b"text\nx\n", ": .tsv is not read as text", ".jsonl"),
        ("a.yaml", b"- text: x\n", ": .yaml is not read as text", ".jsonl"),
    ],
    ids=_file_name,
)
def test_files_that_are_something_else_are_refused(
    tmp_path: Path, name: str, content: bytes, said: str, hint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^{path}{said}") as caught:
        list(read_documents(path))
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(_TEXT.encode()), "it is compressed (gzip)"),
        (bz2.compress(_TEXT.encode()), "it is compressed (bzip2)"),
        (lzma.compress(_TEXT.encode()), "it is compressed (xz)"),
        (b"\x28\xb5\x2f\xfd rest", "it is compressed (zstd)"),
        ("café".encode("utf-16"), "it is UTF-16 or binary"),
        ("café ".encode("latin-1"), "it is not UTF-8: byte 0xe9"),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "utf-16", "latin-1"],
)
def test_bytes_that_are_no_utf_8_are_named(
    tmp_path: Path, suffix: str, content: bytes, said: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(read_documents(path))
    assert caught.value.message.startswith(f"cannot read the text {path}: {said}")
    assert caught.value.hint in {
        "Unpack it first.",
        "Convert it first: iconv -f ENCODING -t UTF-8 FILE > NEW.",
    }


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
def test_folders_and_absent_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(UsageError, match=f"cannot read the text {path}: "):
        list(read_documents(path))
    path.mkdir()
    with pytest.raises(UsageError, match=f"cannot read the text {path}: "):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"body": ["x"], "n": [1]}, ' has no column "text": body, n'),
        ({"prompt": ["x"], "completion": ["y"]}, ' has no column "text": prompt, completion'),
        ({"text": [None, 3]}, ', row 2: expected a text or null under "text", found a number: 3'),
        ({"text": [b"x"]}, ", row 1: .* found bytes: b'x'"),
        ({"text": [None, ["x"]]}, r", row 2: .* found a list: \['x'\]"),
        ({"text": [{"a": "x"}]}, ", row 1: .* found an object"),
    ],
    ids=["absent", "prompts", "numbers", "bytes", "lists", "objects"],
)
def test_columns_that_are_no_text_are_refused(
    tmp_path: Path, columns: dict[str, list[Any]], said: str
) -> None:
    path = _parquet(tmp_path / "text.parquet", **columns)
    with pytest.raises(UsageError, match=f"^{path}{said}"):
        list(read_documents(path))


@pytest.mark.parametrize("damage", ["start", "middle"])
def test_what_is_no_whole_parquet_is_refused(tmp_path: Path, damage: str) -> None:
    path = _parquet(tmp_path / "text.parquet", text=["fish" * 99, "b" * 400] * 50)
    content = bytearray(path.read_bytes())
    content[4:90] = b"\xff" * 86
    path.write_bytes(b"PAR1 but not really" if damage == "start" else bytes(content))
    with pytest.raises(UsageError, match="cannot read the text"):
        list(read_documents(path))
