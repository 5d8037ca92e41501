"""What a report needs of a manifest, checked, so that drawing can rely on it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from convert.card import kind_of
from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.staging import MANIFEST
from convert.reporting.measured import Checked, Evaluation, Probe, TaskScores, Training
from kvpatch.errors import InputModelError, UsageError

__all__ = [
    "Conversion",
    "LatentConversion",
    "LatentLayer",
    "Layer",
    "MergedConversion",
    "MergedLayer",
    "by_conversion",
    "by_source",
    "read_conversions",
]


_C = TypeVar("_C", bound="Conversion")


class _File(Checked):
    sha256: str


class _Source(Checked):
    name: str
    repository: str | None
    revision: str | None
    architecture: str
    files: dict[str, _File]


class _Recipe(Checked):
    """How; all keys are kept, to be shown."""

    model_config = ConfigDict(extra="allow")

    method: str
    refit: str


class _Merge(_Recipe):
    merge: str

    @model_validator(mode="after")
    def _says_what_is_shared(self) -> Self:
        if self.method == "cla" and type((self.model_extra or {}).get("share")) is not int:
            raise ValueError("cla does not say how many layers share")
        return self


class _Cache(Checked):
    bytes_per_token: list[int]


class _MergedCache(_Cache):
    kv_heads: list[int] = Field(min_length=2, max_length=2)


class _LatentSizes(Checked):
    rank: int | list[int]
    rope_dims: int | list[int]


class _LatentCache(_Cache):
    latent: _LatentSizes


class _Calibration(Checked):
    text: str
    text_sha256: str
    samples: int
    context: int


class Layer(Checked):
    """What became of one layer.

    Args:
        layer: Its index.
        source: The layer whose keys and values it reads.
        attention_kl: Measured KL from its attention weights before, in nats; if calibrated.
        output_error: Squared error of its attention output, relative to its power; if calibrated.
    """

    layer: int
    source: int
    attention_kl: float | None = None
    output_error: float | None = None


class MergedLayer(Layer):
    """A layer whose KV heads were merged.

    Args:
        lost_energy_k: Lost share of the energy of its keys; above 1 for a bad average.
        lost_energy_v: The same of its values.
        lost_heads_k: The share of each KV head of the source.
        lost_heads_v: The same for values.
    """

    lost_energy_k: float
    lost_energy_v: float
    lost_heads_k: list[float]
    lost_heads_v: list[float]


class LatentLayer(Layer):
    """A layer whose keys and values became one latent, which has no heads.

    Args:
        rank: Latent dims.
        rope_dims: Rotary dims.
        lost_energy_rope: Share of the energy of its keys that was lost with their rotation.
        lost_energy_latent: Share that the latent lost of what it should hold.
        lost_energy_shared: Share of the energy of its keys and values that the input of the layer
            whose latent it reads cannot give; if layers share.
    """

    rank: int
    rope_dims: int
    lost_energy_rope: float
    lost_energy_latent: float
    lost_energy_shared: float | None = None


class Conversion(Checked):
    """One converted checkpoint.

    Args:
        name: Of its folder; no two of a report share it.
        source: What it was made from.
        recipe: How.
        architecture: The class of the result.
        calibration: The text that it was calibrated on, if any.
        kv_cache: ``bytes_per_token`` before and after, and what the cache holds.
        layers: All layers, in order.
        evaluations: Saved measurements on texts.
        retrieval: Saved probes of retrieval.
        tasks: Saved scores of tasks.
        trainings: Uptraining runs since the conversion, first to last.
        versions: Of the packages that converted it.
        similarity: [L][L] linear centred kernel alignment of the attention inputs of each two
            layers of the source, 0 to 1; if calibrated.
    """

    name: str
    source: _Source
    recipe: _Recipe
    architecture: str
    calibration: _Calibration | None
    kv_cache: _Cache
    layers: Sequence[Layer]
    evaluations: list[Evaluation]
    retrieval: Sequence[Probe] = ()
    tasks: Sequence[TaskScores] = ()
    trainings: Sequence[Training] = ()
    versions: dict[str, str]
    similarity: list[list[float]] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        count = len(self.layers)
        if not count or [layer.layer for layer in self.layers] != list(range(count)):
            raise ValueError("layers are not numbered from 0")
        if any(not 0 <= layer.source < count for layer in self.layers):
            raise ValueError("a layer reads the keys of a layer that is not there")
        for key in ("attention_kl", "output_error"):
            if len({getattr(layer, key) is None for layer in self.layers}) != 1:
                raise ValueError(f"{key} stands in some layers only")
        if len(self.kv_cache.bytes_per_token) != 2:
            raise ValueError("kv_cache.bytes_per_token does not hold two sizes, before and after")
        if self.similarity is not None and [len(row) for row in self.similarity] != [count] * count:
            raise ValueError(f"similarity is no {count} x {count} matrix")
        return self

    @property
    def source_hashes(self) -> list[str]:
        """sha256 of the source's weight files; the identity of the source."""
        return sorted(file.sha256 for file in self.source.files.values())

    @property
    def kind(self) -> str:
        """What it is called, ``GQA with 2 KV heads``."""
        return kind_of(
            self.recipe.model_dump(), self.kv_cache.model_dump(exclude={"bytes_per_token"})
        )[0]


