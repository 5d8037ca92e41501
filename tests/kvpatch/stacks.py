"""Tiny stock models of every family, and how their attention weights lie in memory.

Everything here is written from the stock transformers classes alone, and nothing from the table of
kvpatch: the layouts below are the second opinion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvpatch.models import family_of
from kvpatch.models.configuration_kvpatch import config_class
from kvpatch.models.modeling_kvpatch import causal_lm_class
from tests.families import tiny
from tests.families.stock import Float64, make

__all__ = [
    "CLASSIC",
    "MODELS",
    "ReadingCache",
    "converted",
    "copied_heads",
    "pairs",
    "stock_model",
]

LAYERS, HEADS = 4, 4

_SIZES = {
    key: value
    for key, value in (tiny.SIZES | {"hidden_size": 64, "num_hidden_layers": LAYERS}).items()
    if key != "num_key_value_heads"
}
_MPT = {"vocab_size": 97, "d_model": 64, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_FALCON = {**_SIZES, "multi_query": False, "parallel_attn": False}


def _deeper(name: str, **settings: Any) -> dict[str, Any]:
    return {**tiny.settings(name), "num_hidden_layers": LAYERS, **settings}


# families without a stock GQA class, and those whose tiny settings are made for two layers
_OWN: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": _deeper("gemma3_text", layer_types=_ALTERNATING),
    "olmo3": _deeper("olmo3", layer_types=_ALTERNATING),
    "smollm3": _deeper("smollm3", no_rope_layers=[1, 1, 0, 0]),
    "gpt_neox": _SIZES,
    "gpt_neox:sequential-nobias-tied": {
        **_SIZES,
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 1.0},
    },
    "persimmon": _SIZES,
    "persimmon:nonorm": {**_SIZES, "qk_layernorm": False},
    "opt": {**_SIZES, "ffn_dim": 40, "dropout": 0.0},
    "opt:postnorm-nobias": {
        **_SIZES,
        "ffn_dim": 40,
        "dropout": 0.0,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
        "enable_bias": False,
    },
    "gpt2": _SIZES,
    "gpt2:unscaled": {
        **_SIZES,
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
    },
    "gptj": {**_SIZES, "rotary_dim": 8},
    "codegen": {**_SIZES, "rotary_dim": 8},
    "gpt_neo": {**_SIZES, "attention_types": [[["global", "local"], 2]], "window_size": 4},
    "bloom": _SIZES,
    "bloom:postnorm": {**_SIZES, "apply_residual_connection_post_layernorm": True},
    "mpt": _MPT,
    "mpt:clip-scale": {**_MPT, "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.3}},
    "falcon": {**_FALCON, "alibi": True, "bias": True},
    "falcon:rope-parallel": {**_FALCON, "parallel_attn": True},
}
_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
_PER_LAYER = {"layer_types", "no_rope_layers", "num_hidden_layers"}

# model name -> settings of the stock config; the family is the part before the colon
MODELS: Mapping[str, Mapping[str, Any]] = {
    name: _deeper(name)
    for name, settings in tiny.MODELS.items()
    if tiny.family(name) not in {*_EXPERTS, *map(tiny.family, _OWN)}
    and not _PER_LAYER & settings.keys()
} | _OWN

# one model per family
CLASSIC = tuple(name for name in MODELS if ":" not in name)


@contextmanager
def _in_float64() -> Iterator[None]:
    """Makes models with all their tables in float64, also those that stem from integers."""
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@cache
def _weights(name: str) -> Mapping[str, Tensor]:
    with _in_float64():
        weights: Mapping[str, Tensor] = make(name, MODELS[name]).state_dict()
    return weights


def stock_model(name: str) -> Any:
    """A fresh stock model in float64, with the same random weights every time."""
    config = CONFIG_MAPPING[tiny.family(name)](**MODELS[name])
    # eager falcon adds its ALiBi bias to the scores and, since transformers 5, to the mask as well
    how = "sdpa" if name.startswith("falcon") else "eager"
    with _in_float64():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=how)
    model.load_state_dict(_weights(name))
    return model.eval()


Heads = dict[str, Tensor]


def _separate(attention: Any) -> Heads:
    parts = {}
    for part in "qkv":
        linear = getattr(attention, f"{part}_proj")
        parts[part] = linear.weight.unflatten(0, (HEADS, -1))
        if linear.bias is not None:
            parts[f"{part}_bias"] = linear.bias.unflatten(0, (HEADS, -1))
    return parts


def _fused(attribute: str, order: str, split: Callable[[Tensor], Tensor]) -> Callable[..., Heads]:
    """Fused projections; ``split`` gives [parts, H, D, ...] of a weight or bias."""

    def parts(attention: Any) -> Heads:
        module = getattr(attention, attribute)
        conv = type(module).__name__ == "Conv1D"
        found = dict(zip(order, split(module.weight.T if conv else module.weight), strict=True))
        if module.bias is not None:
            biases = (f"{part}_bias" for part in order)
            found |= dict(zip(biases, split(module.bias), strict=True))
        return found

    return parts


def _stacked(fused: Tensor) -> Tensor:
    return fused.unflatten(0, (3, HEADS, -1))


def _by_head(fused: Tensor) -> Tensor:
    return fused.unflatten(0, (HEADS, 3, -1)).transpose(0, 1)


def _by_core(fused: Tensor) -> Tensor:
    """CodeGen was trained on four cores, each of which has a block of heads; here one head."""
    return fused.unflatten(0, (4, 3, -1)).transpose(0, 1)


_HEADS: Mapping[str, Callable[..., Heads]] = {
    "phi3": _fused("qkv_proj", "qkv", _stacked),
    "mpt": _fused("Wqkv", "qkv", _stacked),
    "gpt2": _fused("c_attn", "qkv", _stacked),
    "codegen": _fused("qkv_proj", "qvk", _by_core),
    **dict.fromkeys(
        ("gpt_neox", "persimmon", "bloom", "falcon"), _fused("query_key_value", "qkv", _by_head)
    ),
}
_OUTPUTS = ("o_proj", "dense", "out_proj", "c_proj")
_LAYERS = {
    "gpt_neox": lambda m: [layer.attention for layer in m.gpt_neox.layers],
    "opt": lambda m: [layer.self_attn for layer in m.model.decoder.layers],
    "gpt2": lambda m: [layer.attn for layer in m.transformer.h],
    "gptj": lambda m: [layer.attn for layer in m.transformer.h],
    "codegen": lambda m: [layer.attn for layer in m.transformer.h],
    "gpt_neo": lambda m: [layer.attn.attention for layer in m.transformer.h],
    "bloom": lambda m: [layer.self_attention for layer in m.transformer.h],
    "falcon": lambda m: [layer.self_attention for layer in m.transformer.h],
    "mpt": lambda m: [layer.attn for layer in m.transformer.blocks],
}


def _attentions(name: str, model: Any) -> list[nn.Module]:
    default = lambda m: [layer.self_attn for layer in m.model.layers]  # noqa: E731
    return _LAYERS.get(tiny.family(name), default)(model)  # type: ignore[no-any-return]


def _head_norms(attention: Any) -> list[Tensor]:
    """The key norm's weights of every head, if heads have their own; views."""
    norm = getattr(attention, "k_norm", getattr(attention, "k_layernorm", None))
    if norm is None:
        return []
    if hasattr(norm, "norms"):
        return [one.weight for one in norm.norms]
    width = norm.weight.numel() // HEADS
    return list(norm.weight.view(HEADS, -1)) if width >= attention.head_dim else []


