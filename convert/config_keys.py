"""Keys of config.json that say how a model was run or trained, not what it computes.

Checkpoints carry them from one program to the next. kvpatch runs models with settings of its own,
and passes on to a result only what describes it; ``SETTINGS`` decides key by key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convert.checkpoint.paths import guarded_path
from convert.checkpoint.reader import read_json
from convert.families import FAMILIES
from kvpatch.errors import InputModelError
from kvpatch.models import PREFIX

__all__ = [
    "SETTINGS",
    "Setting",
    "To",
    "config_object",
    "refuse_settings",
    "result_config",
    "running_config",
]


@dataclass(frozen=True, slots=True)
class To:
    """A key gets this value."""

    value: object


Fate = Literal["kept", "dropped"] | To


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What becomes of keys where config.json has them.

    Args:
        keys: Their names.
        result: Their fate in the config.json of a result.
        run: Their fate where kvpatch runs the model; a value replaces that of the class, too.
        why: The reason for both.
        empty: Holds only where the value is null or empty.
        windowless: Holds only for families whose attention never has a window.
    """

    keys: tuple[str, ...]
    result: Fate
    run: Fate
    why: str
    empty: bool = False
    windowless: bool = False


SETTINGS: tuple[Setting, ...] = (
    Setting(
        keys=(
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
            "_experts_implementation",
            "_experts_implementation_internal",
            "_flash_attn_2_enabled",
            "attn_implementation",
            "experts_implementation",
            "use_flash_attention_2",
            "use_flash_attn",
        ),
        result="dropped",
        run="dropped",
        why="kernels of the machine that wrote the file; others may not have them",
    ),
    Setting(
        keys=(
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "return_dict",
            "tie_last_hidden_states",
            "torchscript",
            "use_return_dict",
        ),
        result="dropped",
        run="dropped",
        why="what a call returns beside the logits, and in which form; each call says so itself",
    ),
    Setting(
        keys=("cache_implementation",),
        result="dropped",
        run="dropped",
        why="the kind of cache of a call of generate; each call says so itself",
    ),
    Setting(
        keys=("use_cache",),
        result=To(True),
        run=To(True),
        why="false is left over from training, which recomputes; a result is made to cache",
    ),
    Setting(
        keys=("chunk_size_feed_forward", "gradient_checkpointing", "use_bfloat16"),
        result="dropped",
        run="dropped",
        why="memory and arithmetic of a training run",
    ),
    Setting(
        keys=(
            "activation_dropout",
            "attention_dropout",
            "attn_pdrop",
            "dropout",
            "emb_pdrop",
            "embd_pdrop",
            "embed_dropout",
            "embedding_dropout",
            "hidden_dropout",
            "resid_dropout",
            "resid_pdrop",
            "residual_dropout",
            "router_jitter_noise",
        ),
        result="kept",
        run=To(0.0),
        why="noise for training from scratch; uptraining aims at what a model gives without it",
    ),
    Setting(
        keys=("layerdrop",),
        result=To(0.0),
        run=To(0.0),
        why="noise, too; a dropped layer would leave those that read its keys without any",
    ),
    Setting(
        keys=("pretraining_tp",),
        result="kept",
        run=To(1),
        why="splits products to repeat the rounding of a training on several devices",
    ),
    Setting(
        keys=(
            "add_cross_attention",
            "cross_attention_hidden_size",
            "is_decoder",
            "is_encoder_decoder",
            "tie_encoder_decoder",
        ),
        result="dropped",
        run="dropped",
        why="place of the model beside an encoder; kvpatch converts decoders alone",
    ),
    Setting(
        keys=(
            "finetuning_task",
            "id2label",
            "label2id",
            "loss_type",
            "num_labels",
            "problem_type",
        ),
        result="dropped",
        run="dropped",
        why="of a classifier's head; a causal language model has none",
    ),
    Setting(
        keys=("_commit_hash", "_name_or_path", "name_or_path", "unsloth_fixed", "unsloth_version"),
        result="dropped",
        run="dropped",
        why="where the source came from and what loaded it; kvpatch.json says that of a result",
    ),
    Setting(
        keys=("auto_map",),
        result="dropped",
        run="dropped",
        why="code of the source would not know the converted attention, and is never run",
    ),
    Setting(
        keys=(
            "attribute_map",
            "base_model_ep_plan",
            "base_model_fsdp_plan",
            "base_model_pp_plan",
            "base_model_tp_plan",
            "configuration_files",
            "distributed_config",
            "fusion_config",
            "transformers_weights",
        ),
        result="dropped",
        run="dropped",
        why="names other files or classes to the loader, or devices to spread the model over",
    ),
    Setting(
        keys=("decoder", "generator", "text_config", "text_encoder", "vision_config"),
        result="dropped",
        run="dropped",
        why="parts of a composite model that the decoder was taken out of; loaders prefer them",
    ),
    Setting(
        keys=("pruned_heads", "quantization_config"),
        result="dropped",
        run="dropped",
        why="nothing was pruned or quantised, but loaders take the key for a statement that it was",
        empty=True,
    ),
    Setting(
        keys=("attention_chunk_size", "sliding_window"),
        result="dropped",
        run="dropped",
        why="the class sees all tokens, but its cache would drop those that a window has passed",
        windowless=True,
    ),
    Setting(
        keys=("num_nextn_predict_layers",),
        result="dropped",
        run="kept",
        why="counts layers for speculative decoding, which a result does not have",
    ),
    Setting(
        keys=(
            "do_sample",
            "early_stopping",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beams",
            "repetition_penalty",
            "temperature",
            "top_k",
            "top_p",
        ),
        result="kept",
        run="kept",
        why="read by transformers 4 where there is no generation_config.json, later by nobody",
    ),
    Setting(
        keys=("transformers_version",),
        result="kept",
        run="kept",
        why="the release in whose spelling the keys are",
    ),
)

