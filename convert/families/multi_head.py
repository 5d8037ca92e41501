"""Rows of the table whose stock class has no KV-head count of its own.

Their conversions are written for another class, see ``convert/targets``. Facts are those of
transformers 5.23 (configuration and modeling files of each model_type).
"""

from __future__ import annotations

from convert.families.family import Family, Only, Projection, Windows
from convert.layer import QkNorm

__all__ = ["GPT_BIGCODE", "MULTI_HEAD"]

_GPT_KEYS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "intermediate_size": ("n_inner",),
    "hidden_act": ("activation_function",),
    "layer_norm_eps": ("layer_norm_epsilon",),
    "residual_dropout": ("resid_pdrop",),
    "embedding_dropout": ("embd_pdrop",),
    "attention_dropout": ("attn_pdrop",),
}
_GPT_DEFAULTS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_GPTJ_DEFAULTS = {**_GPT_DEFAULTS, "vocab_size": 50400, "n_positions": 2048, "rotary_dim": 64}
_MASKS = ("attn.bias", "attn.masked_bias")


def _interleaved(attention: str) -> tuple[Projection, ...]:
    """Query, key and value of a head side by side, head after head: rows [H, 3, D]."""
    return (
        Projection(f"{attention}.query_key_value", ("q", "k", "v"), blocks="kv_heads"),
        Projection(f"{attention}.dense", ("o",)),
    )


def _separate(attention: str) -> tuple[Projection, ...]:
    return (
        Projection(f"{attention}.q_proj", ("q",)),
        Projection(f"{attention}.k_proj", ("k",)),
        Projection(f"{attention}.v_proj", ("v",)),
        Projection(f"{attention}.out_proj", ("o",)),
    )


