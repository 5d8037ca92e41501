"""Decoder blocks that differ from DeepSeek's dense one by factors alone.

Its block is ``x + attention(norm(x))``, then ``x + mlp(norm(x))`` with RMS norms and a gated MLP
without biases. A source whose block is the same up to constant factors, names and packing is
written for it by folding the factors into weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.config_keys import config_object
from convert.facts import ModelFacts

__all__ = ["BLOCKS", "Block", "block_problem", "stock_config"]


def _one(_: Any) -> float:
    return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What stands outside the attention of one family; config objects are those of transformers.

    Args:
        norm_plus_one: Whether a norm with weight w multiplies by 1 + w.
        embedding: Factor on the embeddings.
        residual: Factor on what both branches add.
        logits: Factor on the logits.
        query_bias: Whether the queries have a bias.
        mlp_bias: Whether the MLP has biases.
        renews_cache: Whether generation computes the whole cache anew where the rotary table of the
            model changes with the length, as DeepSeek's class does not.
    """

    norm_plus_one: bool = False
    embedding: Callable[[Any], float] = _one
    residual: Callable[[Any], float] = _one
    logits: Callable[[Any], float] = _one
    query_bias: Callable[[Any], bool] = lambda config: bool(getattr(config, "attention_bias", 0))
    mlp_bias: Callable[[Any], bool] = lambda config: bool(getattr(config, "mlp_bias", 0))
    renews_cache: bool = False


BLOCKS: Mapping[str, Block] = {
    "llama": Block(),
    "mistral": Block(),
    "qwen2": Block(query_bias=lambda _: True),
    "gemma": Block(norm_plus_one=True, embedding=lambda config: float(config.hidden_size**0.5)),
    "phi3": Block(renews_cache=True),
    "granite": Block(
        embedding=lambda config: float(config.embedding_multiplier),
        residual=lambda config: float(config.residual_multiplier),
        logits=lambda config: 1 / float(config.logits_scaling),
    ),
    "smollm3": Block(),
    "glm": Block(),
    "helium": Block(),
    "ernie4_5": Block(
        query_bias=lambda config: bool(config.use_bias),
        mlp_bias=lambda config: bool(config.use_bias),
    ),
}


def stock_config(facts: ModelFacts) -> Any:
    """The source's configuration object, in which transformers fills what config.json leaves out.

    Raises:
        InputModelError: If transformers does not accept config.json.
    """
    return config_object(facts.config, facts.family.model_type)


def block_problem(facts: ModelFacts) -> str | None:
    """Why a model's block is not DeepSeek's up to factors; None if it is."""
    model_type = facts.family.model_type
    seen = any(window is not None and window < facts.context for window in facts.windows)
    problems = (
        (facts.qk_norm is not None, "it normalises queries and keys"),
        (facts.softcap is not None, "its scores have a soft cap"),
        (facts.clip is not None, "it clamps queries, keys and values"),
        (
            model_type not in BLOCKS,
            f"the block of {model_type} is not attention and a gated MLP, an RMS norm before each",
        ),
        (seen, "it has sliding windows"),
    )
    if found := [problem for holds, problem in problems if holds]:
        return found[0]
    biased = BLOCKS[model_type].mlp_bias(stock_config(facts))
    return "its MLP has biases" if biased else None