_OF = {key: setting for setting in SETTINGS for key in setting.keys}

# settings that make another model of the tensors, and what they say
_REFUSED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "pruned_heads": (
        lambda value: bool(value) and any(value.values() if isinstance(value, dict) else value),
        "heads were cut out of the tensors",
    ),
    "is_causal": (lambda value: value is False, "not a causal model"),
}


def refuse_settings(config: Mapping[str, Any]) -> None:
    """Refuse a config.json with a setting that makes another model of the tensors.

    Raises:
        InputModelError: Naming the key.
    """
    for key, (holds, what) in _REFUSED.items():
        if key in config and holds(config[key]):
            raise InputModelError(f"config.json has {key} {config[key]!r}: {what}")


def result_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as a result takes it over: every key with the fate that it has in results."""
    fates = {key: (value, _fate(key, config, "result")) for key, value in config.items()}
    return {
        key: fate.value if isinstance(fate, To) else value
        for key, (value, fate) in fates.items()
        if fate != "dropped"
    }


def running_config(source: Path | Mapping[str, Any]) -> Any:
    """The configuration object with which kvpatch runs a model.

    Args:
        source: A checkpoint folder, or its config.json.

    Raises:
        InputModelError: If there is no config.json, or transformers does not accept it.
    """
    config = read_json(guarded_path(source, "config.json")) if isinstance(source, Path) else source
    own = config_object(config, str(config.get("model_type")))
    for part in (own, *(getattr(own, name) for name in own.sub_configs)):
        for key, setting in _OF.items():
            fate = setting.run
            if isinstance(fate, To) and getattr(part, key, None) not in {None, fate.value}:
                setattr(part, key, fate.value)
    return own


def config_object(config: Mapping[str, Any], model_type: str) -> Any:
    """The configuration object of transformers or kvpatch for a config.json.

    Transformers fills in what it leaves out. Keys that must not reach it are left out.

    Raises:
        InputModelError: If transformers does not accept it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    try:
        known = CONFIG_MAPPING[model_type]
        parts = getattr(known, "sub_configs", ())
        told = {
            key: value
            for key, value in config.items()
            if key in parts or _fate(key, config, "run") != "dropped"
        }
        return known.from_dict(copy.deepcopy(told))  # it completes nested objects in place
    except Exception as error:
        raise InputModelError(f"config.json: transformers does not accept it: {error}") from error


def _fate(key: str, config: Mapping[str, Any], column: Literal["result", "run"]) -> Fate:
    setting = _OF.get(key)
    if (
        setting is None
        or (setting.empty and config[key])
        or (setting.windowless and not _windowless(config))
    ):
        return "kept"
    return setting.result if column == "result" else setting.run


def _windowless(config: Mapping[str, Any]) -> bool:
    name = str(config.get("model_type")).removeprefix(PREFIX)
    return name in FAMILIES and FAMILIES[name].windows.rule == "never"
