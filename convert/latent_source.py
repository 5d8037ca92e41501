"""Models with latents as sources: what their config.json says, and their layers as latent layers.

They are the ``kvpatch_*`` classes and the stock models that this package writes, trained or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.facts import ModelFacts, has_latents, read_facts, with_stored_dtype
from convert.layer import LatentGeometry, LatentLayer
from convert.targets.deepseek_read import StockForm, norm_inputs, read_stock, stock_shapes
from convert.targets.latent import latent_shapes, unpack_latent
from kvpatch.errors import InputModelError
from kvpatch.memory import KVCache, latent_cache
from kvpatch.models import PREFIX

__all__ = ["LatentSource", "latent_source"]

_STOCK = ("deepseek_v3", "youtu")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSource:
    """A model with latents, whose layers agree in their sizes.

    Args:
        facts: The model without its attention: the stock model that it was, or a Llama model
            where the class is a stock one with latents, which has Llama's block.
        architecture: Its class.
        geometry: Sizes of every layer.
        planes: RoPE plane of each rotary pair.
        cached_rank: Latent dims that it caches.
        shapes: Of the tensors of a layer's attention, by their names inside the layer.
        reads: Names of all tensors that ``read`` takes.
        read: The latent layer of the tensors of a layer, with the scale of ``facts``.
        stock: What config.json says, if the class is a stock one.
        problem: Why no stock class holds it, if its layers do not agree.
    """

    facts: ModelFacts
    architecture: str
    geometry: LatentGeometry
    planes: tuple[int, ...]
    cached_rank: int
    shapes: Mapping[str, tuple[int, ...]]
    reads: tuple[str, ...]
    read: Callable[[Mapping[str, Tensor]], LatentLayer]
    stock: StockForm | None = None
    problem: str | None = None

    @property
    def plan_facts(self) -> ModelFacts:
        """The facts for plan and engine: no row of the family table describes latents."""
        family = dataclasses.replace(
            self.facts.family, architecture=self.architecture, projections=()
        )
        return dataclasses.replace(self.facts, family=family)

    @property
    def cache(self) -> KVCache:
        """Its KV cache."""
        return latent_cache(
            layers=self.facts.layers,
            rank=self.cached_rank,
            rope_dim=self.geometry.rope_dim,
            bytes_per_value=self.facts.bytes_per_value(),
        )

    def names(self, layer: int) -> list[str]:
        """Names of the tensors of a layer's attention."""
        prefix = self.facts.family.layer_prefix.format(layer=layer)
        return [prefix + name for name in self.shapes]

    def tensors(
        self, checkpoint: Checkpoint, layer: int, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Tensors of a layer by their ``names`` inside it."""
        prefix = self.facts.family.layer_prefix.format(layer=layer)
        return {name: checkpoint.read(prefix + name) for name in names}


def latent_source(checkpoint: Checkpoint) -> LatentSource:
    """What a checkpoint with latents is.

    Raises:
        InputModelError: If it is none that this package writes, or contradicts itself.
    """
    config = checkpoint.config
    if not has_latents(config):
        raise InputModelError(
            f"{config.get('model_type')} has no latents; only results of kvpatch mla are exported",
            hint="Convert it: kvpatch mla.",
        )
    own = str(config.get("model_type")).startswith(PREFIX)
    held = _ours(config) if own else _stock(config)
    dtypes = (info.dtype for info in checkpoint.tensors.values())
    return dataclasses.replace(held, facts=with_stored_dtype(held.facts, dtypes))


def _ours(config: Mapping[str, Any]) -> LatentSource:
    """A model of a class of kvpatch."""
    try:
        ranks, planes = config["kv_lora_rank"], config["kv_rope_planes"]
        nope_dim, value_dim = config["qk_nope_head_dim"], config["v_head_dim"]
    except KeyError as key:
        raise InputModelError(f"config.json has latents, but no {key}") from None
    own = {"kv_lora_rank", "kv_rope_planes", "qk_nope_head_dim", "v_head_dim", "auto_map"}
    stock = {key: value for key, value in config.items() if key not in own}
    facts = read_facts(
        stock
        | {
            "model_type": config["model_type"].removeprefix(PREFIX),
            "num_key_value_heads": config["num_attention_heads"],
            "kv_source_layers": None,
        }
    )
    geometry = LatentGeometry(
        hidden=facts.geometry.hidden,
        heads=facts.geometry.heads,
        rank=ranks[0],
        nope_dim=nope_dim,
        rope_dim=2 * len(planes[0]),
        value_dim=value_dim,
    )
    sources = config.get("kv_source_layers")
    disagreements = {
        "its layers share latents": sources is not None and sources != list(range(facts.layers)),
        "its layers have latents of different ranks": len(set(ranks)) > 1,
        "its layers keep components of different frequencies": any(p != planes[0] for p in planes),
    }
    prefix = f"{facts.family.attention}."
    shapes = {prefix + name: shape for name, shape in latent_shapes(geometry).items()}
    return LatentSource(
        facts=_with_values(facts, value_dim),
        architecture=config["architectures"][0],
        geometry=geometry,
        planes=tuple(planes[0]),
        cached_rank=geometry.rank,
        shapes=shapes,
        reads=tuple(shapes),
        read=partial(
            unpack_latent,
            geometry=geometry,
            prefix=prefix,
            planes=tuple(planes[0]),
            scale=facts.scales[0],
        ),
        problem=next((what for what, holds in disagreements.items() if holds), None),
    )


# of a stock model with latents; Llama's class has them, too, and gives them the same meaning
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_dropout",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "rope_theta",
    "rope_parameters",
    "dtype",
    "torch_dtype",
    "transformers_version",
)


def _stock(config: Mapping[str, Any]) -> LatentSource:
    """A model of a stock class, dense and with the positions that this package writes."""
    _refuse_others(config)
    biased, rope_dim = bool(config["attention_bias"]), config["qk_rope_head_dim"]
    facts = read_facts(
        {
            **{key: config[key] for key in _SHARED if key in config},
            "model_type": "llama",
            "num_key_value_heads": config["num_attention_heads"],
            "head_dim": rope_dim,
        }
    )
    geometry = LatentGeometry(
        hidden=facts.geometry.hidden,
        heads=facts.geometry.heads,
        rank=config["kv_lora_rank"] - biased,
        nope_dim=config["qk_nope_head_dim"],
        rope_dim=rope_dim,
        value_dim=config["v_head_dim"],
    )
    form = StockForm(geometry=geometry, biased=biased, query_rank=config.get("q_lora_rank"))
    shapes, planes = stock_shapes(form), tuple(range(rope_dim // 2))
    return LatentSource(
        facts=_with_values(facts, geometry.value_dim),
        architecture=config["architectures"][0],
        geometry=geometry,
        planes=planes,
        cached_rank=form.cached_rank,
        shapes=shapes,
        reads=tuple(dict.fromkeys((*shapes, *norm_inputs(form)))),
        read=partial(read_stock, form=form, planes=planes, scale=facts.scales[0]),
        stock=form,
    )


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Refuse what this package never writes."""
    rope = config.get("rope_parameters") or {}
    layers = config.get("num_hidden_layers", 0)
    experts = config.get("model_type") == "deepseek_v3"
    problems = {
        f"model_type {config.get('model_type')!r} is not one of {', '.join(_STOCK)}": (
            config.get("model_type") not in _STOCK
        ),
        "it has experts": experts and config.get("first_k_dense_replace", 0) < layers,
        "its rotary pairs are not neighbours": not config.get("rope_interleave", True),
        f"its rotary positions are of kind {rope.get('rope_type')!r}": (
            rope.get("rope_type") not in ("default", "longrope")
            or rope.get("attention_factor", 1.0) != 1.0
        ),
    }
    found = next((problem for problem, holds in problems.items() if holds), None)
    if found is not None:
        raise InputModelError(
            f"this is no result of kvpatch mla: {found}",
            hint="Export what kvpatch mla or kvpatch export wrote, trained or not.",
        )


def _with_values(facts: ModelFacts, value_dim: int) -> ModelFacts:
    geometry = dataclasses.replace(facts.geometry, value_dim=value_dim)
    return dataclasses.replace(facts, geometry=geometry)
