"""The texts in the source, and which of them are messages of errors."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import NamedTuple

from tests.documents import ROOT

__all__ = ["Text", "texts"]


class Text(NamedTuple):
    """A text in the source; what is filled in is a null.

    Args:
        text: Itself.
        file: Where it stands.
        error: Class of the error that has it as its message, or nothing.
    """

    text: str
    file: str
    error: str = ""


@cache
def texts() -> list[Text]:
    """All of them, of both packages."""
    found = []
    for path in (p for package in ("convert", "kvpatch") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                found.append(Text(_text(node), path.relative_to(ROOT).as_posix()))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                found.append(
                    Text(_text(node.args[0]), path.relative_to(ROOT).as_posix(), node.func.id)
                )
    return found


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"\{\w+\}", "\0", text)
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return _text(left) + _text(right)
        case ast.FormattedValue(value=ast.Name(id="MANIFEST")):
            return "kvpatch.json"
        case ast.FormattedValue(value=ast.Name(id="FUSED")):
            return "kvpatch_triton"
    return "\0"