class MergedConversion(Conversion):
    """A conversion that merged KV heads."""

    recipe: _Merge
    kv_cache: _MergedCache
    layers: list[MergedLayer]

    @model_validator(mode="after")
    def _heads_agree(self) -> Self:
        heads = {len(h) for layer in self.layers for h in (layer.lost_heads_k, layer.lost_heads_v)}
        if len(heads) != 1:
            raise ValueError("layers have different numbers of heads")
        return self


class LatentConversion(Conversion):
    """A conversion to latents."""

    kv_cache: _LatentCache
    layers: list[LatentLayer]


def read_conversions(folders: Sequence[Path]) -> list[MergedConversion | LatentConversion]:
    """The conversions in these folders.

    Raises:
        UsageError: If a folder is named twice or was exported.
        InputModelError: If a folder has no manifest, or one that is damaged.
    """
    names = _names(folders)
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def by_source(conversions: Sequence[_C]) -> list[list[_C]]:
    """Conversions of one source together, which alone can be compared; in order."""
    groups: dict[tuple[str, ...], list[_C]] = {}
    for conversion in conversions:
        groups.setdefault(tuple(conversion.source_hashes), []).append(conversion)
    return list(groups.values())


def by_conversion(conversions: Sequence[_C]) -> list[list[_C]]:
    """Those together that lost the same, as a conversion and what was trained from it; in order."""
    groups: list[list[_C]] = []
    for one in conversions:
        same = next((group for group in groups if _alike(group[0], one)), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    return groups


def _alike(one: Conversion, other: Conversion) -> bool:
    keys = ("source", "recipe", "kv_cache", "layers", "similarity")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _names(folders: Sequence[Path]) -> list[str]:
    """Last parts of the paths, or all that they do not share, as words for labels and files."""
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) != len(paths):
        raise UsageError("a folder is named twice", hint="Name each converted checkpoint once.")
    common = len(Path(os.path.commonpath([folder.resolve() for folder in folders])).parts)
    for first in (-1, common):
        names = ["-".join(parts[first:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UsageError(
        f"{', '.join(map(str, folders))} cannot be told apart by name",
        hint="Rename one of the folders.",
    )


def _read(folder: Path, name: str) -> MergedConversion | LatentConversion:
    manifest = read_manifest(folder)
    if manifest.get("recipe", {}).get("method") == "export":
        raise UsageError(
            f"{folder} was exported, which loses nothing that a report could show",
            hint="Make a report of what it was exported from.",
        )
    try:
        # strict, but as JSON, where dataclasses are objects
        return _kind(manifest).model_validate_json(json.dumps({**manifest, "name": name}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise InputModelError(
            f"{folder / MANIFEST}: {where}: {first['msg'].removeprefix('Value error, ')}",
            hint="Convert again with this version of kvpatch.",
        ) from None


def _kind(manifest: Mapping[str, Any]) -> type[MergedConversion] | type[LatentConversion]:
    recipe = manifest.get("recipe")
    latent = isinstance(recipe, Mapping) and recipe.get("method") == "mla"
    return LatentConversion if latent else MergedConversion