@torch.no_grad()
def copied_heads(name: str, model: Any, kv_heads: int) -> Any:
    """The stock model with the KV heads of each group made copies of its first, in place."""
    members = HEADS // kv_heads
    for attention in _attentions(name, model):
        parts = _HEADS.get(tiny.family(name), _separate)(attention)
        fields = [parts[key] for key in ("k", "v", "k_bias", "v_bias") if key in parts]
        for field in [*fields, _head_norms(attention)]:
            for head, weight in enumerate(field):
                weight.copy_(field[head // members * members])
    return model


@torch.no_grad()
def converted(
    name: str, model: Any, kv_heads: int, sources: Sequence[int] | None, **settings: Any
) -> Any:
    """The kvpatch model in float64 with the weights of a stock model whose heads are copies."""
    family = family_of(tiny.family(name))
    config = config_class(family)(
        **{**MODELS[name], **settings, "num_key_value_heads": kv_heads},
        kv_source_layers=None if sources is None else list(sources),
    )
    with _in_float64():
        ours: Any = causal_lm_class(family)._from_config(config, attn_implementation="eager")
    stock_prefixes = {module: path for path, module in model.named_modules()}
    state = model.state_dict()
    for layer, attention in enumerate(_attentions(name, model)):
        prefix = stock_prefixes[attention] + "."
        old = {key: state.pop(key) for key in [*state] if key.startswith(prefix)}
        owns = sources is None or sources[layer] == layer
        state |= _own_layout(name, attention, prefix, old, kv_heads, owns=owns)
    ours.load_state_dict(state)
    return ours.eval()


def _own_layout(
    name: str, attention: Any, prefix: str, old: Heads, kv_heads: int, *, owns: bool
) -> Heads:
    """Weights of one attention module as kvpatch stores them."""
    parts = _HEADS.get(tiny.family(name), _separate)(attention)
    new = {}
    for part in "qkv" if owns else "q":
        step = 1 if part == "q" else HEADS // kv_heads
        for suffix, ending in (("", "weight"), ("_bias", "bias")):
            if part + suffix in parts:
                new[f"{prefix}{part}_proj.{ending}"] = parts[part + suffix][::step].flatten(0, 1)
    (output,) = (getattr(attention, n) for n in _OUTPUTS if hasattr(attention, n))
    conv = type(output).__name__ == "Conv1D"
    new[f"{prefix}o_proj.weight"] = output.weight.T if conv else output.weight
    if output.bias is not None:
        new[f"{prefix}o_proj.bias"] = output.bias
    norms = {key: weight for key, weight in old.items() if "norm" in key}
    if not owns:
        norms = {key: weight for key, weight in norms.items() if not key.startswith(f"{prefix}k")}
    elif heads := _head_norms(attention):
        kept = heads[:: HEADS // kv_heads]
        keys = sorted(key for key in norms if key.startswith(f"{prefix}k"))
        if len(keys) > 1:  # a tensor per head
            norms = {key: weight for key, weight in norms.items() if key not in keys}
            norms |= dict(zip(keys, kept, strict=False))
        else:
            whole = torch.cat if norms[keys[0]].dim() == 1 else torch.stack
            norms[keys[0]] = whole(list(kept))
    return new | norms


class ReadingCache(DynamicCache):  # type: ignore[misc]
    """Makes a stock model share: a reader's own keys and values are thrown away for its source's.

    The stock classes take what their attention uses from ``update``, after RoPE and norms.
    """

    def __init__(self, sources: Sequence[int] | None, config: Any) -> None:
        super().__init__(config=config)
        self.sources = sources
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        own: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        self.states[layer_idx] = own
        return own if self.sources is None else self.states[self.sources[layer_idx]]


def pairs(name: str) -> list[int]:
    """Every second layer of a kind reads the one before it; kinds do not mix."""
    settings = MODELS[name]
    config = CONFIG_MAPPING[tiny.family(name)](**settings)
    lists = [getattr(config, key, None) for key in ("layer_types", "no_rope_layers")]
    kinds = list(zip(*[entry for entry in lists if entry is not None], strict=True))
    sources: list[int] = []
    for layer in range(LAYERS):
        kind = kinds[layer] if kinds else None
        same = [i for i in range(layer) if (kinds[i] if kinds else None) == kind]
        sources.append(same[-1] if len(same) % 2 else layer)
    return sources
