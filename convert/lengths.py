"""How long a text a model was made for, and whether it takes longer ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.facts import has_latents
from convert.families import family_of
from convert.loading import Pair
from kvpatch.errors import InputModelError, UsageError

__all__ = ["check_length", "check_pair", "config_of", "position_limit"]

_USUAL = 2048


def position_limit(config: Mapping[str, Any]) -> int:
    """Tokens that a model was made for; 2,048 where its config does not say.

    Args:
        config: Of the model, as in config.json.
    """
    return _positions(config)[0] or _USUAL


def check_length(config: Mapping[str, Any], tokens: int, *, name: str, asked: str) -> list[str]:
    """Warnings of running a model on so many tokens.

    Args:
        config: Of the model, as in config.json.
        tokens: Of a sequence.
        name: Of the model, for messages.
        asked: The flag with its value.

    Raises:
        UsageError: If the model has no positions for them.
    """
    limit, ends = _positions(config)
    if limit is None or tokens <= limit:
        return []
    if ends:
        raise UsageError(
            f"{asked} is more than the {limit:,} positions of {name}",
            hint=f"Ask for {limit:,} tokens or less.",
        )
    said = (
        f"{asked} is more than the {limit:,} tokens that {name} was made for; "
        "what it does beyond them is extrapolation"
    )
    return [said]


def check_pair(pair: Pair, tokens: int, asked: str) -> list[str]:
    """Warnings of running a model and its source on so many tokens.

    Args:
        pair: Model and source.
        tokens: Of a sequence.
        asked: The flag with its value.

    Raises:
        UsageError: If one of them has no positions for them.
    """
    ours = check_length(config_of(pair.model), tokens, name=pair.name, asked=asked)
    if pair.source is None:
        return ours
    theirs = check_length(config_of(pair.source), tokens, name="its source", asked=asked)
    return ours or theirs


def config_of(model: Any) -> dict[str, Any]:
    """Config of a loaded model, as in config.json."""
    config: dict[str, Any] = model.config.get_text_config().to_dict()
    return config


def _positions(config: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Tokens that a model was made for, where that is known, and whether it can do no more."""
    try:
        family = family_of(config)
    except InputModelError:  # not in the table: latents have RoPE, of others nothing is known
        return config.get("max_position_embeddings"), not has_latents(config)
    stated = family.completed(config).get("max_position_embeddings")
    return stated or (_USUAL if family.ends else None), family.ends
