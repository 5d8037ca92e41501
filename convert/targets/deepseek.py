"""Multi-head latent attention of transformers itself: DeepSeek-V3's class, all layers dense.

Any block that is DeepSeek's up to factors (``convert/targets/dense_blocks.py``) is written for the
unmodified class, which then computes the same logits. Youtu's class is the same without experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from convert.facts import ModelFacts
from convert.families import Family
from convert.families.naming import layer_and_rest
from convert.targets.deepseek_layer import INPUT_NORM, InertForm, Layout, written
from convert.targets.dense_blocks import BLOCKS, block_problem, stock_config
from convert.targets.inert import EPSILON, constant_norm, epsilon_norm
from convert.targets.rope_tables import (
    rope_keys,
    rope_problem,
    rope_table,
    switching_length,
)
from convert.targets.target import Rewrite, Target
from kvpatch.errors import InputModelError

__all__ = ["CLASSES", "Architecture", "deepseek_class", "deepseek_problem"]

Architecture = Literal["deepseek_v3", "youtu"]
Fate = Rewrite | tuple[Rewrite, ...] | None

CLASSES: Mapping[str, str] = {"deepseek_v3": "DeepseekV3ForCausalLM", "youtu": "YoutuForCausalLM"}


def deepseek_problem(facts: ModelFacts, planes: Sequence[int]) -> str | None:
    """Why no stock class with latent attention holds conversions of a model; None if one does.

    Args:
        facts: The source.
        planes: Source plane of each rotary pair.
    """
    problem = block_problem(facts) or rope_problem(facts) or _cache_problem(facts)
    return problem or (None if planes else "no rotary pair is kept, and the class needs one")


def _cache_problem(facts: ModelFacts) -> str | None:
    if not BLOCKS[facts.family.model_type].renews_cache:
        return None
    length = switching_length(facts, stock_config(facts))
    if length is None:
        return None
    return (
        f"beyond {length:,} tokens it has other rotary frequencies, and its class then computes "
        "all cached keys anew, as no class with latents of transformers does"
    )


def deepseek_class(
    facts: ModelFacts,
    *,
    rank: int,
    planes: Sequence[int],
    nope_dim: int,
    arch: Architecture,
    inert: InertForm,
    dtype: str | None,
    largest: float | None,
    query_bias: bool | None = None,
) -> Target | None:
    """The stock class for latent layers; None where there is a ``deepseek_problem``.

    Its layers are ``LatentLayer``s of the source's scale and value width, with ``planes`` or, where
    the source has no positions, with none; smaller ones are filled up with zeros.

    Args:
        facts: The source.
        rank: Latent dims of the largest layer; ``constant`` caches one more.
        planes: Source plane of each rotary pair.
        nope_dim: Query dims without positions, of the largest layer.
        arch: The class.
        inert: How the norm of the latent is made to do nothing: by a ``constant`` dim, which needs
            biases; or by its ``epsilon``, without any bias in the file, as servers want it.
        dtype: Dtype of the result; that of the source if None.
        largest: Largest Euclidean norm of a latent, as seen or bounded; None to bound it layer by
            layer from the weights.
        query_bias: Whether queries have a bias; None if they do where the source's own have one.

    Raises:
        InputModelError: If transformers does not accept config.json.
        UsageError: If the dtype cannot hold what makes the norm inert.
    """
    if deepseek_problem(facts, planes) is not None:
        return None
    stock, block = stock_config(facts), BLOCKS[facts.family.model_type]
    query_bias = block.query_bias(stock) if query_bias is None else query_bias
    table, eps = rope_table(facts, stock), float(stock.rms_norm_eps)
    # servers take rms_norm_eps for all norms; RMSNorm(a x; a^2 eps) is RMSNorm(x; eps)
    stream = math.sqrt(EPSILON / eps) if inert == "epsilon" and eps != EPSILON else 1.0
    outside = _Outside(
        family=facts.family,
        architecture=CLASSES[arch],
        tied=facts.tied,
        embedding=block.embedding(stock) * stream,
        logits=block.logits(stock),
        residual=block.residual(stock) * stream,
        norm_plus_one=block.norm_plus_one,
        may_tie=arch == "youtu",
    )
    layout = Layout(
        rank=rank,
        planes=tuple(planes),
        nope_dim=nope_dim,
        inert=inert,
        query_latent=inert == "constant" and query_bias,
        dtype=getattr(torch, dtype or facts.dtype),
        largest=largest,
        rotary=table.attention_factor**2,
        residual=outside.residual,
        norm_plus_one=block.norm_plus_one,
    )
    form = constant_norm if inert == "constant" else epsilon_norm
    form(largest or 0.0, layout.cached_rank, layout.dtype)  # refuses before anything is read
    keys = {
        **_sizes(facts, stock, layout),
        "rms_norm_eps": EPSILON if inert == "epsilon" else eps,
        "tie_word_embeddings": outside.stays_tied,
        **rope_keys(table, planes),
        **(_all_dense(stock) if arch == "deepseek_v3" else _YOUTU),
    }
    return Target(
        name="native",
        model_type=arch,
        architecture=CLASSES[arch],
        family=Family(model_type=arch, architecture=CLASSES[arch]),
        edit=partial(_edit, keys={"model_type": arch, "architectures": [CLASSES[arch]], **keys}),
        reads=frozenset({"q", "k", "v", "o"}),
        folds=(INPUT_NORM,),
        fold=partial(written, layout=layout),
        rename=partial(_rename, outside=outside),
    )


_STATED = ("dtype", "torch_dtype", "transformers_version")


def _edit(config: Mapping[str, Any], *, keys: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with no key of the source's that the class does not know."""
    return {**keys, **{key: config[key] for key in _STATED if key in config}}


