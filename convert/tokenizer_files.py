"""The files of a tokenizer: why transformers cannot load them, and tokens that the model lacks.

transformers says of much that goes wrong with a tokenizer only that it went wrong, and of a
sentencepiece model without its package that another package is missing; the files tell more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from convert.checkpoint.paths import guarded_path
from convert.checkpoint.safetensors_header import check_magic
from kvpatch.errors import InputModelError

__all__ = ["has_vocabulary", "refusal", "tokenizer_warnings", "tokens_past"]

_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_VOCABULARY = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json", "encoder.json")
_REASON = 200  # characters of what transformers says
_SHOWN = 3  # tokens in a warning


class _Why(NamedTuple):
    """Why a tokenizer does not load, and what to do."""

    reason: str
    hint: str


def has_vocabulary(folder: Path) -> bool:
    """Whether a checkpoint has a file with the vocabulary of a tokenizer."""
    return any(next(folder.glob(pattern), None) is not None for pattern in _VOCABULARY)


def refusal(folder: Path, error: Exception | None) -> InputModelError:
    """The error of a tokenizer that transformers cannot load.

    Args:
        folder: Checkpoint folder.
        error: What it raised; None if it made a tokenizer without tokens.
    """
    why = (
        _damaged(folder)
        or _remote(folder)
        or _absent(folder)
        or _package(folder)
        or _Why(_quoted(error), "Check its files, or download them again.")
    )
    return InputModelError(
        f"{folder} has no tokenizer that transformers can load: {why.reason}", hint=why.hint
    )


def tokens_past(folder: Path, rows: int) -> dict[str, int]:
    """Ids of a checkpoint's tokens past its embedding table; transformers is not needed.

    Args:
        folder: Checkpoint folder.
        rows: Of the embedding table.

    Raises:
        InputModelError: If a file is damaged.
    """
    try:
        return {token: number for token, number in _tokens(folder) if number >= rows}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputModelError(
            f"{folder}: the files of the tokenizer are not of the usual form: {_quoted(error)}"
        ) from error


def tokenizer_warnings(folder: Path, rows: int) -> list[str]:
    """What to say of a tokenizer when its checkpoint is opened; it need not be used.

    Args:
        folder: Checkpoint folder.
        rows: Of the embedding table.
    """
    try:
        past = tokens_past(folder, rows)
    except InputModelError as error:
        return [error.message]
    if not past:
        return []
    shown = ", ".join(f"{token!r} is {number}" for token, number in [*past.items()][:_SHOWN])
    more = ", ..." if len(past) > _SHOWN else ""
    count = "1 token" if len(past) == 1 else f"{len(past):,} tokens"
    where = f"past the {rows:,} rows of the embedding table ({shown}{more})"
    return [f"the tokenizer has {count} {where}: texts with such tokens are refused"]


def _tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """Tokens with their ids, one of them more than once, as far as JSON files hold them."""
    whole = _read_json(folder, "tokenizer.json")
    vocabulary = whole.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # pieces with their scores, in the order of the ids
        yield from ((piece[0], number) for number, piece in enumerate(vocabulary))
    else:
        yield from vocabulary.items()
    yield from ((token["content"], token["id"]) for token in whole.get("added_tokens", ()))
    yield from _read_json(folder, "added_tokens.json").items()
    decoder = _read_json(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    yield from ((token["content"], int(number)) for number, token in decoder.items())


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object from a file, empty if there is none.

    Raises:
        InputModelError: If it is damaged.
    """
    path = guarded_path(folder, name)
    if not path.is_file():
        return {}
    again = f"Download {name} again."
    try:
        content = path.read_bytes()
        check_magic(content[:64], len(content), name, wanted="a tokenizer")
        value = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise InputModelError(f"{name} is damaged: {error}", hint=again) from error
    if not isinstance(value, dict):
        raise InputModelError(f"{name} is damaged: it is not a JSON object", hint=again)
    return value


def _absent(folder: Path) -> _Why | None:
    if has_vocabulary(folder):
        return None
    return _Why(
        f"it has no vocabulary, which is in one of {', '.join(_VOCABULARY)}",
        "Put the tokenizer's files beside config.json, from the model that it was made from.",
    )


def _damaged(folder: Path) -> _Why | None:
    """The first of the files that is not what its name says."""
    from tokenizers import Tokenizer, __version__  # noqa: PLC0415

    try:
        for path in _models(folder):
            check_magic(_head(path), path.stat().st_size, path.name, wanted="a tokenizer")
        for name in _JSON:
            _read_json(folder, name)
    except InputModelError as error:
        return _Why(error.message, error.hint or "")
    whole = folder / "tokenizer.json"
    if whole.is_file():
        try:
            Tokenizer.from_file(str(whole))
        except Exception as error:  # the package raises no other
            return _Why(
                f"tokenizer.json is not one for tokenizers {__version__}: {_quoted(error)}",
                "Download tokenizer.json again, or update the package tokenizers.",
            )
    return None


def _remote(folder: Path) -> _Why | None:
    mapped = _read_json(folder, "tokenizer_config.json").get("auto_map")
    found = mapped.get("AutoTokenizer") if isinstance(mapped, Mapping) else mapped
    if not found:
        return None
    names = found if isinstance(found, list) else [found]
    code = next((name for name in reversed(names) if name), None)
    return _Why(
        f"it needs code that comes with it ({code}), which kvpatch never runs",
        "Save it as a tokenizer.json, with code that you trust, and remove auto_map from "
        "tokenizer_config.json.",
    )


def _package(folder: Path) -> _Why | None:
    """Packages that are missing for the kind of vocabulary that is there."""
    if (folder / "tokenizer.json").is_file():
        return None
    for path in _models(folder):
        pieces = _head(path).startswith(b"\n")  # the tag of the first field of its message
        kind = "sentencepiece" if pieces else "tiktoken"
        needed = ("sentencepiece", "protobuf") if pieces else ("tiktoken",)
        missing = [package for package in needed if not _installed(package)]
        if missing:
            return _Why(
                f"{path.name} is a {kind} model, and what reads it is not installed: "
                f"{' and '.join(missing)}",
                f"pip install {' '.join(missing)}",
            )
    return None


def _models(folder: Path) -> list[Path]:
    """Files of vocabularies that are no JSON."""
    return sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(64)


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _quoted(error: Exception | None) -> str:
    """What an error says, on one line and not too long."""
    if error is None:
        return "it has no tokens"
    said = " ".join(str(error).split())
    said = said if len(said) <= _REASON else f"{said[:_REASON]}..."
    return f"{type(error).__name__}: {said}"
