"""Which layers rotate how, and which of them see only a window, read from config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convert.families.family import Family
from convert.layer import Rope
from kvpatch.errors import InputModelError

__all__ = ["check_positions", "layer_ropes", "layer_windows"]

_NUMBERS = frozenset(
    {
        "max_window_layers",
        "no_rope_layer_interval",
        "partial_rotary_factor",
        "rope_local_base_freq",
        "rope_theta",
        "sliding_window",
        "sliding_window_pattern",
    }
)
_SLIDING, _FULL = "sliding_attention", "full_attention"


def check_positions(config: Mapping[str, Any], layers: int, spelling: Callable[[str], str]) -> None:
    """Check the types of the values that describe positions and windows.

    Args:
        config: config.json with every key under its usual name.
        layers: Number of decoder layers.
        spelling: Name of a key as config.json has it, for errors.

    Raises:
        InputModelError: Naming the key, what was expected and what was found.
    """
    tables = [config]
    for key in ("rope_parameters", "rope_scaling"):
        table = config.get(key) or {}
        if not isinstance(table, dict):
            raise InputModelError(f"config.json: {key} must be an object, found {table!r}")
        tables += [table, *(value for value in table.values() if isinstance(value, dict))]
    for table in tables:
        for key in _NUMBERS & table.keys():
            if table[key] and (not isinstance(table[key], int | float) or table[key] < 0):
                raise InputModelError(
                    f"config.json: {spelling(key)} must be a number, found {table[key]!r}"
                )
    for key in ("layer_types", "no_rope_layers"):
        listed = config.get(key)
        if listed and (not isinstance(listed, list) or len(listed) < layers):
            raise InputModelError(f"config.json: {key} must list {layers} layers, found {listed!r}")


def layer_ropes(
    config: Mapping[str, Any], family: Family, *, layers: int, head_dim: int
) -> tuple[Rope, ...]:
    """Rotary positions of every layer; ``dim`` 0 where a layer has none (NoPE).

    Reads the keys of transformers 4 (``rope_theta``, ``rope_scaling``, ``rope_local_base_freq``)
    and of 5 (``rope_parameters``, flat or one entry for each layer type).
    """
    if family.positions != "rope":
        return (Rope(dim=0, interleaved=False, theta=family.theta),) * layers
    nope = _nope_layers(config, family, layers)
    types = _layer_types(config, family, layers)
    return tuple(
        _rope(config, family, head_dim, types[layer], layer in nope) for layer in range(layers)
    )


def layer_windows(
    config: Mapping[str, Any], family: Family, *, layers: int
) -> tuple[int | None, ...]:
    """Sliding window of every layer in tokens, None where the layer sees everything."""
    window = config.get("sliding_window")
    if not window:
        return (None,) * layers
    types = _layer_types(config, family, layers)
    return tuple(int(window) if kind == _SLIDING else None for kind in types)


def _rope(config: Mapping[str, Any], family: Family, head_dim: int, kind: str, nope: bool) -> Rope:
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or family.theta
    local = family.local_theta is not None and kind == _SLIDING
    if local:
        theta = config.get("rope_local_base_freq") or family.local_theta
    if _FULL in parameters or _SLIDING in parameters:
        parameters = parameters.get(kind) or {}
    elif local:
        parameters = {}  # a scaling that is not given for each layer type is for full attention
    scaling = parameters.get("rope_type") or parameters.get("type") or "default"
    return Rope(
        dim=0 if nope else _rotating(config, family, head_dim, parameters),
        interleaved=family.interleaved,
        theta=float(parameters.get("rope_theta") or theta),
        kind="longrope" if scaling == "su" else scaling,  # the name Phi-3 first had for it
    )


def _rotating(
    config: Mapping[str, Any], family: Family, head_dim: int, parameters: Mapping[str, Any]
) -> int:
    """Number of dims of a head that rotate."""
    if family.rotary_dim is not None:
        dim = config.get(family.rotary_dim)
        if isinstance(dim, bool) or not isinstance(dim, int) or dim % 2 or not 0 < dim <= head_dim:
            raise InputModelError(
                f"config.json: {family.rotary_dim} must be even and between 2 and the width of a "
                f"head, {head_dim}; found {dim!r}"
            )
        return dim
    if family.partial is None:
        return head_dim
    given = config.get("partial_rotary_factor", family.partial)
    return int(head_dim * parameters.get("partial_rotary_factor", given))


def _nope_layers(config: Mapping[str, Any], family: Family, layers: int) -> frozenset[int]:
    if not family.nope_every:
        return frozenset()
    listed: Sequence[int] | None = config.get("no_rope_layers")
    if listed:  # 1 marks a layer that rotates
        return frozenset(i for i, rotates in enumerate(listed) if not rotates)
    every = int(config.get("no_rope_layer_interval") or family.nope_every)
    return frozenset(range(every - 1, layers, every))


def _layer_types(config: Mapping[str, Any], family: Family, layers: int) -> Sequence[str]:
    if family.windows.rule == "never":
        return (_FULL,) * layers
    if family.windows.rule == "local":
        return [_SLIDING if kind == "local" else _FULL for kind in _local_layers(config, layers)]
    listed: Sequence[str] | None = config.get("layer_types")
    if listed:
        return listed
    nope = _nope_layers(config, family, layers)
    return [_SLIDING if _slides(config, family, i, nope) else _FULL for i in range(layers)]


def _slides(config: Mapping[str, Any], family: Family, layer: int, nope: frozenset[int]) -> bool:
    rule = family.windows
    if rule.switch is not None and not config.get(rule.switch):
        return False
    limit = int(config.get("max_window_layers", layer + 1))
    every = int((rule.key and config.get(rule.key)) or rule.every or 1)
    return {
        "all": True,
        "pattern": (layer + 1) % every != 0 and layer < limit,
        "from_layer": layer >= limit,
        "nope": layer in nope,
    }[rule.rule]


def _local_layers(config: Mapping[str, Any], layers: int) -> Sequence[str]:
    """GPT-Neo's ``global`` and ``local`` layers, listed in full or as patterns and their repeats.

    Raises:
        InputModelError: If config.json does not list all layers so.
    """
    kinds = config.get("attention_layers")
    if kinds is None:
        types = config.get("attention_types") or [[["global", "local"], 12]]
        try:
            kinds = []
            for pattern, times in types:  # one repeat too many is enough to see that there are
                kinds += list(pattern) * min(times, layers + 1)
        except (TypeError, ValueError):
            kinds = None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise InputModelError(
            f"config.json: attention_types must describe {layers} layers, "
            f"found {config.get('attention_types')!r}"
        )
    return kinds
