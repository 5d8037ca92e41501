"""Documents of files: plain text, JSON lines, a JSON array, or a column of parquet.

A row has its text under the key ``text``; null and the empty text are no text, which readers give
as "" for whoever reads to count. Nothing is read as something else: what is not text is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kvpatch.errors import UsageError

__all__ = ["is_plain", "open_text", "read_documents", "row_text", "skipped_documents"]

_COLUMN = "text"
_SHOWN = 60  # characters of a value in a message
_KINDS: Mapping[type, str] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
# tables and settings, which raw text would give away column by column
_NOT_PLAIN = frozenset({".csv", ".tsv", ".yaml", ".yml"})
_UNPACK, _RECODE = "Unpack it first.", "Convert it first: iconv -f ENCODING -t UTF-8 FILE > NEW."
_MAGIC = (
    (b"\x1f\x8b", "it is compressed (gzip)", _UNPACK),
    (b"BZh", "it is compressed (bzip2)", _UNPACK),
    (b"\xfd7zXZ", "it is compressed (xz)", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "it is compressed (zstd)", _UNPACK),
    (b"PK\x03\x04", "it is a zip archive", _UNPACK),
    (b"\xff\xfe", "it is UTF-16 or binary", _RECODE),
    (b"\xfe\xff", "it is UTF-16 or binary", _RECODE),
)


@dataclass(frozen=True, slots=True)
class _Form:
    """A form of rows that is known but not read: its keys, what it is, and how to make text of it.

    The last is an expression in the row.
    """

    keys: tuple[str, ...]
    what: str
    text: str


_TEMPLATE = "tokenizer.apply_chat_template({}, tokenize=False)"
_FORMS = (
    _Form(("messages",), "chat messages", _TEMPLATE.format('row["messages"]')),
    _Form(("conversations",), "chat turns", _TEMPLATE.format("messages made of them")),
    _Form(("prompt", "completion"), "prompts and completions", 'row["prompt"] + row["completion"]'),
    _Form(
        ("instruction", "output"),
        "instructions and outputs (alpaca)",
        '"\\n".join(filter(None, (row["instruction"], row.get("input"), row["output"])))',
    ),
)


def read_documents(path: Path, *, most: int | None = None) -> Iterator[str]:
    """Documents of a file, "" for those that have no text.

    ``.jsonl`` and ``.ndjson`` hold an object with the key ``text`` in every line, ``.json`` an
    array of such objects or of texts, ``.parquet`` a column ``text``; anything else is one document
    as it stands, in UTF-8.

    Args:
        path: The file.
        most: Read no more than so many characters of text; all if None.

    Raises:
        UsageError: If it cannot be read, or something in it is not text; with the line or row.
    """
    if is_plain(path):
        with open_text(path) as stream:
            content = stream.read(-1 if most is None else most)
        yield from [content] if content else []
        return
    left = most
    for document in _READERS[path.suffix.lower()](path):
        yield document[:left]
        if left is not None:
            left -= len(document)
            if left <= 0:
                return


def is_plain(path: Path) -> bool:
    """Whether a file is one document as it stands; its name says so.

    Raises:
        UsageError: If it is neither that nor in rows that are read.
    """
    suffix = path.suffix.lower()
    if suffix in _NOT_PLAIN:
        raise UsageError(
            f"{path}: {suffix} is not read as text",
            hint='Make a .jsonl with the key "text" of it, or name it .txt to take it as it '
            "stands.",
        )
    return suffix not in _READERS


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file, open for reading; a byte order mark is no part of it.

    Raises:
        UsageError: If it cannot be read, also while it is.
    """
    with _readable(path), path.open(encoding="utf-8-sig") as stream:
        yield stream


def row_text(row: Any, where: str) -> str:
    """Text of a row, "" if it has none.

    Args:
        row: As parsed.
        where: It stands, for messages.

    Raises:
        UsageError: If it is no object with a text, or null, under the key ``text``.
    """
    if not isinstance(row, Mapping) or _COLUMN not in row:
        keys = isinstance(row, Mapping) and f"the keys {', '.join(map(str, row))}"
        raise UsageError(
            f'{where}: expected an object with a key "text", found {keys or _kind(row)}',
            hint=_hint(row if keys else ()),
        )
    value = row[_COLUMN]
    if value is None:
        return ""
    if not isinstance(value, str):
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise UsageError(
            f'{where}: expected a text or null under "text", found {_kind(value)}: {shown}'
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: the text has half a surrogate pair at character {error.start}, which is no "
            "character",
            hint="Such halves are left where text was cut inside an emoji: remove them.",
        ) from error
    return value


def skipped_documents(name: str, count: int) -> list[str]:
    """What to say of so many documents without text, if there are any."""
    if not count:
        return []
    return [f"documents of {name} that have no text (null or empty) and are skipped: {count:,}"]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        what, hint = _undecodable(path, error)
        raise UsageError(f"cannot read the text {path}: {what}", hint=hint) from error
    except IsADirectoryError as error:
        raise UsageError(
            f"cannot read the text {path}: it is a folder", hint="Give one file."
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror or error}") from error


def _undecodable(path: Path, error: UnicodeDecodeError) -> tuple[str, str]:
    """What a file is that is not UTF-8, and what to do."""
    with path.open("rb") as stream:
        head = stream.read(8)
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            return what, hint
    return f"it is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}", _RECODE


def _json_lines(path: Path) -> Iterator[str]:
    with open_text(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UsageError(
                        f'{where}: expected an object with a key "text", found no JSON: {error}',
                        hint="Every line is an object of its own.",
                    ) from error
                yield row_text(row, where)


def _json_array(path: Path) -> Iterator[str]:
    wanted = 'expected an array of texts, or of objects with a key "text"'
    with open_text(path) as stream:
        content = stream.read()
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: {wanted}, found no JSON: {error}",
            hint="If every line is an object of its own, name it .jsonl.",
        ) from error
    if not isinstance(rows, list):
        keys = rows if isinstance(rows, Mapping) else ()
        raise UsageError(f"{path}: {wanted}, found {_kind(rows)}", hint=_hint(keys))
    for number, row in enumerate(rows, 1):
        whole = row is None or isinstance(row, str)
        yield row_text({_COLUMN: row} if whole else row, f"{path}, item {number}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow", hint="pip install 'kvpatch[parquet]'"
        ) from error
    try:
        with _readable(path), parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if _COLUMN not in columns:
                raise UsageError(
                    f'{path} has no column "text": {", ".join(columns)}', hint=_hint(columns)
                )
            batches = file.iter_batches(columns=[_COLUMN], batch_size=256)
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, 1):
                yield row_text({_COLUMN: value}, f"{path}, row {number}")
    except ArrowException as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error


_READERS: Mapping[str, Callable[[Path], Iterator[str]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".parquet": _parquet,
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _hint(keys: Iterable[str]) -> str:
    """How to give rows with these keys a text."""
    present = set(keys)
    for form in _FORMS:
        if present.issuperset(form.keys):
            return f'These are {form.what}; write a row of "text" for each: {form.text}.'
    return 'Give each row its text under the key "text".'
