"""The families of models that kvpatch can run with fewer KV heads or shared layers, as data.

One row per stock model class of transformers. It says where the stock class keeps its attention
and what differs from Llama; the config, attention and model of a family are built from its row.
Imports neither torch nor transformers, so that a converter can ask what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FAMILIES", "PREFIX", "Family"]

PREFIX = "kvpatch_"

_MODULES = {
    "AutoConfig": "configuration_kvpatch",
    "AutoModel": "modeling_kvpatch",
    "AutoModelForCausalLM": "modeling_kvpatch",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one stock model class holds its attention, and how its scores are formed.

    In the converted model the attention module of every layer has the Linear modules ``q_proj``,
    ``k_proj``, ``v_proj`` and ``o_proj``, weights [out, in], whatever the stock class calls and
    fuses; query and key norms and everything outside the attention keep their stock names. A layer
    that reads another layer's keys and values has no ``k_proj``, ``v_proj`` and key norm.

    Args:
        model_type: Of the stock config; the converted one is ``kvpatch_<model_type>``.
        stem: What the names of the stock config and base model begin with.
        causal_lm: Stock class with the language-modelling head, ``<stem>ForCausalLM`` if not given.
        package: Folder of ``transformers.models``, the model_type if not given.
        base: Name of the base model inside the causal LM, and so on disk.
        decoder: Name of the part of the base model that has the layers, if that is not itself.
        layers: Name of the list of decoder layers.
        attention: Path of the attention module inside a layer.
        projection: A stock projection that has a bias where queries, keys and values have one.
        output: The stock output projection.
        q_norm: Stock name of the query norm, if the family can have one.
        k_norm: Stock name of the key norm.
        key_scale: What the key norm divides by, ``rms`` the root mean square, ``deviation`` the
            standard deviation; None where it adds a bias besides, so that it is no factor.
        norm_axes: What the norms see: tokens of concatenated heads [B, T, H * D], tokens of heads
            [B, T, H, D] or heads of tokens [B, H, T, D].
        rotary: ``stock`` applies the rotary function of the stock modeling file to the position
            embeddings of the model; ``sinusoids`` rotates neighbouring pairs of the first
            ``config.rotary_dim`` dims by ``10000 ** (-2i / rotary_dim)``; None has no RoPE.
        scale: Attribute of the stock attention that holds the factor on the scores, or the factor;
            None for ``D ** -0.5``.
        softcap: Attribute of the stock attention with the cap on the scores, if there is one.
        clip: Path of the clamp on queries, keys and values in the config, if there is one.
        dropout: Attribute of the stock attention with the dropout of attention weights.
        output_dropout: Attribute of the stock attention with the dropout of its output, where the
            attention and not the layer applies it.
        masked_true: Boolean masks of the stock model are true where attention is forbidden.
        alibi_in_mask: The stock model adds its ALiBi bias to the mask; else the attention has to.
        window: Config key of the window of layers whose ``attention_layers`` entry is ``local``.
        native_gqa: The stock config has ``num_key_value_heads``, so that GQA without shared layers
            needs no class of ours.
        forwards_kwargs: The stock model hands unknown keyword arguments to its layers, and these
            to their attention.
    """

    model_type: str
    stem: str
    causal_lm: str | None = None
    package: str | None = None
    base: str = "model"
    decoder: str | None = None
    layers: str = "layers"
    attention: str = "self_attn"
    projection: str = "q_proj"
    output: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    key_scale: Literal["rms", "deviation"] | None = None
    norm_axes: Literal["tokens_width", "tokens_heads", "heads_tokens"] = "tokens_heads"
    rotary: Literal["stock", "sinusoids"] | None = "stock"
    scale: str | float | None = "scaling"
    softcap: str | None = None
    clip: tuple[str, ...] = ()
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    masked_true: bool = False
    alibi_in_mask: bool = False
    window: str | None = None
    native_gqa: bool = True
    forwards_kwargs: bool = True

    @property
    def stock_causal_lm(self) -> str:
        """Name of the stock class with the language-modelling head."""
        return self.causal_lm or f"{self.stem}ForCausalLM"

    @property
    def stock_package(self) -> str:
        """Module of transformers that holds the stock classes."""
        return f"transformers.models.{self.package or self.model_type}"

    @property
    def converted_type(self) -> str:
        """The model_type of the converted model."""
        return PREFIX + self.model_type

    @property
    def class_names(self) -> dict[str, str]:
        """Names of the config, base model and causal LM, by the auto class that loads them."""
        return {
            "AutoConfig": f"Kvpatch{self.stem}Config",
            "AutoModel": f"Kvpatch{self.stem}Model",
            "AutoModelForCausalLM": f"Kvpatch{self.stem}ForCausalLM",
        }

    @property
    def auto_map(self) -> dict[str, str]:
        """Module and class for each auto class, as config.json names them."""
        return {auto: f"{_MODULES[auto]}.{name}" for auto, name in self.class_names.items()}

    @property
    def attention_prefix(self) -> str:
        """Where the attention of layer ``{layer}`` lies on disk: prefix of ``q_proj.weight``."""
        parts = (self.base, self.decoder, self.layers, "{layer}", self.attention, "")
        return ".".join(part for part in parts if part is not None)


