"""Writes ``api.md``: what Python programs may call, as the docstrings of the source say it.

The source is read and not imported, so that the page is the same wherever it is made.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGE", "page"]

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("api.md")
_WIDTH = 88
_OPENING = (
    "Made from the docstrings by `make docs`. Shape letters: B batch, T tokens, K keys, H query "
    "heads, Hkv KV heads, D head width, Dv value width, Dr rotary dims, R latent rank, E hidden "
    "width."
)
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$", re.MULTILINE)
_ENTRY = re.compile(r"^([\w.*, ]+): ")
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class _Part:
    """A heading and what stands under it.

    Args:
        title: Heading.
        text: What it is about.
        homes: Module of each name, as ``module:name``; a module alone gives all of its names.
    """

    title: str
    text: str
    homes: Sequence[str]


_PARTS = (
    _Part(
        "convert",
        "Checkpoint in, checkpoint out. The keys of a recipe are those of "
        "[`recipes/README.md`](../recipes/README.md).",
        (
            "convert",
            "convert.evaluate:Evaluation",
            "convert.evaluate:Against",
            "convert.verify:Check",
            "convert.hub.push:Pushed",
            "convert.pipeline:Prepared",
        ),
    ),
    _Part(
        "kvpatch",
        "What a model needs at run time. `import kvpatch` also registers the `kvpatch_*` classes "
        'and `attn_implementation="kvpatch_triton"` with transformers.',
        ("kvpatch", "kvpatch.attention.survey:Route"),
    ),
    _Part("kvpatch.memory", "Sizes of KV caches.", ("kvpatch.memory",)),
    _Part(
        "kvpatch.errors",
        "All errors that a caller can cause; [what they mean on the command line]"
        "(troubleshooting.md).",
        ("kvpatch.errors",),
    ),
    _Part(
        "kvpatch.kernels",
        "The ops themselves, [explained in a page](kernels.md).",
        ("kvpatch.kernels.flash", "kvpatch.kernels.decode", "kvpatch.kernels.reference"),
    ),
)


def page() -> str:
    """The whole page."""
    lines = ["# API reference", "", _OPENING]
    for part in _PARTS:
        lines += ["", f"## {part.title}", "", part.text]
        for home in part.homes:
            for module, node in _definitions(home):
                lines += ["", *_described(node, f"{module}.{node.name}")]
    return "\n".join(lines) + "\n"


def _definitions(home: str) -> Iterator[tuple[str, Definition]]:
    """Module and definition of one name, or of all public names of a module."""
    module, _, name = home.partition(":")
    for each in [name] if name else _public(module):
        found = _find(module, each)
        if found is not None:
            yield module, found


def _tree(module: str) -> ast.Module:
    folder = ROOT / module.replace(".", "/")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return ast.parse(file.read_text())


def _assigned(module: str) -> Mapping[str, ast.expr]:
    return {
        target.id: node.value
        for node in _tree(module).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _public(module: str) -> list[str]:
    names: list[str] = ast.literal_eval(_assigned(module)["__all__"])
    return names


def _find(module: str, name: str) -> Definition | None:
    """The definition of a name, in the module or wherever it takes it from; None of a constant."""
    tree, assigned = _tree(module), _assigned(module)
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return node
    if "_HOMES" in assigned and name in (homes := ast.literal_eval(assigned["_HOMES"])):
        return _find(f"{module}.{homes[name]}", name)
    for imported in ast.walk(tree):
        if isinstance(imported, ast.ImportFrom) and any(a.name == name for a in imported.names):
            return _find(str(imported.module), name)
    return None


def _described(node: Definition, name: str) -> list[str]:
    code = [line.replace("'", '"') for line in _signature(node)]  # as ruff formats it
    lines = [f"### `{name}`", "", "```python", *code, "```", "", *_prose(node)]
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                first, *rest = _prose(member)
                lines += ["", f"**`{_member(member)}`**: {first}", *rest]
    return lines


def _member(node: ast.FunctionDef) -> str:
    """A property by its name, a method as it is called."""
    if _is_property(node):
        return node.name
    return f"{node.name}({', '.join(_split(ast.unparse(node.args))[1:])})"


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and "property" in d.id for d in node.decorator_list)


def _signature(node: Definition) -> list[str]:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        fields = [n for n in node.body if isinstance(n, ast.Assign | ast.AnnAssign)]
        head = f"class {node.name}({bases})" if bases else f"class {node.name}"
        return [head + ":" * bool(fields), *(f"    {ast.unparse(field)}" for field in fields)]
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    arguments = _split(ast.unparse(node.args))
    decorators = [f"@{name}" for name in map(ast.unparse, node.decorator_list) if "context" in name]
    whole = f"def {node.name}({', '.join(arguments)}){returns}"
    if len(whole) <= _WIDTH:
        return [*decorators, whole]
    lines = [f"def {node.name}(", *(f"    {each}," for each in arguments), f"){returns}"]
    return decorators + lines


def _split(arguments: str) -> list[str]:
    """Arguments one by one, defaults set apart; commas inside brackets do not end one."""
    parts, depth = [""], 0
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip().replace("=", " = ", 1) for part in parts]


def _prose(node: Definition) -> list[str]:
    """A docstring as Markdown: prose, then its sections as lists."""
    text = inspect.cleandoc(ast.get_docstring(node) or "").replace("``", "`")
    prose, *sections = _SECTION.split(text)
    lines = [" ".join(block.split()) for block in prose.strip().split("\n\n")]
    lines = [part for line in lines for part in (line, "")][:-1]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        lines += ["", f"{title}:" if title != "Args" else "Arguments:", "", *_entries(body)]
    return lines


def _entries(body: str) -> list[str]:
    """The entries of a section, each of which may go on in deeper lines."""
    entries: list[str] = []
    for line in inspect.cleandoc(body).splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        elif line:
            entries.append(line)
    if not _ENTRY.match(entries[0]):  # what is returned has no name
        entries = [" ".join(entries)]
    return [f"- {_ENTRY.sub(lambda found: f'`{found[1]}`: ', entry)}" for entry in entries]


if __name__ == "__main__":
    PAGE.write_text(page())
