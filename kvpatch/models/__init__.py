"""Model code of converted checkpoints: flat files that also travel inside the checkpoints.

The modules whose names end in ``_kvpatch`` use torch, transformers and one another, by relative
imports in one folder. Copied into a checkpoint, with ``auto_map`` in its config.json, they are
found by ``trust_remote_code=True`` where kvpatch is not installed. This package itself imports
neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from kvpatch.errors import UsageError
from kvpatch.models.families_kvpatch import FAMILIES, PREFIX, Family

__all__ = ["FAMILIES", "PREFIX", "Family", "auto_map", "class_names", "family_of", "source_files"]


def family_of(model_type: str) -> Family:
    """Row of a stock model_type (``llama``) or of a converted one (``kvpatch_llama``).

    Raises:
        UsageError: If there is none.
    """
    family = FAMILIES.get(model_type.removeprefix(PREFIX))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(
            f"kvpatch has no model class for model_type {model_type!r}",
            hint=f"There are classes for: {known}.",
        )
    return family


def class_names(model_type: str) -> dict[str, str]:
    """Class names of a family, by auto class: ``architectures`` is the causal LM among them.

    Raises:
        UsageError: If the model_type is unknown.
    """
    return family_of(model_type).class_names


def auto_map(model_type: str) -> dict[str, str]:
    """The ``auto_map`` of config.json that goes with ``source_files()`` in the same folder.

    Raises:
        UsageError: If the model_type is unknown.
    """
    return family_of(model_type).auto_map


def source_files() -> list[Path]:
    """Files to copy beside config.json, so that a checkpoint carries its own model code."""
    return sorted(Path(__file__).parent.glob("*_kvpatch.py"))