_HEAD_NORM: dict[str, Any] = {"q_norm": "q_norm", "k_norm": "k_norm", "key_scale": "rms"}
_LAYER_NORM: dict[str, Any] = {"q_norm": "q_layernorm", "k_norm": "k_layernorm"}
_GPT: dict[str, Any] = {
    "base": "transformer",
    "layers": "h",
    "native_gqa": False,
    "forwards_kwargs": False,
}
_FUSED: dict[str, Any] = {"projection": "query_key_value", "output": "dense", "native_gqa": False}

_ROWS = (
    Family(model_type="llama", stem="Llama"),
    Family(model_type="mistral", stem="Mistral"),
    Family(model_type="qwen2", stem="Qwen2"),
    Family(model_type="qwen3", stem="Qwen3", **_HEAD_NORM),
    Family(model_type="gemma", stem="Gemma"),
    Family(model_type="gemma2", stem="Gemma2", softcap="attn_logit_softcapping"),
    Family(
        model_type="gemma3_text",
        stem="Gemma3Text",
        causal_lm="Gemma3ForCausalLM",
        package="gemma3",
        **_HEAD_NORM,
    ),
    Family(model_type="olmo", stem="Olmo", clip=("clip_qkv",)),
    Family(model_type="olmo2", stem="Olmo2", **_HEAD_NORM, norm_axes="tokens_width"),
    Family(model_type="olmo3", stem="Olmo3", **_HEAD_NORM, norm_axes="tokens_width"),
    Family(model_type="phi", stem="Phi", output="dense", **_LAYER_NORM),
    Family(model_type="phi3", stem="Phi3", projection="qkv_proj"),
    Family(
        model_type="stablelm",
        stem="StableLm",
        **_LAYER_NORM,
        key_scale="deviation",
        norm_axes="heads_tokens",
        forwards_kwargs=False,
    ),
    Family(model_type="cohere", stem="Cohere", **_HEAD_NORM | {"key_scale": "deviation"}),
    Family(model_type="starcoder2", stem="Starcoder2"),
    Family(model_type="granite", stem="Granite"),
    Family(model_type="smollm3", stem="SmolLM3"),
    Family(model_type="glm", stem="Glm"),
    Family(model_type="glm4", stem="Glm4"),
    Family(model_type="nemotron", stem="Nemotron", forwards_kwargs=False),
    Family(model_type="helium", stem="Helium"),
    Family(model_type="ernie4_5", stem="Ernie4_5"),
    Family(model_type="gpt_neox", stem="GPTNeoX", base="gpt_neox", attention="attention", **_FUSED),
    Family(model_type="persimmon", stem="Persimmon", **_FUSED, **_LAYER_NORM),
    Family(
        model_type="opt",
        stem="OPT",
        decoder="decoder",
        output="out_proj",
        rotary=None,
        dropout="dropout",
        native_gqa=False,
        forwards_kwargs=False,
    ),
    Family(
        model_type="gpt2",
        stem="GPT2",
        causal_lm="GPT2LMHeadModel",
        **_GPT | {"forwards_kwargs": True},
        attention="attn",
        projection="c_attn",
        output="c_proj",
        rotary=None,
        dropout="attn_dropout",
        output_dropout="resid_dropout",
    ),
    Family(
        model_type="gptj",
        stem="GPTJ",
        **_GPT,
        attention="attn",
        output="out_proj",
        rotary="sinusoids",
        scale=None,
        dropout="attn_dropout",
        output_dropout="resid_dropout",
    ),
    Family(
        model_type="codegen",
        stem="CodeGen",
        **_GPT,
        attention="attn",
        projection="qkv_proj",
        output="out_proj",
        rotary="sinusoids",
        scale=None,
        dropout="attn_dropout",
        output_dropout="resid_dropout",
    ),
    Family(
        model_type="gpt_neo",
        stem="GPTNeo",
        **_GPT,
        attention="attn.attention",
        output="out_proj",
        rotary=None,
        scale=1.0,
        dropout="attn_dropout",
        output_dropout="resid_dropout",
        window="window_size",
    ),
    Family(
        model_type="bloom",
        stem="Bloom",
        **_GPT | _FUSED,
        attention="self_attention",
        rotary=None,
        scale=None,
        output_dropout="hidden_dropout",
    ),
    Family(
        model_type="falcon",
        stem="Falcon",
        **_GPT | _FUSED,
        attention="self_attention",
        scale=None,
        alibi_in_mask=True,
    ),
    Family(
        model_type="mpt",
        stem="Mpt",
        **_GPT | {"layers": "blocks"},
        attention="attn",
        projection="Wqkv",
        output="out_proj",
        rotary=None,
        scale="softmax_scale",
        clip=("attn_config", "clip_qkv"),
        dropout="attn_dropout_p",
        masked_true=True,
    ),
)

FAMILIES: Mapping[str, Family] = {row.model_type: row for row in _ROWS}
