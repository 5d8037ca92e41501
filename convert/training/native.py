"""Results of a stock class with latents: trained as our class, which computes the same.

The stock class has a norm on its latents that constants among the weights make inert, and training
would move those. The class of kvpatch has no such norm: a result is exported to it, trained, and
exported back, between two folders that live as long as the run. Only biases that the stock form
has no place for stand still, so that its config.json stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.checkpoint.manifest import read_manifest
from convert.checkpoint.reader import Checkpoint
from convert.checkpoint.staging import MANIFEST, Staging
from convert.latent_source import latent_source
from convert.pipeline import convert
from convert.recipe import ExportRecipe
from convert.targets.deepseek_read import StockForm
from convert.training.publish import copy_files, write_weights
from kvpatch.errors import VerificationError
from kvpatch.models import class_names

__all__ = ["Detour", "detour_of"]

Progress = Callable[[str, int, int], None]
_NARROW = {"bfloat16", "float16"}
_FORM, _TRAINED, _NATIVE = "form", "trained", "native"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detour:
    """The way of a native result through a class of kvpatch and back.

    Args:
        recipe: Keys of the export back that are not folders.
        dtype: Of the form between, where the stored one is narrower.
        frozen: How the names of the parameters end that are not trained.
        architecture: The class of kvpatch.
    """

    recipe: Mapping[str, Any]
    dtype: str | None
    frozen: tuple[str, ...]
    architecture: str

    def form(self, scratch: Path) -> Path:
        """The folder of the model to train."""
        return scratch / _FORM

    def begin(self, source: Path, scratch: Path, progress: Progress | None) -> None:
        """Make the model to train, unless an interrupted run has made it.

        Args:
            source: The result that the run begins with.
            scratch: Folder that lives as long as the run.
            progress: Called as by ``convert``.

        Raises:
            InputModelError: If the norm does more than rounding.
        """
        there = {"target": "kvpatch", "dtype": self.dtype}
        _export(source, self.form(scratch), there, progress)

    def end(
        self,
        stock: Checkpoint,
        scratch: Path,
        weights: Mapping[str, Tensor],
        run_id: str,
        progress: Progress | None,
    ) -> dict[str, Tensor]:
        """The trained weights as those of the stock class, by their names on the disk.

        Args:
            stock: The result that the run began with.
            scratch: As for ``begin``.
            weights: Of the form between, by their names on the disk.
            run_id: Of the run.
            progress: Called as by ``convert``.

        Raises:
            VerificationError: If these are not the names that ``stock`` has.
        """
        form, trained, native = self.form(scratch), scratch / _TRAINED, scratch / _NATIVE
        if not trained.exists():
            with (
                Checkpoint(form) as start,
                Staging(trained, run_id, resume=True, overwrite=False) as staging,
            ):
                written = write_weights(staging, start, weights, lambda _: None)
                copy_files(form, staging, read_manifest(form)["files"].keys() - written.keys())
                staging.publish()
        _export(trained, native, self.recipe, progress)
        with Checkpoint(native) as result:
            if wrong := sorted(stock.tensors.keys() ^ result.tensors.keys()):
                raise VerificationError(f"the trained model lacks or adds tensors: {wrong[:5]}")
            return {name: result.read(name) for name in result.tensors}

    def record(self, scratch: Path) -> dict[str, Any]:
        """What kvpatch.json says of the form between."""
        with Checkpoint(self.form(scratch)) as form:
            manifest, files = read_manifest(form.root), form.files
        return {
            "architecture": self.architecture,
            "files": {name: manifest["files"][name] for name in files},
            "norm_error": max(layer["norm_error"] for layer in manifest["layers"]),
        }


def detour_of(checkpoint: Checkpoint) -> Detour | None:
    """The detour that training of a result takes; None if it is trained as it is.

    Raises:
        InputModelError: If it has latents in a stock class that kvpatch did not write.
    """
    config = checkpoint.config
    if config.get("kv_lora_rank") is None or "kv_rope_planes" in config:
        return None
    source = latent_source(checkpoint)
    assert source.stock is not None
    narrow = source.facts.dtype in _NARROW
    back = {
        "target": "native",
        "arch": config["model_type"],
        "serving": not source.stock.biased,
        "dtype": source.facts.dtype if narrow else None,
    }
    return Detour(
        recipe=back,
        dtype="float32" if narrow else None,
        frozen=_without_place(source.stock),
        architecture=class_names(source.facts.family.model_type)["AutoModelForCausalLM"],
    )


def _without_place(form: StockForm) -> tuple[str, ...]:
    """Ends of the names of biases that our class has, and the stock form has not."""
    if not form.biased:
        return ("q_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias")
    return () if form.query_rank is not None else ("q_proj.bias",)


def _export(source: Path, out: Path, keys: Mapping[str, Any], progress: Progress | None) -> None:
    """Export a model, unless that is done already."""
    if not (out / MANIFEST).is_file():
        convert(ExportRecipe(source=str(source), output=str(out), **keys), progress=progress)
