"""Which class of transformers, or of kvpatch, holds a conversion of which tiny model."""

from __future__ import annotations

from tests.families.tiny import GROUPED, MODELS, family

__all__ = ["EXPERTS", "PATCHED", "stock_class"]

# families whose experts kvpatch has no class for
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}
PATCHED = tuple(name for name in MODELS if family(name) not in EXPERTS)

# other classes for the models whose own has no KV-head count: for any, or for a single head
_ANY = {
    "gpt_neox": "phi",
    "gpt_neox:sequential-nobias-tied": "starcoder2",
    "gptj": "phi",
    "gptj:tied": "phi",
    "codegen": "phi",
    "codegen:tied": "phi",
}
_SINGLE = {
    "gpt2": "gpt_bigcode",
    "opt": "gpt_bigcode",
    "opt:nobias-untied": "gpt_bigcode",
    "falcon": "falcon",
    "falcon:bias-untied": "falcon",
}


def stock_class(name: str, kv_heads: int) -> str | None:
    """The model_type of transformers that holds a model with fewer KV heads; None if none does."""
    if name in GROUPED:
        return family(name)
    return _ANY.get(name) or (_SINGLE.get(name) if kv_heads == 1 else None)
