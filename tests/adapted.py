"""Adapters that peft writes beside tiny models, and what peft makes of both."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from convert.adapters import AdapterChoice
from convert.checkpoint.reader import Checkpoint
from convert.hub import fetch_source
from convert.opening import open_model
from tests.families.stock import make
from tests.families.texts import write_tokenizer
from tests.families.tiny import settings

__all__ = [
    "EVERY",
    "as_peft",
    "effective_weights",
    "opened",
    "save_merged",
    "set_base",
    "write_adapter",
    "write_base",
]

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_base(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model, whose weights are multiples of 2 ** -10."""
    make(name, settings(name)).to(dtype).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path | None = None, *, seed: int = 5, **keys: Any) -> Path:
    """Train nothing, but save an adapter as peft does, beside its base or elsewhere.

    All that it holds are multiples of 1/16, so that products of factors are exact.
    """
    keys = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **keys}
    generator = torch.Generator().manual_seed(seed)
    with _without_warnings():
        model = get_peft_model(_base_model(base), LoraConfig(**keys))
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = torch.randint(-8, 9, parameter.shape, generator=generator) / 16
                parameter.data.copy_(drawn)
        model.save_pretrained(folder or base)
    return folder or base


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _base_model(folder: Path) -> Any:
    """The base alone, though an adapter may lie beside it."""
    config = folder / "adapter_config.json"
    away = config.rename(folder / "away.json") if config.exists() else None
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    finally:
        if away is not None:
            away.rename(config)


def as_peft(base: Path, adapter: Path | None = None) -> Any:
    """Base and adapter, not merged."""
    with _without_warnings():
        return PeftModel.from_pretrained(_base_model(base), adapter or base).eval()


@torch.no_grad()
def effective_weights(model: Any) -> Mapping[str, Tensor]:
    """What each module of a model of peft computes with, by the names of its stock class."""
    found: dict[str, Tensor] = {}
    inner = model.base_model.model
    for name, module in inner.named_modules(remove_duplicate=False):
        parts = name.split(".")
        if {"base_layer", "original_module", "modules_to_save"} & set(parts) or "lora_" in name:
            continue
        own, added, whole = module, None, False
        if isinstance(module, ModulesToSaveWrapper):
            own, whole = module.modules_to_save["default"], True
        elif isinstance(module, LoraLayer):
            own, added = module.get_base_layer(), module
        for leaf, parameter in own.named_parameters(recurse=whole):
            value = parameter.detach().float()
            if added is not None and leaf == "weight":
                value = value + added.get_delta_weight("default")
            if added is not None and leaf == "bias" and added.lora_bias.get("default"):
                value = value + added.lora_B["default"].bias * added.scaling["default"]
            found[f"{name}.{leaf}"] = value.to(parameter.dtype)
    return found


@contextmanager
def opened(
    folder: Path, choice: AdapterChoice, *, allow_pickle: bool = False
) -> Iterator[Checkpoint]:
    """A checkpoint with its adapter merged or left out."""
    source = fetch_source(str(folder), allow_pickle=allow_pickle)
    with open_model(source, adapter=choice, allow_pickle=allow_pickle) as model:
        yield model.checkpoint


def save_merged(beside: Path, folder: Path) -> None:
    """Base and adapter as one model, with two embeddings where peft computes with two."""
    model = as_peft(beside)
    found = dict(effective_weights(model))
    write_tokenizer(folder)
    if (beside / "generation_config.json").exists():
        shutil.copy(beside / "generation_config.json", folder)
    config = json.loads((beside / "config.json").read_text())
    embedding = next(name for name in found if name.endswith(("embed_tokens.weight", "wte.weight")))
    if torch.equal(found[embedding], found["lm_head.weight"]):
        del found["lm_head.weight"]
    else:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(beside / "model.safetensors")
    ordered = {name: found[name].reshape(stored[name].shape) for name in stored} | found
    save_file({n: t.contiguous() for n, t in ordered.items()}, folder / "model.safetensors")


def set_base(adapter: Path, base: str | None, **more: object) -> None:
    """Change what an adapter says it was trained on."""
    file = adapter / "adapter_config.json"
    keys = {"base_model_name_or_path": base, **more}
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
