"""The tables of block sizes: strictly read, and the least row that serves is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kvpatch.errors import UsageError
from kvpatch.kernels import configs
from kvpatch.kernels.configs import ARCHITECTURES, Config, config_for, find, table

FOLDER = Path(configs.__file__).parent / "configs"
OPS = sorted(path.stem for path in FOLDER.glob("*.json"))
ROW = {"arch": 80, "dtype_bytes": 2, "dim": 64, "block_m": 64, "block_n": 64}
SIZES = ("dim", "value_dim", "rope_dim")
ROW |= {"num_warps": 4, "num_stages": 2}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(64, 64, 0), (128, 128, 0), (64, 128, 0), (128, 128, 64)]
    of_op = tuple(Config(**ROW | dict(zip(SIZES, numbers, strict=True))) for numbers in sizes)
    monkeypatch.setattr(configs, "table", lambda op: of_op)
    find.cache_clear()
    yield
    find.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_tables_are_read_and_have_no_row_twice(op: str) -> None:
    keys = [(row.arch, row.dtype_bytes, row.sizes) for row in table(op)]
    assert keys
    assert len(set(keys)) == len(keys)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((64, 64, 0), (64, 64, 0)),
        ((40, 40, 0), (64, 64, 0)),
        ((64, 80, 0), (64, 128, 0)),
        ((80, 80, 0), (128, 128, 0)),
        ((64, 64, 16), (128, 128, 64)),
        ((256, 64, 0), None),
        ((64, 64, 80), None),
    ],
)
def test_least_row_that_serves(asked: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    config = find("op", 80, torch.float16, **dict(zip(SIZES, asked, strict=True)))
    assert (config.sizes[:3] if config else None) == found


@pytest.mark.usefixtures("rows")
def test_no_row_is_an_error_that_names_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: 80)
    assert find("op", 80, torch.float32, dim=64) is None
    assert find("op", 90, torch.float16, dim=64) is None
    with pytest.raises(UsageError, match=r"op has no blocks.* dim 512"):
        config_for("op", torch.device("cpu"), torch.float16, dim=512)


@pytest.mark.parametrize(
    "change",
    [{"arch": 75}, {"block_m": 64.0}, {"block_m": "64"}, {"num_warps": -1}, {"unknown": 1}],
    ids=str,
)
def test_wrong_fields_raise(change: dict[str, object]) -> None:
    Config(**ROW)
    with pytest.raises((TypeError, ValueError)):
        Config(**ROW | change)


def test_missing_fields_raise() -> None:
    optional = {field.name for field in dataclasses.fields(Config) if field.default == 0}
    assert optional == {"value_dim", "rope_dim", "rows"}
    for name in set(ROW) - optional:
        with pytest.raises(TypeError):
            Config(**{key: value for key, value in ROW.items() if key != name})


@pytest.mark.parametrize(
    ("capability", "shared", "served_by"),
    [
        ((8, 0), 163, 80),
        ((8, 6), 99, 86),
        ((8, 7), 163, 80),
        ((8, 9), 99, 86),
        ((9, 0), 227, 90),
        ((10, 0), 227, 100),
        ((10, 3), 227, 100),
        ((12, 0), 99, 86),
    ],
)
def test_architecture_is_the_newest_whose_memory_a_device_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int, served_by: int
) -> None:
    class Properties:
        major, minor = capability
        shared_memory_per_block_optin = shared << 10

    monkeypatch.setattr(configs, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert configs.architecture.__wrapped__(torch.device("cuda", 0)) == served_by
    assert served_by in ARCHITECTURES


def test_tables_are_one_row_a_line() -> None:
    for op in OPS:
        lines = (FOLDER / f"{op}.json").read_text().splitlines()
        assert lines[0] == "["
        assert lines[-1] == "]"
        assert [json.loads(line.rstrip(",")) for line in lines[1:-1]]
