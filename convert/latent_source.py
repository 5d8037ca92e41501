"""Models with latents as sources: what their config.json says, and their layers as latent layers.

They are the ``kvpatch_*`` classes and the stock models that this package writes, trained or not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from convert.checkpoint.reader import Checkpoint
from convert.config_keys import config_object
from convert.facts import ModelFacts, read_facts, with_stored_dtype
from convert.layer import LatentGeometry, LatentLayer
from convert.targets.deepseek import CLASSES
from convert.targets.deepseek_read import StockForm, norm_inputs, read_stock, stock_shapes
from convert.targets.latent import latent_shapes, unpack_latent
from kvpatch.errors import UnsupportedModelError
from kvpatch.memory import KVCache, latent_cache
from kvpatch.models import PREFIX, class_names

__all__ = ["LatentSource", "latent_source"]

# keys of a class of kvpatch that its stock class does not have
_OURS = frozenset(
    {
        "auto_map",
        "kv_lora_rank",
        "kv_rope_planes",
        "kv_source_layers",
        "qk_nope_head_dim",
        "v_head_dim",
    }
)
# keys of a stock class with latents that mean the same in Llama's
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
    "rope_parameters",
)
_STATED = ("dtype", "torch_dtype", "transformers_version")


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
    """What a checkpoint is that ``has_latents``.

    Raises:
        UnsupportedModelError: If it is none that this package writes.
    """
    config = checkpoint.config
    own = str(config.get("model_type")).startswith(PREFIX)
    held = _ours(config) if own else _stock(config)
    dtypes = (info.dtype for info in checkpoint.tensors.values())
    return dataclasses.replace(held, facts=with_stored_dtype(held.facts, dtypes))


def _ours(config: Mapping[str, Any]) -> LatentSource:
    """A model of a class of kvpatch."""
    model_type = config["model_type"].removeprefix(PREFIX)
    own = config_object(config, config["model_type"])
    ranks, planes, sources = own.kv_lora_rank, own.kv_rope_planes, own.kv_source_layers
    facts = read_facts(
        {key: value for key, value in config.items() if key not in _OURS}
        | {"model_type": model_type, "num_key_value_heads": own.num_attention_heads}
    )
    geometry = LatentGeometry(
        hidden=facts.geometry.hidden,
        heads=facts.geometry.heads,
        rank=ranks[0],
        nope_dim=own.qk_nope_head_dim,
        rope_dim=2 * len(planes[0]),
        value_dim=own.v_head_dim,
    )
    disagreements = {
        "its layers share latents": sources is not None and sources != list(range(facts.layers)),
        "its layers have latents of different ranks": len(set(ranks)) > 1,
        "its layers keep components of different frequencies": any(p != planes[0] for p in planes),
    }
    prefix = f"{facts.family.attention}."
    shapes = {prefix + name: shape for name, shape in latent_shapes(geometry).items()}
    return LatentSource(
        facts=_with_values(facts, geometry.value_dim),
        architecture=class_names(model_type)["AutoModelForCausalLM"],
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


def _stock(config: Mapping[str, Any]) -> LatentSource:
    """A model of a stock class, dense and with the positions that this package writes."""
    model_type = str(config.get("model_type"))
    if model_type not in CLASSES:
        raise _foreign(f"model_type {model_type!r} is not one of {', '.join(CLASSES)}")
    own = config_object(config, model_type)
    _refuse_others(own)
    facts = read_facts(
        {key: getattr(own, key) for key in _SHARED}
        | {key: config[key] for key in _STATED if key in config}
        | {
            "model_type": "llama",
            "num_key_value_heads": own.num_attention_heads,
            "head_dim": own.qk_rope_head_dim,
        }
    )
    biased = bool(own.attention_bias)
    geometry = LatentGeometry(
        hidden=facts.geometry.hidden,
        heads=facts.geometry.heads,
        rank=own.kv_lora_rank - biased,
        nope_dim=own.qk_nope_head_dim,
        rope_dim=own.qk_rope_head_dim,
        value_dim=own.v_head_dim,
    )
    form = StockForm(geometry=geometry, biased=biased, query_rank=own.q_lora_rank)
    shapes, planes = stock_shapes(form), tuple(range(geometry.rope_dim // 2))
    return LatentSource(
        facts=_with_values(facts, geometry.value_dim),
        architecture=CLASSES[model_type],
        geometry=geometry,
        planes=planes,
        cached_rank=form.cached_rank,
        shapes=shapes,
        reads=tuple(dict.fromkeys((*shapes, *norm_inputs(form)))),
        read=partial(read_stock, form=form, planes=planes, scale=facts.scales[0]),
        stock=form,
    )


def _refuse_others(own: Any) -> None:
    """Refuse a configuration that this package never writes."""
    rope, dense = own.rope_parameters, getattr(own, "first_k_dense_replace", math.inf)
    problems = {
        "it has experts": dense < own.num_hidden_layers,
        "its rotary pairs are not neighbours": not own.rope_interleave,
        f"its rotary positions are of kind {rope['rope_type']!r}": (
            rope["rope_type"] not in ("default", "longrope")
            or rope.get("attention_factor", 1.0) != 1.0
        ),
    }
    found = next((problem for problem, holds in problems.items() if holds), None)
    if found is not None:
        raise _foreign(found)


def _foreign(problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this is no result of kvpatch mla: {problem}",
        hint="Export what kvpatch mla or kvpatch export wrote, trained or not.",
    )


def _with_values(facts: ModelFacts, value_dim: int) -> ModelFacts:
    geometry = dataclasses.replace(facts.geometry, value_dim=value_dim)
    return dataclasses.replace(facts, geometry=geometry)
