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


def _imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or _travels(path), "imports are absolute"
            assert node.level <= 1, "a checkpoint is one folder"
            package = ".".join(path.relative_to(ROOT).parts[:-1])
            yield f"{package}.{node.module}" if node.level else node.module or ""


def _travels(path: Path) -> bool:
    """Whether a file is copied into checkpoints, where only its own folder can be imported."""
    return path.parent == ROOT / "kvpatch/models" and path.stem.endswith("_kvpatch")


def _imported_roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imports(path)}


def _imported_at_once(path: Path) -> set[str]:
    """Roots of what is imported with the file, and not when a function runs."""
    names: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            names.add(statement.module or "")
    return {name.partition(".")[0] for name in names}


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
        own = {name for name in _imports(path) if name.startswith("convert.")}
        assert all(name.startswith(pure) for name in own)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_only_the_checkpoint_package_opens_weight_files(path: Path) -> None:
    if not path.is_relative_to(ROOT / "convert/checkpoint"):
        assert "safetensors" not in _imported_roots(path)
        assert not _calls(path) & {"torch.load", "torch.save", "os.open", "os.preadv"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_only_the_hub_package_uses_the_network(path: Path) -> None:
    network = {"huggingface_hub", "requests", "httpx", "urllib", "socket"}
    allowed = {"convert/checkpoint/staging.py": {"socket"}}
    if not path.is_relative_to(ROOT / "convert/hub"):
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
def test_what_need_not_be_installed_is_imported_where_it_is_used(path: Path) -> None:
    assert not _imported_at_once(path) & {"datasets", "lm_eval", "matplotlib", "peft", "pyarrow"}


@pytest.mark.parametrize("path", [path for path in FILES if _travels(path)], ids=_name)
def test_model_code_in_checkpoints_needs_transformers_alone(path: Path) -> None:
    installed = _imported_roots(path) - set(sys.stdlib_module_names)
    assert installed <= {"torch", "transformers", "kvpatch"}
    own = {name for name in _imports(path) if name.startswith("kvpatch")}
    assert own <= {f"kvpatch.models.{other.stem}" for other in FILES if _travels(other)}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_are_rooms_and_not_halls(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.name != "utils.py"


# typer itself describes the values of a command with pydantic
@pytest.mark.parametrize(
    ("words", "more"), [(["--help"], ["pydantic"]), (["mla", "--help"], [])], ids=["kvpatch", "mla"]
)
def test_help_is_quick_and_imports_no_torch(words: list[str], more: list[str]) -> None:
    script = (
        f"import sys; sys.argv = {['kvpatch', *words]}\n"
        "import convert.cli\n"
        "try: convert.cli.main()\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        f"heavy = {{'torch', 'transformers', 'numpy', 'huggingface_hub', *{more}}}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: kvpatch" in result.stdout