def _sizes(facts: ModelFacts, stock: Any, layout: Layout) -> dict[str, Any]:
    biased = layout.inert == "constant"
    return {
        "vocab_size": stock.vocab_size,
        "hidden_size": facts.geometry.hidden,
        "intermediate_size": stock.intermediate_size,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.geometry.heads,
        "num_key_value_heads": facts.geometry.heads,
        "q_lora_rank": facts.geometry.hidden + 1 if layout.query_latent else None,
        "kv_lora_rank": layout.cached_rank,
        "qk_nope_head_dim": layout.nope_dim,
        "qk_rope_head_dim": layout.rope_dim,
        "v_head_dim": facts.geometry.value_dim,
        "attention_bias": biased,
        "attention_dropout": getattr(stock, "attention_dropout", None) or 0.0,
        "hidden_act": stock.hidden_act,
        "initializer_range": stock.initializer_range,
        "max_position_embeddings": facts.context,
        "rope_interleave": True,
        "use_cache": True,
        "bos_token_id": stock.bos_token_id,
        "eos_token_id": stock.eos_token_id,
        "pad_token_id": stock.pad_token_id,
    }


# loading sets the embedding of a padding token to zero, also where it is another token's or tied
_YOUTU: Mapping[str, Any] = {"pad_token_id": None}


def _all_dense(stock: Any) -> dict[str, Any]:
    """No layer has experts, but the configuration must describe some."""
    return {
        "first_k_dense_replace": stock.num_hidden_layers,
        "moe_intermediate_size": stock.intermediate_size,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outside:
    """What becomes of the tensors outside the attention.

    Args:
        family: Row of the source.
        architecture: Class of the result.
        tied: Whether the source's embeddings are one.
        embedding: Factor on the input embedding.
        logits: Factor on the output embedding.
        residual: Factor on the output of the MLP.
        norm_plus_one: Whether one is added to the weights of norms.
        may_tie: Whether the result may have its embeddings in one tensor.
    """

    family: Family
    architecture: str
    tied: bool
    embedding: float
    logits: float
    residual: float
    norm_plus_one: bool
    may_tie: bool

    @property
    def stays_tied(self) -> bool:
        """Whether one tensor serves as both embeddings of the result."""
        return self.tied and self.may_tie and self.embedding == self.logits


def _rename(name: str, *, outside: _Outside) -> Fate:
    place = layer_and_rest(name, outside.family)
    if place is None:
        fates, own = _fates(outside), name.removeprefix(outside.family.base)
    else:
        fates, own = _fates_in_layer(place[0], outside), place[1]
    if own not in fates:
        raise InputModelError(
            f"{name!r} has no place in a model of class {outside.architecture}",
            hint="Choose --target kvpatch, or remove it from the checkpoint if nothing reads it.",
        )
    return fates[own]


def _fates(outside: _Outside) -> Mapping[str, Fate]:
    """What becomes of the tensors of no layer, named without the prefix of the base model."""
    embedding = _scaled("model.embed_tokens.weight", outside.embedding)
    head = _scaled("lm_head.weight", outside.logits)
    both = outside.tied and not outside.stays_tied
    return {
        "embed_tokens.weight": (embedding, head) if both else embedding,
        "norm.weight": _norm("model.norm.weight", outside),
        "lm_head.weight": None if outside.tied else head,
    }


def _fates_in_layer(layer: int, outside: _Outside) -> Mapping[str, Fate]:
    """What becomes of the tensors of a layer, named without its prefix."""
    prefix = f"model.layers.{layer}."
    gate, up, down = (f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
    norm = "post_attention_layernorm.weight"
    return {
        norm: _norm(prefix + norm, outside),
        gate: Rewrite(prefix + gate),
        up: Rewrite(prefix + up),
        "mlp.gate_up_proj.weight": (
            Rewrite(prefix + gate, _upper_half),
            Rewrite(prefix + up, _lower_half),
        ),
        down: _scaled(prefix + down, outside.residual),
    }


def _norm(name: str, outside: _Outside) -> Rewrite:
    return Rewrite(name, _plus_one, elementwise=True) if outside.norm_plus_one else Rewrite(name)


def _scaled(name: str, factor: float) -> Rewrite:
    return (
        Rewrite(name) if factor == 1 else Rewrite(name, partial(_times, factor), elementwise=True)
    )


def _times(factor: float, tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True).mul_(factor)


def _plus_one(weight: Tensor) -> Tensor:
    return weight.double() + 1


def _upper_half(rows: Tensor) -> Tensor:
    return rows.chunk(2)[0]


def _lower_half(rows: Tensor) -> Tensor:
    return rows.chunk(2)[1]
