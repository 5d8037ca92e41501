"""What a report needs of a manifest, checked, so that drawing can rely on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.staging import MANIFEST
from kvpatch.errors import InputModelError, UsageError

__all__ = [
    "Conversion",
    "Evaluation",
    "LatentConversion",
    "LatentLayer",
    "Layer",
    "MergedConversion",
    "MergedLayer",
    "read_conversions",
]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class _File(_Checked):
    sha256: str


class _Source(_Checked):
    name: str
    files: dict[str, _File]


class _Recipe(_Checked):
    method: str


class _Merge(_Recipe):
    merge: str


class _Cache(_Checked):
    bytes_per_token: list[int]


class Layer(_Checked):
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


class _Against(_Checked):
    perplexity: float
    kl: float
    top1: float


class Evaluation(_Checked):
    """A saved measurement; ``against`` compares with the source."""

    text: str
    text_sha256: str
    windows: int
    context: int
    stride: int
    dtype: str
    tokens: int
    perplexity: float
    against: _Against | None

    @property
    def setting(self) -> tuple[str, str, int, int, int, str]:
        """What was measured on; only measurements that agree in it can be compared."""
        return (
            self.text,
            self.text_sha256,
            self.windows,
            self.context,
            self.stride,
            self.dtype,
        )


class Conversion(_Checked):
    """One converted checkpoint.

    Args:
        name: Of its folder; no two of a report share it.
        source: What it was made from.
        recipe: How.
        kv_cache: ``bytes_per_token`` before and after.
        layers: All layers, in order.
        evaluations: Saved measurements.
        similarity: [L][L] linear centred kernel alignment of the attention inputs of each two
            layers of the source, 0 to 1; if calibrated.
    """

    name: str
    source: _Source
    recipe: _Recipe
    kv_cache: _Cache
    layers: Sequence[Layer]
    evaluations: list[Evaluation]
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


class MergedConversion(Conversion):
    """A conversion that merged KV heads."""

    recipe: _Merge
    layers: list[MergedLayer]

    @model_validator(mode="after")
    def _heads_agree(self) -> Self:
        heads = {len(h) for layer in self.layers for h in (layer.lost_heads_k, layer.lost_heads_v)}
        if len(heads) != 1:
            raise ValueError("layers have different numbers of heads")
        return self


class LatentConversion(Conversion):
    """A conversion to latents."""

    layers: list[LatentLayer]


def read_conversions(folders: Sequence[Path]) -> list[MergedConversion | LatentConversion]:
    """The conversions in these folders, which must all have the same source.

    Raises:
        UsageError: If a folder is named twice or was exported, or if sources differ.
        InputModelError: If a folder has no manifest, or one that is damaged.
    """
    names = _names(folders)
    conversions = [_read(folder, name) for folder, name in zip(folders, names, strict=True)]
    first = conversions[0]
    for folder, other in zip(folders, conversions, strict=True):
        if other.source_hashes != first.source_hashes:
            raise UsageError(
                f"{folders[0]} and {folder} have different sources ({first.source.name} and "
                f"{other.source.name}; the sha256 of their weights differ)",
                hint="Conversions can be compared if they have one source: make a report of each.",
            )
    return conversions


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, as words for labels and files."""
    paths = [folder.resolve().parts[1:] for folder in folders]
    if len(set(paths)) != len(paths):
        raise UsageError("a folder is named twice", hint="Name each converted checkpoint once.")
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-depth:]) for parts in paths]
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
        return _kind(manifest).model_validate({**manifest, "name": name})
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