MULTI_HEAD = (
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        gqa=False,
        keys=_GPT_KEYS,
        only=(Only("add_cross_attention", False, otherwise="cross-attention"),),
        projections=(
            Projection("attn.c_attn", ("q", "k", "v"), transposed=True),
            Projection("attn.c_proj", ("o",), transposed=True),
        ),
        base="transformer.",
        layer_prefix="transformer.h.{layer}.",
        embedding="transformer.wte.weight",
        buffers=_MASKS,
        positions="learned",
        scale_switch="scale_attn_weights",
        layer_scale="scale_attn_by_inverse_layer_idx",
        defaults={
            **_GPT_DEFAULTS,
            "vocab_size": 50257,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        model_type="gpt_neo",
        architecture="GPTNeoForCausalLM",
        gqa=False,
        keys={
            "num_attention_heads": ("num_attention_heads", "num_heads"),
            "num_hidden_layers": ("num_hidden_layers", "num_layers"),
            "sliding_window": ("window_size",),
        },
        projections=_separate("attn.attention"),
        base="transformer.",
        layer_prefix="transformer.h.{layer}.",
        embedding="transformer.wte.weight",
        buffers=("attn.attention.bias", "attn.attention.masked_bias"),
        positions="learned",
        windows=Windows("local", cached=False),
        scale=1.0,
        defaults={"window_size": 256, "tie_word_embeddings": True},
    ),
    Family(
        model_type="gptj",
        architecture="GPTJForCausalLM",
        gqa=False,
        keys={**_GPT_KEYS, "rope_theta": ()},
        projections=_separate("attn"),
        base="transformer.",
        layer_prefix="transformer.h.{layer}.",
        embedding="transformer.wte.weight",
        buffers=_MASKS,
        interleaved=True,
        rotary_dim="rotary_dim",
        tabled=True,
        defaults=_GPTJ_DEFAULTS,
    ),
    Family(
        model_type="codegen",
        architecture="CodeGenForCausalLM",
        gqa=False,
        keys={**_GPT_KEYS, "rope_theta": ()},
        projections=(
            # trained on four devices, each with its own queries, values and keys
            Projection("attn.qkv_proj", ("q", "v", "k"), blocks=4),
            Projection("attn.out_proj", ("o",)),
        ),
        base="transformer.",
        layer_prefix="transformer.h.{layer}.",
        embedding="transformer.wte.weight",
        buffers=("attn.causal_mask", *_MASKS),
        interleaved=True,
        rotary_dim="rotary_dim",
        tabled=True,
        defaults=_GPTJ_DEFAULTS,
    ),
    Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        gqa=False,
        keys={
            "rope_theta": ("rotary_emb_base",),
            "partial_rotary_factor": ("rotary_pct",),
            "residual_dropout": ("hidden_dropout",),
            "embedding_dropout": ("hidden_dropout",),
        },
        projections=_interleaved("attention"),
        base="gpt_neox.",
        layer_prefix="gpt_neox.layers.{layer}.",
        embedding="gpt_neox.embed_in.weight",
        heads=("embed_out.weight", "lm_head.weight"),
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        partial=0.25,
        defaults={
            "vocab_size": 50432,
            "intermediate_size": 24576,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    Family(
        model_type="persimmon",
        architecture="PersimmonForCausalLM",
        gqa=False,
        projections=_interleaved("self_attn"),
        buffers=("self_attn.rotary_emb.inv_freq",),
        qk_norm=QkNorm("shared", "layer"),
        qk_norm_switch="qk_layernorm",
        q_norm="self_attn.q_layernorm.weight",
        k_norm="self_attn.k_layernorm.weight",
        partial=0.5,
        defaults={"max_position_embeddings": 16384, "qk_layernorm": True, "layer_norm_eps": 1e-5},
    ),
    Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        gqa=False,
        keys={
            "hidden_act": ("activation_function",),
            "intermediate_size": ("ffn_dim",),
            "residual_dropout": ("dropout",),
        },
        only=(
            Only("do_layer_norm_before", True, otherwise="a norm after the attention (OPT-350m)"),
            Only(
                "word_embed_proj_dim",
                same_as="hidden_size",
                otherwise="a projection between embeddings and layers (OPT-350m)",
            ),
        ),
        projections=_separate("self_attn"),
        layer_prefix="model.decoder.layers.{layer}.",
        embedding="model.decoder.embed_tokens.weight",
        positions="learned",
        defaults={
            "vocab_size": 50272,
            "ffn_dim": 3072,
            "activation_function": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "dropout": 0.1,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        model_type="bloom",
        architecture="BloomForCausalLM",
        gqa=False,
        keys={
            "hidden_size": ("n_embed", "hidden_size"),
            "num_attention_heads": ("num_attention_heads", "n_head"),
            "num_hidden_layers": ("num_hidden_layers", "n_layer"),
            "max_position_embeddings": ("seq_length",),
        },
        only=(
            Only(
                "apply_residual_connection_post_layernorm",
                False,
                otherwise="a residual stream that starts after the norm",
            ),
        ),
        projections=_interleaved("self_attention"),
        base="transformer.",
        layer_prefix="transformer.h.{layer}.",
        embedding="transformer.word_embeddings.weight",
        positions="alibi",
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        model_type="mpt",
        architecture="MptForCausalLM",
        gqa=False,
        keys={
            "hidden_size": ("hidden_size", "d_model"),
            "num_attention_heads": ("num_attention_heads", "n_heads"),
            "num_hidden_layers": ("num_hidden_layers", "n_layers"),
            "max_position_embeddings": ("max_seq_len",),
            "clip_qkv": ("attn_config.clip_qkv",),
            "softmax_scale": ("attn_config.softmax_scale",),
            "alibi": ("attn_config.alibi",),
            "prefix_lm": ("attn_config.prefix_lm",),
            "qk_ln": ("attn_config.qk_ln",),
        },
        only=(
            Only("alibi", True, otherwise="an MPT with learned positions"),
            Only("prefix_lm", False, otherwise="a prefix that sees itself in both directions"),
            Only("qk_ln", False, otherwise="a norm of queries and keys"),
        ),
        projections=(
            Projection("attn.Wqkv", ("q", "k", "v")),
            Projection("attn.out_proj", ("o",)),
        ),
        base="transformer.",
        layer_prefix="transformer.blocks.{layer}.",
        embedding="transformer.wte.weight",
        positions="alibi",
        tabled=True,
        scale=("softmax_scale", 1.0),
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        model_type="falcon",
        architecture="FalconForCausalLM",
        gqa=False,
        multi_query={"multi_query": True, "num_kv_heads": 1},
        keys={"hidden_size": ("n_embed", "hidden_size")},
        # what is left are the falcon-rw models; the others have few KV heads, or RoPE
        only=(
            Only(
                "new_decoder_architecture",
                False,
                otherwise="the decoder of Falcon-40B, whose class caches every query head",
            ),
            Only("alibi", True, otherwise="a Falcon with RoPE"),
            Only("parallel_attn", False, otherwise="attention beside the feed-forward block"),
        ),
        projections=_interleaved("self_attention"),
        base="transformer.",
        layer_prefix="transformer.h.{layer}.",
        embedding="transformer.word_embeddings.weight",
        positions="alibi",
        defaults={
            "alibi": False,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "tie_word_embeddings": True,
        },
    ),
)

# no row of the table: with its single KV head, a model of this class is a result and no source
GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    gqa=False,
    multi_query={"multi_query": True},
    keys=_GPT_KEYS,
    only=(Only("multi_query", True, otherwise="a GPT-BigCode with as many KV as query heads"),),
    projections=(
        Projection("attn.c_attn", ("q", "k", "v")),
        Projection("attn.c_proj", ("o",)),
    ),
    base="transformer.",
    layer_prefix="transformer.h.{layer}.",
    embedding="transformer.wte.weight",
    positions="learned",
    scale_switch="scale_attn_weights",
    defaults={
        **_GPT_DEFAULTS,
        "n_positions": 1024,
        "multi_query": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
)
