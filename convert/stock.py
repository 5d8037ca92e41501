"""The tensors that the stock class of a model has: what transformers reads, it is the judge of.

The class is built without data. For the plainest decoder block its tensors follow from config.json
alone, which spares the import of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from convert.config_keys import running_config
from convert.facts import ModelFacts
from kvpatch.errors import InputModelError

__all__ = ["StockTensors", "stock_tensors"]

Shape = tuple[int, ...]

# families whose layers are llama's, with what their attention has beside four plain weights
_PLAIN: Mapping[str, Mapping[str, str]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"q_proj.bias": "q", "k_proj.bias": "kv", "v_proj.bias": "kv"},
    "qwen3": {"q_norm.weight": "d", "k_norm.weight": "d"},
}
_SWITCHES = ("attention_bias", "mlp_bias")  # with which these classes have more
_ACTIVATIONS = frozenset({"silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"})
# stacked experts of a class -> the parts that are stored of each of them, by model_type
_EXPERTS = re.compile(r"(.*)mlp\.experts\.(gate_up_proj|down_proj)")
_STORED_EXPERTS = "{prefix}mlp.experts.{expert}.{part}_proj.weight"
_MIXTRAL_EXPERTS = "{prefix}block_sparse_moe.experts.{expert}.{part}.weight"
_MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StockTensors:
    """What a class reads, by the names of the family table.

    Args:
        shapes: Of its parameters.
        buffers: Of its tables that are stored; a checkpoint need not have them.
        imported: Whether transformers was asked.
    """

    shapes: Mapping[str, Shape]
    buffers: Mapping[str, Shape]
    imported: bool


def stock_tensors(
    config: Mapping[str, Any],
    facts: ModelFacts | None,
    stored: Mapping[str, Shape],
    *,
    heads: Sequence[str],
) -> StockTensors:
    """The tensors that the class of a config.json reads.

    Args:
        config: The parsed config.json.
        facts: Its attention; None for models with latents.
        stored: Shapes of the checkpoint's tensors, by the names of the family table. They decide
            between names where a class can be stored in two ways.
        heads: Names that the output embedding can have on disk.

    Raises:
        InputModelError: If transformers does not accept config.json.
    """
    plain = None if facts is None else _plain(config, facts)
    if plain is not None and plain.keys() >= stored.keys():
        return StockTensors(shapes=plain, buffers={}, imported=False)
    parameters, buffers = _of_class(json.dumps(dict(config), sort_keys=True))
    shapes: dict[str, Shape] = {}
    for name, shape in parameters.items():
        shapes |= _as_stored(name, shape, stored)
    (own,) = (head for head in heads if head in shapes)
    other = next((head for head in heads if head in stored), own)
    shapes[other] = shapes.pop(own)
    return StockTensors(shapes=shapes, buffers=buffers, imported=True)


def _plain(config: Mapping[str, Any], facts: ModelFacts) -> dict[str, Shape] | None:
    """The tensors of a model with the plainest block; None where it has another."""
    more, inner = _PLAIN.get(facts.family.model_type), config.get("intermediate_size")
    vocabulary = config.get("vocab_size")
    if (
        more is None
        or any(config.get(switch) for switch in _SWITCHES)
        or type(inner) is not int
        or type(vocabulary) is not int
        # other values the class refuses, or knows
        or config.get("hidden_act", "silu") not in _ACTIVATIONS
        or not -vocabulary <= (config.get("pad_token_id") or 0) < vocabulary
    ):
        return None
    g, family = facts.geometry, facts.family
    widths = {"q": g.heads * g.head_dim, "kv": g.kv_heads * g.head_dim, "d": g.head_dim}
    block: dict[str, Shape] = {
        "input_layernorm.weight": (g.hidden,),
        "post_attention_layernorm.weight": (g.hidden,),
        "mlp.gate_proj.weight": (inner, g.hidden),
        "mlp.up_proj.weight": (inner, g.hidden),
        "mlp.down_proj.weight": (g.hidden, inner),
        **{f"{p.name}.weight": p.shapes(g)[0] for p in family.projections},
        **{f"{family.attention}.{name}": (widths[width],) for name, width in more.items()},
    }
    return {
        family.embedding: (vocabulary, g.hidden),
        f"{family.base}norm.weight": (g.hidden,),
        family.heads[0]: (vocabulary, g.hidden),
        **{
            family.layer_prefix.format(layer=layer) + name: shape
            for layer in range(facts.layers)
            for name, shape in block.items()
        },
    }


@lru_cache(maxsize=8)
def _of_class(config_text: str) -> tuple[Mapping[str, Shape], Mapping[str, Shape]]:
    """Shapes of parameters and of stored buffers of the class of a config.json."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    config = json.loads(config_text)
    own = running_config(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own, attn_implementation="eager")
    except Exception as error:
        raise InputModelError(
            "config.json: transformers does not build a model of it: "
            f"{type(error).__name__}: {error}"
        ) from error
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    stored = model.state_dict()
    buffers = {n: tuple(stored[n].shape) for n in stored.keys() - parameters.keys()}
    return parameters, buffers


def _as_stored(name: str, shape: Shape, stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """A parameter as checkpoints hold it: experts one by one, unless they are stored stacked."""
    match = _EXPERTS.fullmatch(name)
    if match is None or name in stored:
        router = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        return {router if router in stored else name: shape}
    prefix, kind = match.groups()
    count, out, into = shape
    parts = {"down": (out, into)}
    if kind == "gate_up_proj":
        parts = {"gate": (out // 2, into), "up": (out // 2, into)}
    mixtral = f"{prefix}block_sparse_moe.gate.weight" in stored
    named = {
        part: (_MIXTRAL_EXPERTS, _MIXTRAL_PARTS[part]) if mixtral else (_STORED_EXPERTS, part)
        for part in parts
    }
    if count > len(stored):
        raise InputModelError(f"config.json: {count} experts, more than there are tensors")
    return {
        template.format(prefix=prefix, expert=expert, part=spelt): parts[part]
        for part, (template, spelt) in named.items()
        for expert in range(count)
    }
