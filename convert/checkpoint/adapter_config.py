"""``adapter_config.json`` of peft: what an adapter was trained on, and by which rules it applies.

The rules are those of peft, which is not imported. Whatever would make a sum of weights and factors
the wrong model is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint.paths import guarded_path, hub_snapshot
from convert.checkpoint.reader import read_json
from kvpatch.errors import InputModelError

__all__ = [
    "ADAPTER_CONFIG",
    "TENSOR_FILES",
    "UNMERGED",
    "base_of",
    "is_alone",
    "is_target",
    "read_adapter_config",
    "scaling_of",
]

ADAPTER_CONFIG = "adapter_config.json"
TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = {
    name + index
    for name in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
}

_READ = frozenset(
    {
        *("base_model_name_or_path", "revision", "peft_type", "init_lora_weights"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "ensure_weight_tying"),
    }
)
# say how it was trained, or what the tensors say too
_NEUTRAL = frozenset(
    {
        *("auto_mapping", "bias", "corda_config", "eva_config", "fan_in_fan_out"),
        *("inference_mode", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_core", "peft_version", "qalora_group_size", "runtime_config", "task_type"),
    }
)
_VARIANTS: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA, which leaves the tokens before its call alone",
    "layer_replication": "layer replication, which gives the model more layers",
    "target_parameters": "factors of parameters that are no module's weight",
    "trainable_token_indices": "rows of embeddings that are trained one by one",
    "use_dora": "DoRA, which scales the rows of the merged weight",
    "use_qalora": "QALoRA, which is for quantised bases",
}
_PLAIN_STARTS = {"true", "false", "none", "gaussian", "eva", "orthogonal"}
UNMERGED = (
    "Give --adapter ignore to take the base alone, or merge the adapter with peft first "
    "(merge_and_unload) and save the model."
)


def is_alone(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names holds an adapter, but no weights of a model."""
    here = set(names)
    return ADAPTER_CONFIG in here and not here & _WEIGHTS


def base_of(folder: Path) -> tuple[str, str | None]:
    """What the adapter of a folder was trained on: a folder or a repository, and its revision.

    Raises:
        InputModelError: If the adapter does not say.
    """
    config = read_json(guarded_path(folder, ADAPTER_CONFIG))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise InputModelError(
            f"{folder} holds an adapter without weights, and its {ADAPTER_CONFIG} names no base: "
            f"base_model_name_or_path is {base!r}",
            hint="Put the files of the adapter beside the weights of its base.",
        )
    beside = folder / base
    if hub_snapshot(folder) is None and beside.is_dir():
        return str(beside.resolve()), None
    return base, revision


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder, if it is that of a plain LoRA.

    Raises:
        InputModelError: If it is of another kind, or malformed.
    """
    config = read_json(guarded_path(folder, ADAPTER_CONFIG))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(f"peft_type is {kind!r}; only LORA can be merged")
    start = config.get("init_lora_weights", True)
    if str(start).lower() not in _PLAIN_STARTS:
        what = "the base was quantised" if start == "loftq" else "the base's weights were changed"
        raise _refused(f"init_lora_weights is {start!r}: {what} before it was trained")
    for key in sorted(config.keys() - _READ - _NEUTRAL):
        if config[key]:
            raise _refused(f"{key}: {_VARIANTS.get(key, 'this kvpatch does not know it')}")
    for key, good, expected in (
        ("r", _count(config.get("r")), "a positive integer"),
        ("lora_alpha", _number(config.get("lora_alpha")), "a number"),
        ("rank_pattern", _mapping(config.get("rank_pattern"), _count), "ranks by module"),
        ("alpha_pattern", _mapping(config.get("alpha_pattern"), _number), "numbers by module"),
        ("target_modules", _words(config.get("target_modules")), "text or a list of texts"),
        ("exclude_modules", _words(config.get("exclude_modules")), "text or a list of texts"),
        ("modules_to_save", _listed(config.get("modules_to_save")), "a list of texts"),
    ):
        if not good:
            raise InputModelError(
                f"{ADAPTER_CONFIG}: {key} must be {expected}, found {config.get(key)!r}"
            )
    return config


def _refused(what: str) -> InputModelError:
    return InputModelError(
        f"the adapter cannot be merged ({ADAPTER_CONFIG}): {what}", hint=UNMERGED
    )


def _count(value: object) -> bool:
    return type(value) is int and value > 0


def _number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type]


def _mapping(value: object, good: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(good, value.values())))


def _listed(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _words(value: object) -> bool:
    return isinstance(value, str) or _listed(value)


def scaling_of(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank of the factors of a module, and the factor on their product."""
    rank: int = _by_pattern(config, "rank_pattern", module, config["r"])
    alpha: float = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name from some dot on, as in peft."""
    for pattern, value in (config.get(key) or {}).items():
        if _matches(rf"(.*\.)?({pattern})$", module, key):
            return value
    return default


def _matches(pattern: str, name: str, key: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise InputModelError(
            f"{ADAPTER_CONFIG}: {key} holds {pattern!r}, which is no regular expression: {error}"
        ) from error


def is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether peft puts factors into a module of that name."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    copied = config.get("modules_to_save") or ()
    if excluded and _named(module, excluded, "exclude_modules"):
        return False
    if any(_matches(rf"(^|.*\.){name}($|\..*)", module, "modules_to_save") for name in copied):
        return False
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return True  # peft chose by the class of the model
    if not _named(module, targets, "target_modules"):
        # but for an output embedding that has the factors of the input's
        return bool(config.get("ensure_weight_tying"))
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(targets, str) or module in targets:
        return True
    listed = [layers] if isinstance(layers, int) else layers
    return _layer(module, config.get("layers_pattern")) in listed


def _named(module: str, names: str | list[str], key: str) -> bool:
    if isinstance(names, str):
        return _matches(rf"(?:{names})\Z", module, key)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer(module: str, patterns: str | list[str] | None) -> int | None:
    """Number of a module's layer, the first in its name or the first after a pattern."""
    listed = [patterns] if isinstance(patterns, str) else patterns
    for pattern in listed or [r"[^.]*"]:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if found is not None:
            return int(found[1])
    return None
