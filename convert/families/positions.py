"""Which layers rotate how, and which of them see only a window, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convert.families.family import Family
from convert.families.values import NUMBER, POSITIVE, SHARE, SWITCH, Kind
from convert.layer import Rope
from kvpatch.errors import InputModelError

__all__ = ["check_positions", "layer_ropes", "layer_windows"]

_SLIDING, _FULL = "sliding_attention", "full_attention"

_POSITIVES = Kind(
    "a list of positive numbers", lambda v: isinstance(v, list) and all(map(POSITIVE.holds, v))
)
# what the entries of a table of RoPE parameters are
_ENTRIES: Mapping[str, Kind] = {
    "rope_theta": POSITIVE,
    "partial_rotary_factor": SHARE,
    "factor": POSITIVE,
    "original_max_position_embeddings": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "short_factor": _POSITIVES,
    "long_factor": _POSITIVES,
}
_OPTIONAL: Mapping[str, Kind] = {
    "attention_factor": NUMBER,
    "beta_fast": NUMBER,
    "beta_slow": NUMBER,
    "mscale": NUMBER,
    "mscale_all_dim": NUMBER,
    "truncate": SWITCH,
}
# the kinds of RoPE that transformers has, and the entries without which it cannot compute them
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}


def check_positions(config: Mapping[str, Any], family: Family, layers: int) -> None:
    """Check what describes positions and windows, beyond the types of single values.

    Args:
        config: config.json with every key under its usual name.
        family: Its row of the table.
        layers: Number of decoder layers.

    Raises:
        InputModelError: Naming the key, what was expected and what was found.
    """
    for key in ("rope_parameters", "rope_scaling"):
        for path, table in _tables_of(key, config.get(key) or {}, family):
            _check_table(path, table, family)
    types = config.get("layer_types")
    if types is not None:
        _check_types(types, config, family, layers)
    listed = config.get("no_rope_layers")
    if listed and len(listed) < layers:
        raise InputModelError(
            f"config.json: no_rope_layers must list {layers} layers, found {listed!r:.200}"
        )


def _tables_of(
    key: str, value: Mapping[str, Any], family: Family
) -> list[tuple[str, Mapping[str, Any]]]:
    """The tables of RoPE parameters under a key, one or one for each kind of layer, with paths."""
    nested = family.local_theta is not None and key == "rope_parameters"
    by_kind = {kind: value[kind] for kind in (_FULL, _SLIDING) if kind in value}
    if value and bool(by_kind) != nested:
        expected = f"an entry for {_FULL} and for {_SLIDING}" if nested else "one table"
        raise InputModelError(
            f"config.json: {key} of a {family.model_type} model must be {expected}, "
            f"found {value!r:.200}"
        )
    if not nested:
        return [(key, value)]
    for kind, table in by_kind.items():
        if table is not None and not isinstance(table, dict):
            raise InputModelError(
                f"config.json: {key}.{kind} must be an object, found {table!r:.200}"
            )
    return [(f"{key}.{kind}", table) for kind, table in by_kind.items() if table]


def _check_table(path: str, table: Mapping[str, Any], family: Family) -> None:
    for key, kind in {**_ENTRIES, **_OPTIONAL}.items():
        if key in table and not (table[key] is None and key in _OPTIONAL):
            kind.check(f"{path}.{key}", table[key])
    if not table:
        return
    named = "type" if "type" in table and "rope_type" not in table else "rope_type"
    known, found = _kinds(family), table.get(named, "default")
    if not isinstance(found, str) or found not in known:
        raise InputModelError(
            f"config.json: {path}.{named} of a {family.model_type} model must be one of "
            f"{', '.join(known)}, found {found!r:.200}"
        )
    missing = [key for key in _NEEDED[known[found]] if key not in table]
    if missing:
        raise InputModelError(
            f"config.json: {path} of type {found!r} has no {' and no '.join(missing)}"
        )


def _kinds(family: Family) -> Mapping[str, str]:
    """Kinds of RoPE that a class knows, and the kind that each of them is."""
    if family.positions != "rope" or family.rotary_dim is not None:  # these read no table
        return {"default": "default"}
    return family.rope_kinds or {kind: kind for kind in _NEEDED}


def _check_types(
    types: Sequence[str], config: Mapping[str, Any], family: Family, layers: int
) -> None:
    """Layer types are of two kinds, and where a class does not read them they repeat its rule."""
    if len(types) != layers or not set(types) <= {_FULL, _SLIDING}:
        raise InputModelError(
            f"config.json: layer_types must list {layers} layers, each {_FULL} or {_SLIDING}, "
            f"found {types!r:.200}"
        )
    switch = family.windows.switch
    if _SLIDING in types and switch is not None and not config.get(switch):
        raise InputModelError(
            f"config.json: layer_types has {_SLIDING}, but {switch} is {config.get(switch)!r}"
        )
    ruled = family.windows.rule in {"never", "all", "local"}
    own = list(_layer_types({**config, "layer_types": None}, family, layers))
    if ruled and list(types) != own:
        raise InputModelError(
            f"config.json: layer_types of this {family.model_type} model must be {own!r:.200}, "
            f"which is what its class computes, found {types!r:.200}"
        )


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
    """Sliding window of every layer in tokens, None where the layer sees everything.

    Raises:
        InputModelError: If layers slide, but there is no window, or one of a single token.
    """
    types = _layer_types(config, family, layers)
    window = config.get("sliding_window")
    if _SLIDING in types and not window:
        raise InputModelError(
            f"config.json: layers of this {family.model_type} model have a sliding window, but "
            f"sliding_window is {window!r}"
        )
    if _SLIDING in types and window == 1:
        raise InputModelError(
            "config.json: sliding_window is 1, with which the classes of transformers compute one "
            "thing with a cache and another without"
        )
    return tuple(window if kind == _SLIDING else None for kind in types)


def _tables(config: Mapping[str, Any], family: Family) -> Mapping[str, Mapping[str, Any]]:
    """RoPE parameters of each kind of layer."""
    scaling, parameters = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if family.rotary_dim is not None:
        return {_FULL: {}, _SLIDING: {}}
    if family.local_theta is None:
        return dict.fromkeys((_FULL, _SLIDING), scaling or parameters)
    # a scaling that is not given for each layer type is for full attention; such classes put it
    # over a table that has a rope_type already
    own = (parameters.get(_FULL) or {}) if parameters else {"rope_type": "default"}
    return {_FULL: {**own, **scaling}, _SLIDING: parameters.get(_SLIDING) or {}}


def _rope(config: Mapping[str, Any], family: Family, head_dim: int, kind: str, nope: bool) -> Rope:
    parameters = _tables(config, family)[kind]
    theta = config.get("rope_theta") or family.theta
    if family.local_theta is not None and kind == _SLIDING:
        theta = config.get("rope_local_base_freq") or family.local_theta
    named = parameters.get("rope_type") or parameters.get("type") or "default"
    scaling = _kinds(family)[named]
    dim = _rotating(config, family, head_dim, parameters)
    _check_lengths(parameters, dim // 2)
    return Rope(
        dim=0 if nope else dim,
        interleaved=family.interleaved,
        theta=float(parameters.get("rope_theta") or theta),
        kind=scaling,
    )


def _check_lengths(parameters: Mapping[str, Any], planes: int) -> None:
    for key in ("short_factor", "long_factor"):
        if key in parameters and len(parameters[key]) != planes:
            raise InputModelError(
                f"config.json: {key} of the RoPE parameters must have {planes} numbers, one for "
                f"each pair of dims that rotate, found {len(parameters[key])}"
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
    given = config.get("partial_rotary_factor")
    if given is None:
        given = family.partial
    share = parameters.get("partial_rotary_factor", given)
    if family.partial is None and (parameters.get("rope_type") or "default") == "default":
        share = None  # such a class rotates all dims, whatever is given
    dim = head_dim if share is None else int(head_dim * share)
    if dim % 2 or (family.partial is None and dim != head_dim):
        raise InputModelError(
            f"config.json: {dim} of the {head_dim} dims of a head would rotate "
            f"(partial_rotary_factor {share!r}); their number must be even"
            + ("" if family.partial is not None else f", and all of a {family.model_type} model")
        )
    return dim


def _nope_layers(config: Mapping[str, Any], family: Family, layers: int) -> frozenset[int]:
    if not family.nope_every:
        return frozenset()
    listed: Sequence[int] | None = config.get("no_rope_layers")
    if listed:  # 1 marks a layer that rotates
        return frozenset(i for i, rotates in enumerate(listed) if not rotates)
    every = config.get("no_rope_layer_interval") or family.nope_every
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
    limit = layer + 1
    if "max_window_layers" in family.defaults:  # other classes do not read it
        limit = config["max_window_layers"]
    every = (rule.key and config.get(rule.key)) or rule.every or 1
    given = config.get("sliding_window") is not None
    return {
        "all": given,
        "pattern": (layer + 1) % every != 0 and layer < limit,
        "from_layer": given and layer >= limit,
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
