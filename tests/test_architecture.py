"""The rules of the house, read off the source: who may import what, and who may do what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for package in ("convert", "kvpatch") for path in (ROOT / package).rglob("*.py")
)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def _imported_roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imports(ast.parse(path.read_text()))}


def _calls(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_runtime_never_imports_the_converter(path: Path) -> None:
    if path.is_relative_to(ROOT / "kvpatch"):
        assert "convert" not in _imported_roots(path)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_mathematics_imports_torch_and_no_io(path: Path) -> None:
    pure = ("convert.layer", "convert.methods", "convert.planes")
    if _name(path).removesuffix(".py").replace("/", ".").startswith(pure):
        standard = [
            "__future__",
            "collections",
            "dataclasses",
            "functools",
            "itertools",
            "math",
            "typing",
        ]
        assert _imported_roots(path) <= {*standard, "networkx", "torch", "convert"}
        own = {n for n in _imports(ast.parse(path.read_text())) if n.startswith("convert.")}
        assert all(name.startswith(pure) for name in own)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_only_the_checkpoint_package_opens_weight_files(path: Path) -> None:
    if not path.is_relative_to(ROOT / "convert/checkpoint"):
        assert "safetensors" not in _imported_roots(path)
        assert not _calls(path) & {"torch.load", "torch.save", "os.open", "os.preadv"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_only_the_hub_module_uses_the_network(path: Path) -> None:
    network = {"huggingface_hub", "requests", "httpx", "urllib", "socket"}
    allowed = {"convert/hub.py": network, "convert/checkpoint/staging.py": {"socket"}}
    assert _imported_roots(path) & network <= allowed.get(_name(path), set())


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_only_the_console_prints(path: Path) -> None:
    if _name(path) not in {"convert/cli.py", "convert/console.py"}:
        assert not _calls(path) & {"print", "sys.stdout.write", "sys.stderr.write"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_triton_is_imported_only_by_kernels(path: Path) -> None:
    if not path.is_relative_to(ROOT / "kvpatch/kernels"):
        assert "triton" not in _imported_roots(path)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_are_rooms_and_not_halls(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.name != "utils.py"


def test_help_is_quick_and_imports_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['kvpatch', '--help']\n"
        "import convert.cli\n"
        "try: convert.cli.main()\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "inspect" in result.stdout
